"""The server, as a real OpenAI client sees it."""

import http.client
import math
import re
import signal
import subprocess
import threading
from dataclasses import replace
from urllib.parse import urlsplit

import openai
import pytest
from mlx_lm.generate import stream_generate

from mlxfuse.generate.chat import Chat
from mlxfuse.generate.run import Settings, generate
from mlxfuse.loader import load
from mlxfuse.nn.kv.cache import CompressedKVCache
from mlxfuse.nn.kv.options import KVOptions
from mlxfuse.server.app import Server
from mlxfuse.server.gate import BODY_LIMIT

from ..cli.test_cli import TEMPLATE, start
from ..models import tiny


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    made = tiny.build("llama", 0)
    made.metadata["tokenizer.chat_template"] = TEMPLATE
    return str(tiny.write(tmp_path_factory.mktemp("models") / "tiny.gguf", made))


@pytest.fixture(scope="module")
def server(path):
    model, tokenizer = load(path)
    made = Server(model, tokenizer, "tiny", Settings(max_tokens=9), port=0)
    thread = threading.Thread(target=made.serve)
    thread.start()
    yield made
    made.stop()
    thread.join(timeout=30)
    assert not thread.is_alive()


@pytest.fixture
def client(server):
    return openai.OpenAI(base_url=f"{server.address}/v1", api_key="none", max_retries=0, timeout=60)


def expected(path, message, count):
    """The text without a server."""
    model, tokenizer = load(path)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": message}], tokenize=False, add_generation_prompt=True
    )
    ids = tokenizer.encode(text, add_special_tokens=False)
    return "".join(r.text for r in stream_generate(model, tokenizer, ids, max_tokens=count))


def streamed(client, message, count):
    chunks = client.chat.completions.create(
        model="any name at all",
        messages=[{"role": "user", "content": message}],
        max_tokens=count,
        stream=True,
    )
    return [c.choices[0].delta.content or "" for c in chunks if c.choices]


def test_streamed_text_is_the_models(client, path):
    pieces = streamed(client, "Hello", 12)
    assert "".join(pieces) == expected(path, "Hello", 12)
    assert sum(1 for piece in pieces if piece) > 1, "it came in one piece"


def test_defaults_and_usage(client, path):
    answer = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "Hello"}]
    )
    assert answer.choices[0].message.content == expected(path, "Hello", 9)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 9
    assert answer.usage.prompt_tokens == len("[user]Hello\n")


def asked_at_once(ask, messages):
    found = {}
    threads = [threading.Thread(target=lambda m=m: found.__setitem__(m, ask(m))) for m in messages]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    return found


def test_two_requests_at_once(client, path):
    messages = ("Hello", "another one")
    found = asked_at_once(lambda m: "".join(streamed(client, m, 40)), messages)
    assert found == {m: expected(path, m, 40) for m in messages}


@pytest.mark.parametrize("begins", [0, 150])
def test_compressed_caches(path, begins, monkeypatch):
    """Two requests at once, in a batch or, where the caches begin plain, one after the other."""
    batched = []
    merge = CompressedKVCache.merge.__func__

    def counted(cls, caches):
        batched.append(len(caches))
        return merge(cls, caches)

    monkeypatch.setattr(CompressedKVCache, "merge", classmethod(counted))
    # Raw prompts share no tokens: what one has sealed is not what another begins with.
    settings = Settings(max_tokens=40, ignore_chat_template=True, kv=KVOptions(4, 4),
                        quantized_kv_start=begins)  # fmt: skip
    messages = ["The quick brown fox jumps over the lazy dog. " * 5, "another one " * 14]

    def texts(kv):
        each = {m: replace(settings, prompt=m, kv=kv) for m in messages}
        return {m: generate(*load(path), each[m]).text for m in messages}

    want = texts(settings.kv)
    assert want != texts(None)  # control
    server = Server(*load(path), "tiny", settings, port=0)
    thread = threading.Thread(target=server.serve)
    thread.start()
    client = openai.OpenAI(base_url=f"{server.address}/v1", api_key="none", timeout=60)

    def ask(text):
        return client.completions.create(model="", prompt=text, max_tokens=40).choices[0].text

    try:
        assert asked_at_once(ask, messages) == want
    finally:
        server.stop()
        thread.join(timeout=30)
    assert bool(batched) == (begins == 0)


def test_suppressed_tokens_are_never_generated(path, tmp_path):
    """By generate, with and without a draft, chat and the server; a request cannot lift it."""
    settings = Settings(prompt="Hello", max_tokens=12)
    never = set(generate(*load(path), settings).tokens)
    made = tiny.build("llama", 0)
    unknown = [-1, tiny.VOCABULARY]
    made.metadata |= {
        "tokenizer.chat_template": TEMPLATE,
        "tokenizer.ggml.suppress_tokens": [*map(int, never), *unknown],
    }
    model, tokenizer = load(tiny.write(tmp_path / "m.gguf", made))
    assert tokenizer.suppressed == dict.fromkeys(never, -math.inf)
    found = generate(model, tokenizer, settings)
    assert len(found.tokens) == 12
    assert never.isdisjoint(found.tokens)
    draft = generate(model, tokenizer, settings, draft_model=load(path)[0])
    assert draft.tokens == found.tokens
    assert Chat(model, tokenizer, settings).say("Hello").tokens == found.tokens
    server = Server(model, tokenizer, "tiny", settings, port=0)
    thread = threading.Thread(target=server.serve)
    thread.start()
    client = openai.OpenAI(base_url=f"{server.address}/v1", api_key="none", timeout=60)
    lifted = {str(token): 100 for token in never}
    try:
        for bias in ({}, lifted):
            said = client.chat.completions.create(
                model="", messages=[{"role": "user", "content": "Hello"}], logit_bias=bias
            )
            assert said.choices[0].message.content == found.text
    finally:
        server.stop()
        thread.join(timeout=30)


def test_only_the_served_model_is_listed(client):
    assert [m.id for m in client.models.list()] == ["tiny"]


def raw(server, headers):
    parts = urlsplit(server.address)
    connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=30)
    connection.putrequest("POST", "/v1/completions")
    for name, value in headers.items():
        connection.putheader(name, value)
    connection.endheaders()
    return connection.getresponse()


@pytest.mark.parametrize("length", [str(BODY_LIMIT + 1), "-1", "9" * 30])
def test_a_body_too_long_is_refused_unread(server, length):
    # What is no length is refused by the HTTP layer.
    expected = 413 if length == str(BODY_LIMIT + 1) else 400
    assert raw(server, {"Content-Length": length}).status == expected


def test_web_pages_are_not_let_in_by_default(server):
    answer = raw(server, {"Content-Length": "0", "Origin": "http://evil.example"})
    assert answer.status == 403
    assert answer.getheader("Access-Control-Allow-Origin") is None


def test_the_command_listens_and_ends(path):
    process = start("server", path, "--port", "0", stdout=subprocess.DEVNULL)
    for line in process.stderr:
        if found := re.search(rb"at (http://127\.0\.0\.1:\d+)/v1", line):
            break
    client = openai.OpenAI(base_url=f"{found[1].decode()}/v1", api_key="none", timeout=60)
    assert "".join(streamed(client, "Hello", 12)) == expected(path, "Hello", 12)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=30) == 130
    assert b"Traceback" not in process.stderr.read()


def test_a_port_in_use_is_one_message(server, path):
    port = urlsplit(server.address).port
    process = start("server", path, "--port", port)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert b"in use" in err
    assert b"Traceback" not in err


def test_sigterm_ends_it_after_what_has_begun(path):
    process = start("server", path, "--port", "0", "--api-key", "k", "--served-model-name", "nm",
                    "--prompt-cache-bytes", "1MB", stdout=subprocess.DEVNULL)  # fmt: skip
    for line in process.stderr:
        if found := re.search(rb"at (http://127\.0\.0\.1:\d+)/v1", line):
            break
    client = openai.OpenAI(base_url=f"{found[1].decode()}/v1", api_key="k", timeout=60)
    (served,) = client.models.list()
    assert (served.id, served.to_dict()["architecture"]) == ("nm", "llama")
    chunks = iter(client.completions.create(model="", prompt="Hello", max_tokens=100, stream=True))
    next(chunks)
    process.send_signal(signal.SIGTERM)
    assert list(chunks)[-1].choices[0].finish_reason is not None
    assert process.wait(timeout=30) == -signal.SIGTERM
    assert b"Traceback" not in process.stderr.read()
