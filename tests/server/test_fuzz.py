"""A thousand requests that nobody would send: each is answered, and the server lives."""

import asyncio
import json
import time

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlxfuse.generate.run import Settings
from mlxfuse.server import Server
from mlxfuse.server.anthropic import MessagesRequest
from mlxfuse.server.requests import OFF, ChatRequest, CompletionRequest

from .speaker import HERMES, Speaker, tokenizer
from .test_openai import CALL, MARKS, TOOLS

SCHEMA = {"type": "object", "properties": {"a": {"enum": [1, "x"]}}, "required": ["a"]}
FORMAT = {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}}
TEXTS = st.text(st.characters(codec="utf-8"), max_size=12)
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXTS
    | st.sampled_from(["auto", "none", "required", "a", "<tool_call>", 0, 1, 2, -1, 300, 2**64]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)
# Values that get further than the first check.
LIKELY = {
    "stop": st.lists(TEXTS, max_size=3),
    "temperature": st.floats(0, 3),
    "top_p": st.floats(0, 1),
    "top_k": st.integers(-1, 400),
    "min_p": st.floats(0, 1),
    "xtc_probability": st.floats(0, 1),
    "repetition_penalty": st.floats(0, 3),
    "repetition_context_size": st.integers(0, 10**13),
    "presence_penalty": st.floats(-3, 3),
    "frequency_penalty": st.floats(-3, 3),
    "logit_bias": st.dictionaries(st.integers(-2, 280).map(str), st.floats(-120, 120), max_size=3),
    "seed": st.integers(),
    "n": st.integers(0, 4),
    "max_tokens": st.integers(0, 80),
    "stream": st.booleans(),
    "stream_options": st.just({"include_usage": True}),
    "logprobs": st.booleans() | st.integers(0, 5),
    "top_logprobs": st.integers(0, 20),
    "tools": st.just(TOOLS),
    "tool_choice": st.sampled_from(["auto", "none", "required"]),
    "response_format": st.sampled_from([FORMAT, {"type": "json_object"}, {"type": "text"}]),
    "grammar": st.sampled_from(['root ::= "a" | "b"', "root ::= (", "x"]),
    "echo": st.booleans(),
    "system": TEXTS,
}
PATHS = {
    "/v1/chat/completions": ChatRequest,
    "/v1/completions": CompletionRequest,
    "/v1/messages": MessagesRequest,
    "/v1/messages/count_tokens": MessagesRequest,
}
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "system", "tool", "x"])},
        optional={"content": TEXTS | st.lists(VALUES, max_size=2), "tool_calls": VALUES},
    ),
    min_size=1,
    max_size=3,
)


PROMPTS = TEXTS | st.lists(st.integers(-1, 280), max_size=4) | st.lists(TEXTS, max_size=3)


def once_in(count):
    return st.sampled_from([False] * (count - 1) + [True])


@st.composite
def requests(draw):
    """(path, body): mostly a request with a few parameters that are likely, or anything."""
    path = draw(st.sampled_from(sorted(PATHS)))
    if draw(once_in(16)):
        return path, draw(st.binary(max_size=40) | VALUES.map(lambda v: json.dumps(v).encode()))
    names = sorted({*PATHS[path].model_fields, *OFF})
    body = {
        "messages": draw(MESSAGES) if draw(once_in(4)) else [{"role": "user", "content": "Hi"}],
        "prompt": draw(PROMPTS) if draw(once_in(3)) else "Hi",
        "max_tokens": 8,
    }
    body.pop("prompt" if path != "/v1/completions" else "messages")
    for name in draw(st.lists(st.sampled_from(names), max_size=4, unique=True)):
        body[name] = draw(VALUES if draw(once_in(5)) else LIKELY.get(name, st.none()))
    return path, json.dumps(body).encode()


@pytest.fixture(scope="module")
def server():
    tok = tokenizer(*MARKS, controls=("<think>", "</think>"), template=HERMES)
    steps = ["<think>", "q", "</think>", "a", "b", "<tool_call>", CALL, "</tool_call>"]
    made = Server(Speaker(tok, steps, context=64), tok, "m", Settings(max_tokens=-1), port=0)
    yield made
    made._engine.close()
    made._socket.close()


def post(server, path, body):
    async def sent():
        transport = httpx.ASGITransport(server.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            answer = await client.post(path, content=body, timeout=60)
            return answer.status_code, answer.headers["content-type"], answer.text

    return asyncio.run(asyncio.wait_for(sent(), 120))


def check(path, status, kind, text):
    """The answer has a form that clients of ``path`` read."""
    assert status in (200, 400), text
    if kind.startswith("text/event-stream"):
        events = [e for e in text.split("\n\n") if e and not e.startswith(":")]
        assert "server_error" not in text
        if path == "/v1/messages":
            assert events[-1].startswith(("event: message_stop", "event: error"))
        else:
            assert events[-1] == "data: [DONE]"
        for event in events:
            data = event.rpartition("data: ")[2]
            assert data == "[DONE]" or isinstance(json.loads(data), dict)
        return
    answer = json.loads(text, parse_constant=pytest.fail)
    if status == 400:
        assert isinstance(answer["error"]["message"], str)
        assert answer["error"]["type"] == "invalid_request_error"
        return
    expected = {"/v1/messages": "content", "/v1/messages/count_tokens": "input_tokens"}
    assert expected.get(path, "choices") in answer


@settings(
    max_examples=1000,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(request=requests())
def test_every_request_is_answered(server, request):
    path, body = request
    check(path, *post(server, path, body))
    assert server._engine.alive


def test_the_server_answers_afterwards(server):
    """It runs last in this file, and no answer is left behind."""
    status, _, text = post(server, "/v1/completions", b'{"prompt": "Hi", "max_tokens": 1}')
    assert (status, json.loads(text)["choices"][0]["text"]) == (200, "<think>")
    end = time.monotonic() + 30  # the engine counts an answer until its step has ended
    while server._engine.running and time.monotonic() < end:
        time.sleep(0.01)
    assert server._engine.running == 0
