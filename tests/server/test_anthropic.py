"""Anthropic's protocol, as its own client speaks it."""

import json

import anthropic
import pytest

from .conftest import anthropic_client, serving
from .speaker import CHATML, HERMES, Speaker, tokenizer
from .test_openai import CALL, MARKS

HI = [{"role": "user", "content": "Hi"}]
TOOLS = [
    {
        "name": "f",
        "input_schema": {"type": "object", "properties": {"x": {"enum": [1]}}, "required": ["x"]},
    }
]


@pytest.fixture(scope="module")
def client():
    """Of a model that thinks q, says ``ab`` and calls f."""
    tok = tokenizer(*MARKS, controls=("<think>", "</think>"), template=HERMES)
    steps = ["<think>", "q", "</think>", "a", "b", "<tool_call>", CALL, "</tool_call>"]
    with serving(Speaker(tok, steps), tok) as server:
        yield anthropic_client(server)


def ask(client, **more):
    return client.messages.create(**{"model": "m", "max_tokens": 50, "messages": HI, **more})


def test_blocks(client):
    got = ask(client, tools=TOOLS)
    thinking, text, use = got.content
    assert (thinking.thinking, text.text) == ("q", "ab")
    assert (use.name, use.input) == ("f", {"x": 1})
    assert got.stop_reason == "tool_use"
    usage = got.usage
    assert usage.input_tokens + usage.cache_read_input_tokens == 21
    assert usage.output_tokens == 9


def test_events(client):
    with client.messages.stream(model="m", max_tokens=50, messages=HI, tools=TOOLS) as stream:
        kinds = [event.type for event in stream]
        got = stream.get_final_message()
    thinking, text, use = got.content
    assert (thinking.thinking, text.text, use.input) == ("q", "ab", {"x": 1})
    assert got.stop_reason == "tool_use"
    assert got.usage.output_tokens == 9
    assert kinds[0] == "message_start"
    assert kinds[-2:] == ["message_delta", "message_stop"]
    assert kinds.count("content_block_start") == kinds.count("content_block_stop") == 3


@pytest.mark.parametrize(
    ("more", "reason", "text"),
    [
        ({}, "end_turn", f"ab<tool_call>{CALL}</tool_call>"),
        ({"max_tokens": 5}, "max_tokens", "ab"),
        ({"stop_sequences": ["zz", "b"]}, "stop_sequence", "a"),
    ],
)
def test_stop_reasons(client, more, reason, text):
    got = ask(client, **more)
    assert got.stop_reason == reason
    assert got.stop_sequence == ("b" if reason == "stop_sequence" else None)
    assert got.content[1].text == text


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "f"}])
def test_a_tool_that_is_required(client, choice):
    got = ask(client, tools=TOOLS, tool_choice=choice)
    assert got.content[-1].input == {"x": 1}
    assert [b.type for b in got.content] == ["thinking", "tool_use"]


def test_a_json_schema(client):
    form = {"type": "json_schema", "schema": {"enum": ["only"]}}
    got = ask(client, output_config={"format": form})
    assert json.loads(got.content[-1].text) == "only"


def test_what_the_template_is_told():
    """A template that refuses all it is told."""
    told = "{{ raise_exception(messages | tojson ~ tools | tojson ~ enable_thinking) }}"
    tok = tokenizer(template=CHATML + told)
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "hm", "signature": ""},
                {"type": "text", "text": "I call"},
                {"type": "tool_use", "id": "t1", "name": "f", "input": {"x": 1}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "t1", "content": "7"},
                {"type": "text", "text": "and?"},
            ],
        },
    ]
    system = [{"type": "text", "text": "S", "cache_control": {"type": "ephemeral"}}]
    asked = {"messages": messages, "system": system, "thinking": {"type": "disabled"}}
    with (
        serving(Speaker(tok, ["x"]), tok) as server,
        pytest.raises(anthropic.BadRequestError) as error,
    ):
        ask(anthropic_client(server), tools=TOOLS, **asked)
    message = error.value.body["error"]["message"].partition("conversation: ")[2]
    told, end = json.JSONDecoder().raw_decode(message)
    assert [m["role"] for m in told] == ["system", "user", "assistant", "tool", "user"]
    assert [m["content"] for m in told] == ["S", "Hi", "I call", "7", "and?"]
    assert told[2]["reasoning_content"] == "hm"
    assert told[2]["tool_calls"][0]["function"] == {"name": "f", "arguments": {"x": 1}}
    assert told[3]["tool_call_id"] == "t1"
    assert '"enum": [1]' in message[end:]
    assert message.endswith("False")


def test_an_answer_that_was_begun(client):
    got = ask(client, messages=[*HI, {"role": "assistant", "content": "a"}])
    # The model goes on from the a.
    assert got.content[0].text == f"b<tool_call>{CALL}</tool_call>"


def test_tokens_are_counted(client):
    got = client.messages.count_tokens(model="m", messages=HI)
    assert got.input_tokens == 21


@pytest.mark.parametrize(
    ("more", "what"),
    [
        ({"messages": []}, "messages"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]},
            "text only",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "surprise"}]}]}, "surprise"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools"),
        ({"mcp_servers": [{}]}, "mcp_servers"),
        ({"temperature": 3}, "temperature"),
        ({"messages": [{"role": "user", "content": "x" * 300}]}, "context"),
    ],
)
def test_refusals_have_anthropics_form(client, more, what):
    with pytest.raises(anthropic.BadRequestError, match=what) as error:
        ask(client, extra_body=more)
    assert error.value.body["type"] == "error"
    assert error.value.body["error"]["type"] == "invalid_request_error"


def test_max_tokens_is_needed(client):
    with pytest.raises(anthropic.BadRequestError, match="max_tokens"):
        client.post("/v1/messages", cast_to=object, body={"messages": HI})
