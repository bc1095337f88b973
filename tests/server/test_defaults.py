"""What the command line says holds for requests that do not say otherwise."""

from types import SimpleNamespace

import mlx.core as mx
import pytest
from typer.testing import CliRunner

from mlxfuse.cli import app
from mlxfuse.errors import MLXFuseError
from mlxfuse.generate.run import Settings
from mlxfuse.loader import load
from mlxfuse.server.app import Server
from mlxfuse.server.prompts import Planner
from mlxfuse.server.requests import ChatRequest, CompletionRequest, parse
from mlxfuse.tokenizer.load import build_tokenizer

from ..models import tiny
from ..tokenizer import vocabularies


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return load(tiny.write(tmp_path_factory.mktemp("defaults") / "m.gguf", tiny.build("llama", 0)))


def job_of(pair, settings, **request):
    plan = Planner(*pair, settings, False).completion(CompletionRequest(prompt="abc", **request))
    return plan.make(0, lambda *_: None)


def processed(job):
    logits = mx.zeros((1, 259)) + 1.0
    tokens = mx.array(job.prompt)
    for processor in job.processors:
        logits = processor(tokens, logits)
    return logits[0].tolist()


def test_the_servers_options_are_the_defaults(pair):
    settings = Settings(
        temp=0.5,
        top_k=7,
        xtc_probability=0.2,
        repetition_penalty=2.0,
        logit_bias={9: 3.0},
        stop=("\n",),
        seed=5,
    )
    job = job_of(pair, settings)
    assert (job.sampling.temp, job.sampling.top_k, job.sampling.xtc_probability) == (0.5, 7, 0.2)
    assert (list(job.stops), job.seed) == (["\n"], 5)
    found = processed(job)
    assert found[9] == 4.0
    assert found[job.prompt[-1]] == 0.5
    own = job_of(
        pair,
        settings,
        temperature=1.0,
        xtc_probability=0,
        repetition_penalty=1,
        logit_bias={},
        stop=[],
        seed=-1,
    )
    assert (own.sampling.temp, own.sampling.xtc_probability) == (1.0, 0.0)
    assert (list(own.stops), own.seed) == ([], None)
    assert processed(own) == [1.0] * 259
    assert processed(job_of(pair, Settings())) == [1.0] * 259


def test_a_bias_of_no_token_is_refused_before_any_request(pair):
    with pytest.raises(MLXFuseError, match="999999 is no token"):
        Server(*pair, "m", Settings(logit_bias={999999: 1.0}), port=0)


@pytest.mark.parametrize("kind", ["text", "file"])
def test_another_chat_template(tmp_path, monkeypatch, kind):
    """It is rendered, and tells how tools are called."""
    template = "{% for m in messages %}<{{ m.content }}>{% endfor %}"
    template += "{# <tool_call> tool_call.name #}"
    made = tiny.write(tmp_path / "m.gguf", tiny.build("llama", 0))
    seen = []

    class Stopped:
        def __init__(self, model, tokenizer, *_, listener, **more):
            listener.close()
            seen.append(tokenizer)
            raise MLXFuseError("seen")

    monkeypatch.setattr("mlxfuse.server.app.Server", Stopped)
    given = template
    if kind == "file":
        given = tmp_path / "template.jinja"
        given.write_text(template)
    result = CliRunner().invoke(
        app, ["server", str(made), "--port", "0", "--chat-template", str(given)]
    )
    assert "seen" in result.output
    (tokenizer,) = seen
    hi = [{"role": "user", "content": "Hi"}]
    assert tokenizer.apply_chat_template(hi, tokenize=False) == "<Hi>"
    assert tokenizer.tool_call_start == "<tool_call>"


def test_what_is_no_chat_template_is_refused(tmp_path):
    made = tiny.write(tmp_path / "m.gguf", tiny.build("llama", 0))
    result = CliRunner().invoke(app, ["server", str(made), "--chat-template", "no-such-file"])
    assert result.exit_code == 2
    assert "'no-such-file' is no template, and no file" in " ".join(result.output.split())


def test_a_templates_bos_is_the_only_one():
    metadata = {**vocabularies.bpe("llama-bpe"), "tokenizer.ggml.add_bos_token": True}
    template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer = build_tokenizer({**metadata, "tokenizer.chat_template": template}, "test.gguf")
    text = tokenizer.encode("hello hello", add_special_tokens=False)
    want = [tokenizer.bos_token_id, *text]
    planner = Planner(SimpleNamespace(), tokenizer, Settings(), True)
    said = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": " hello"}]
    chat = parse(ChatRequest, {"messages": [*said, {"role": "user", "content": "!"}]})
    (ids,) = planner.chat(chat).prompts
    assert ids[: len(want)] == want
    assert planner.completion(CompletionRequest(prompt="hello hello")).prompts == [want]
    # Where the messages end in the prompt is found with the same tokens.
    # The whole prompt, too, but for the token that is read last.
    plan = planner.chat(parse(ChatRequest, {"messages": said}))
    first = 1 + len(tokenizer.encode("hello", add_special_tokens=False))
    last = len(plan.prompts[0]) - 1
    assert plan.make(0, print).boundaries == {first: "user", last: "user"}
