"""What a request may say."""

import pytest

from mlxfuse.server.requests import (
    IGNORED,
    OFF,
    ChatRequest,
    CompletionRequest,
    RequestError,
    parse,
)

CHAT = {"messages": [{"role": "user", "content": "Hi"}]}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("stop", 5), ("stop", [5]), ("stop", [None]), ("stop", [["a"]]), ("stop", ["x"] * 65),
        ("temperature", "hot"), ("temperature", -1), ("temperature", 1e400), ("temperature", True),
        ("top_p", 1.5), ("top_p", -0.1), ("top_k", 1.5), ("top_k", -2), ("min_p", 2),
        ("n", 0), ("n", 129), ("n", "2"), ("seed", 1.5), ("seed", "x"),
        ("max_tokens", -1), ("max_tokens", "9"), ("max_completion_tokens", 0.5),
        ("logprobs", 3), ("top_logprobs", 21), ("top_logprobs", -1),
        ("logit_bias", {"x": 1}), ("logit_bias", {"-1": 1}), ("logit_bias", {"1": "a"}),
        ("logit_bias", {"1": 101}), ("logit_bias", {"1": True}), ("logit_bias", [1]),
        ("logit_bias", {"9" * 13: 1}), ("logit_bias", {"\u0661": 1}),
        ("stream", "yes"), ("stream_options", 3), ("stream_options", {"include_usage": 1}),
        ("messages", []), ("messages", "Hi"), ("messages", [5]), ("messages", [{"content": "x"}]),
        ("messages", [{"role": 5, "content": "x"}]), ("messages", [{"role": "user", "content": 5}]),
        ("messages", [{"role": "user", "content": [{"type": "text"}]}]),
        ("messages", [{"role": "user", "content": [{"type": "image_url"}]}]),
        ("messages", [{"role": "user", "content": ["x"]}]),
        ("messages", [{"role": "assistant", "tool_calls": [{}]}]),
        ("tools", {}), ("tools", [{"type": "retrieval"}]), ("tools", [{"type": "function"}]),
        ("response_format", "json"), ("response_format", {"type": "xml"}),
        ("response_format", {"type": "json_schema", "json_schema": {"schema": 5}}),
        ("functions", [{"name": "f"}]), ("best_of", 2), ("suffix", "x"), ("adapters", "a"),
        ("draft_model", "m"), ("audio", {}), ("modalities", ["audio"]), ("mirostat", 2),
        ("no_such_parameter", 1), ("prediction", {"type": "content"}), ("model", 5),
    ],
    ids=lambda v: str(v)[:30],
)  # fmt: skip
def test_a_wrong_value_is_named(name, value):
    with pytest.raises(RequestError) as error:
        parse(ChatRequest, CHAT | {name: value})
    assert error.value.param.split(".")[0] == name
    assert name in error.value.message
    assert error.value.status == 400


def test_null_is_as_if_absent():
    names = {name for name in ChatRequest.model_fields if name != "messages"}
    nulls = dict.fromkeys(names | IGNORED | OFF.keys())
    assert parse(ChatRequest, CHAT | nulls) == parse(ChatRequest, CHAT)
    inner = {"stream_options": {"include_usage": None}, "response_format": {"type": "text"}}
    inner["response_format"]["json_schema"] = None
    assert parse(ChatRequest, CHAT | inner).stream_options.include_usage is False


@pytest.mark.parametrize(
    ("name", "value"),
    [("best_of", 1), ("suffix", ""), ("modalities", ["text"]), ("functions", []), ("mirostat", 0),
     ("user", "me"), ("metadata", {"a": "b"}), ("store", False), ("cache_prompt", True)],
)  # fmt: skip
def test_what_changes_nothing_is_taken(name, value):
    parse(ChatRequest, CHAT | {name: value})


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [("x", ["x"]), ("", [""]), (["a", "b"], ["a", "b"]), ([1, 2], [[1, 2]]), ([[1], [2, 3]],) * 2],
)
def test_prompts(prompt, prompts):
    assert parse(CompletionRequest, {"prompt": prompt}).prompt == prompts


@pytest.mark.parametrize("prompt", [5, {}, [], [None], [1, "a"], [1.5], [True], ["x"] * 129])
def test_no_prompts(prompt):
    with pytest.raises(RequestError, match="prompt"):
        parse(CompletionRequest, {"prompt": prompt})
