"""The engine: what a failure costs, what is cancelled, kept and forgotten."""

import http.client
import json
import threading
import time
from urllib.parse import urlsplit

import mlx.core as mx
import openai
import pytest

from mlxfuse.errors import MLXFuseError
from mlxfuse.generate.run import Settings, generate
from mlxfuse.generate.sampling import Sampling
from mlxfuse.loader import load
from mlxfuse.server import Server, sampling, scoring
from mlxfuse.server.engine import Engine
from mlxfuse.server.jobs import EngineError, Job, Limits
from mlxfuse.server.text import Echo, Piece, StreamedText, Token

from ..models import tiny
from .conftest import openai_client, serving
from .speaker import Speaker, tokenizer


class Collected:
    """What the engine delivers of one job."""

    def __init__(self, prompt, max_tokens=100, **more):
        self.events, self._done = [], threading.Event()
        self.job = Job(list(prompt), max_tokens, self._deliver, **more)

    def _deliver(self, event):
        self.events.append(event)
        if isinstance(event, Exception) or event.finish:
            self._done.set()

    def wait(self):
        assert self._done.wait(60)
        return self

    @property
    def text(self):
        return "".join(e.text for e in self.events if isinstance(e, Piece))


def run(engine, *collected):
    engine.submit(*(each.job for each in collected))
    return [each.wait() for each in collected]


@pytest.fixture
def tok():
    return tokenizer("ab", "cd")


def engine_of(model, tok, limits=None, **more):
    return Engine(model, tok, limits or Limits(), **more)


# --- failures --------------------------------------------------------------------------------


def test_a_failure_of_the_model_is_answered_and_the_engine_goes_on(tok):
    bad = []

    def fails(inputs):
        if bad and (inputs == 65).any().item():
            raise RuntimeError("out of memory")

    with serving(Speaker(tok, ["x", "ab"], fails=fails), tok) as server:
        client = openai_client(server)
        assert client.completions.create(model="", prompt="Hi").choices[0].text == "xab"
        bad.append(1)
        for _ in range(2):
            with pytest.raises(openai.InternalServerError, match="out of memory"):
                client.completions.create(model="", prompt="AB")
            assert client.completions.create(model="", prompt="Hi").choices[0].text == "xab"
        chunks = client.completions.create(model="", prompt="AB", stream=True)
        with pytest.raises(openai.APIError, match="out of memory"):
            list(chunks)


def test_where_the_model_is_dead_the_server_ends(tok):
    dead = []

    def fails(inputs):
        if dead:
            raise RuntimeError("the GPU is gone")

    server = Server(Speaker(tok, ["x"], fails=fails), tok, "tiny", Settings(), port=0)
    ended = []

    def serve():
        with pytest.raises(MLXFuseError, match="the GPU is gone"):
            server.serve()
        ended.append(1)

    thread = threading.Thread(target=serve)
    thread.start()
    client = openai_client(server)
    client.completions.create(model="", prompt="Hi")
    dead.append(1)
    with pytest.raises(openai.InternalServerError, match="the GPU is gone"):
        client.completions.create(model="", prompt="Hi")
    thread.join(timeout=60)
    assert ended == [1]


def test_a_processor_that_fails_ends_its_own_answer(tok):
    def broken(tokens, logits):
        raise ValueError("mine")

    engine = engine_of(Speaker(tok, ["x", "ab", "cd"]), tok)
    prompt = tok.encode("Hi")
    mine, other = run(engine, Collected(prompt, processors=[broken]), Collected(prompt))
    assert other.text == "xabcd"
    assert isinstance(mine.events[-1], ValueError)
    assert run(engine, Collected(prompt))[0].text == "xabcd"
    engine.close()


def test_what_waits_when_the_engine_closes_gets_an_error(tok):
    block = threading.Event()
    engine = engine_of(Speaker(tok, ["x"], fails=lambda _: block.wait(30)), tok)
    running = Collected(tok.encode("Hi"))
    engine.submit(running.job)
    closing = threading.Thread(target=engine.close)
    closing.start()
    block.set()
    closing.join()
    late = Collected(tok.encode("Hi"))
    engine.submit(late.job)
    for each in (running, late):
        assert isinstance(each.wait().events[-1], EngineError | Piece)
    assert isinstance(late.events[-1], EngineError)
    assert not engine.alive


# --- cancelling ------------------------------------------------------------------------------


def endless(tok, **more):
    """A model whose answers end with the context, after some seconds."""
    return Speaker(tok, ["x"], context=1 << 16, fails=lambda _: time.sleep(0.002), **more)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("draft", [False, True])
def test_a_client_that_hangs_up_is_generated_for_no_more(tok, stream, draft):
    dot = {str(ord(".")): 100}
    body = {"prompt": "Hi", "logit_bias": dot, "stream": stream, "max_tokens": 60_000}
    more = {"draft": Speaker(tok, ["x"])} if draft else {}
    with serving(endless(tok), tok, **more) as server:
        u = urlsplit(server.address)
        connection = http.client.HTTPConnection(u.hostname, u.port)
        connection.request("POST", "/v1/completions", json.dumps(body))
        answer = connection.getresponse() if stream else connection.sock
        until(lambda: server._engine.running == 1)
        answer.close()
        connection.close()
        until(lambda: server._engine.running == 0)
        got = openai_client(server).completions.create(model="", prompt="Hi", max_tokens=1)
        assert got.choices[0].text == "x"


def until(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


# --- the prompt cache ------------------------------------------------------------------------


def test_a_model_whose_state_cannot_be_cut_reads_on_from_a_message(tok):
    read = []
    model = Speaker(
        tok, ["x", "ab"], state=True, context=4096, fails=lambda t: read.append(t.shape[1])
    )
    with serving(model, tok) as server:
        client = openai_client(server)
        first = [{"role": "system", "content": "s" * 200}, {"role": "user", "content": "u" * 200}]

        def ask(messages):
            read.clear()
            got = client.chat.completions.create(model="", messages=messages)
            assert got.choices[0].message.content == "xab"
            return got.usage.prompt_tokens_details.cached_tokens, sum(n for n in read if n > 1)

        assert ask(first)[0] == 0
        # An answer that was thought of, and is sent back otherwise than it was generated.
        grown = [*first, {"role": "assistant", "content": "other"},
                 {"role": "user", "content": "and?"}]  # fmt: skip
        cached, fresh = ask(grown)
        assert cached > 400
        assert fresh < 60
        # Another conversation under the same system prompt.
        cached, fresh = ask([first[0], {"role": "user", "content": "v" * 50}])
        assert 200 < cached < 300
        assert fresh < 100


def test_the_cache_has_a_limit_in_bytes(tok):
    limits = Limits(prompt_caches=1000, prompt_cache_bytes=20_000)
    engine = engine_of(Speaker(tok, ["x"], context=4096), tok, limits)
    for n in range(40):
        (got,) = run(engine, Collected([n % 250 + 1] * 500))
        assert got.text == "x"
        assert engine._cache.nbytes <= 20_000
    assert 1 <= len(engine._cache) < 40
    mx.clear_cache()
    held = mx.get_active_memory()
    for n in range(60):
        run(engine, Collected([n % 250 + 1] * 500))
    mx.clear_cache()
    assert mx.get_active_memory() - held < 20_000
    engine.close()


def test_a_prompt_that_was_read_whole_is_hardly_read_again(tok):
    engine = engine_of(Speaker(tok, ["x", "ab"]), tok)
    prompt = tok.encode("a prompt")
    (first,) = run(engine, Collected(prompt))
    tokens = [*prompt, *tok.encode("xab")]
    (second,) = run(engine, Collected(tokens))
    assert second.events[-1].cached >= len(tokens) - 2
    assert first.text == "xab"
    engine.close()


# --- what is generated -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def random_model(tmp_path_factory):
    path = tiny.write(tmp_path_factory.mktemp("models") / "m.gguf", tiny.build("llama", 0))
    return load(path)


SAMPLING = Sampling(temp=1.0, top_p=0.95, top_k=50, min_p=0.01, xtc_probability=0.5)


def test_a_seed_decides_whatever_runs_beside_it(random_model):
    model, tok = random_model
    engine = engine_of(model, tok)
    prompts = [tok.encode(text) for text in ("Hello", "Good morning, ", "x")]

    def texts(*seeds, together):
        made = [Collected(p, 20, sampling=SAMPLING, seed=s) for p, s in zip(prompts, seeds)]  # noqa: B905
        if together:
            return [c.text for c in run(engine, *made)]
        return [run(engine, c)[0].text for c in made]

    want = texts(7, 2**64 - 1, 7, together=False)
    assert texts(7, 2**64 - 1, 7, together=True) == want
    assert texts(7, 2**64 - 1, 7, together=False) == want
    assert texts(8, 1, 9, together=True) != want  # control
    engine.close()


def test_xtc_leaves_ends_and_newlines_alone(tok, monkeypatch):
    seen = []
    monkeypatch.setattr(sampling, "apply_xtc", lambda x, *given: seen.append(given) or x)
    engine = engine_of(Speaker(tok, ["a"]), tok)
    asked = Sampling(temp=1e-3, xtc_probability=1.0, xtc_threshold=0.25)
    assert run(engine, Collected(tok.encode("x"), 3, sampling=asked))[0].text == "a"
    engine.close()
    (newline,) = tok.encode("\n", add_special_tokens=False)
    assert {tuple(given) for *_, given in seen} == {(newline, *sorted(tok.eos_token_ids))}
    assert {given[:2] for given in seen} == {(1.0, 0.25)}


def test_without_a_seed_answers_differ(random_model):
    model, tok = random_model
    engine = engine_of(model, tok)
    made = [Collected(tok.encode("Hello"), 20, sampling=SAMPLING) for _ in range(6)]
    assert len({c.text for c in run(engine, *made)}) == 6
    engine.close()


@pytest.mark.parametrize("draft", [False, True])
def test_answers_are_those_of_generate(random_model, draft):
    """In a batch, and one by one with a draft model, which is the model or another."""
    model, tok = random_model
    texts = ["Hello", "Good morning, ", "Once upon a time"]
    settings = [Settings(prompt=t, max_tokens=24, ignore_chat_template=True) for t in texts]
    want = [generate(model, tok, each).text for each in settings]
    for drafting in [model, load_other(tok)] if draft else [None]:
        engine = engine_of(model, tok, draft=drafting)
        for _ in range(2):  # and again, from the prompt cache
            got = run(engine, *(Collected(tok.encode(t), 24) for t in texts))
            assert [c.text for c in got] == want
        engine.close()


@pytest.mark.parametrize("draft", [False, True])
def test_a_prompts_tokens_cost_what_the_model_says(random_model, draft, monkeypatch):
    """Beside other answers; in steps of 7 tokens, and then the answer goes on as ever."""
    model, tok = random_model
    prompt = tok.encode("The quick brown fox jumps")
    logits = model(mx.array([prompt]))[0]
    logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    want = [logprobs[i, token].item() for i, token in enumerate(prompt[1:])]
    best = mx.argsort(-logprobs, axis=-1)[:, :3].tolist()
    monkeypatch.setattr(scoring, "_LOGITS", 7 * logits.shape[-1])
    engine = engine_of(model, tok, draft=model if draft else None)
    echo = Echo("?", tuple(range(len(prompt))))
    scored, plain = run(engine, Collected(prompt, 8, top=3, echo=echo), Collected(prompt, 8))
    assert scored.text == "?" + plain.text
    tokens = [t for e in scored.events for t in e.tokens][: len(prompt)]
    assert [t.id for t in tokens] == prompt
    assert [t.at for t in tokens] == list(range(len(prompt)))
    assert tokens[0].logprob is None
    assert [t.logprob for t in tokens[1:]] == pytest.approx(want, abs=1e-4)
    assert [[i for i, _ in t.top] for t in tokens[1:]] == best[:-1]
    assert scored.events[-1].cached == 0
    engine.close()


def test_a_prompt_whose_scoring_is_cancelled_or_fails_is_forgotten(tok):
    bad = []

    def fails(inputs):
        time.sleep(0.01)
        if bad and inputs.shape[1] > 1:
            raise RuntimeError("out of memory")

    engine = engine_of(Speaker(tok, ["x"], fails=fails), tok)
    echo, prompt = Echo("?", (0,) * 200), [72] * 200
    gone = Collected(prompt, top=1, echo=echo)
    gone.job.cancelled = True
    engine.submit(gone.job)
    dropped = Collected(prompt, top=1, echo=echo)
    engine.submit(dropped.job)
    until(lambda: engine._scoring)
    dropped.job.cancelled = True
    until(lambda: engine.running == 0)
    assert not engine._scoring
    bad.append(1)
    (failed,) = run(engine, Collected(prompt, top=1, echo=echo))
    assert isinstance(failed.events[-1], EngineError)
    assert not engine._scoring
    bad.clear()
    assert run(engine, Collected(prompt, top=1, echo=echo))[0].text == "?x"
    engine.close()


def load_other(tok):
    return Speaker(tok, ["A"], end=tok.eos_token)


def test_stop_strings_end_the_generation_itself(tok):
    calls = []
    model = Speaker(tok, ["x", "ab", "cd", "y", "z"], fails=lambda t: calls.append(t.shape))
    engine = engine_of(model, tok)
    (got,) = run(engine, Collected(tok.encode("Hi"), stops=["bc"]))
    assert got.text == "xa"
    assert got.events[-1].stopped_by == "bc"
    assert got.events[-1].count == 3
    assert engine.running == 0
    engine.close()


def test_tokens_come_with_the_text_they_begin_in(tok):
    text = StreamedText(tok.detokenizer, ["bq"])
    ids = [tok.convert_tokens_to_ids(t) for t in ("x", "ab", "cd")]
    assert text.add(Token(ids[0]), None) == ("x", (Token(ids[0]),), None)
    # "a" is given, and its token with it; "b" may begin a stop string.
    assert text.add(Token(ids[1]), None) == ("a", (Token(ids[1], 1),), None)
    assert text.add(Token(ids[2]), "length") == ("bcd", (Token(ids[2], 3),), None)


def test_half_a_character_waits_for_the_other(tok):
    text = StreamedText(tok.detokenizer, [])
    first, second = "é".encode()
    assert text.add(Token(first), None)[0] == ""
    assert text.add(Token(second), None)[0] == "é"
    assert text.add(Token(first), "length")[0] == "\ufffd"


def test_kv_caches_need_no_boundaries(tok):
    engine = engine_of(Speaker(tok, ["x"]), tok)
    assert not engine.needs_boundaries
    engine.close()
    engine = engine_of(Speaker(tok, ["x"], state=True), tok)
    assert engine.needs_boundaries
    engine.close()
