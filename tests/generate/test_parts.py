"""Reasoning and answer told apart, and what a conversation keeps of them."""

from types import SimpleNamespace

import pytest

from mlxfuse.generate import run as engine
from mlxfuse.generate.chat import Chat
from mlxfuse.generate.parts import CONTENT, REASONING, Parts
from mlxfuse.generate.run import Settings
from mlxfuse.tokenizer.load import build_tokenizer

from ..cli.test_cli import TEMPLATE, invoke
from ..models import tiny
from ..tokenizer import vocabularies

HARMONY = ("<|return|>", "<|call|>", "<|end|>", "<|channel|>", "<|message|>", "<|start|>")
CHANNELS = (
    "{% for m in messages %}{% if '<|channel|>' in m.content %}"
    "{{ raise_exception('channels in the content') }}{% endif %}"
    "<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endfor %}<|start|>assistant"
)


def tokenizer_of(template, control=()):
    metadata = vocabularies.bpe("gpt-4o", control=control)
    return build_tokenizer({**metadata, "tokenizer.chat_template": template}, "test.gguf")


THINKING = tokenizer_of("{{ messages[0].content }}<|im_start|>")
HARMONIC = tokenizer_of(CHANNELS, HARMONY)


@pytest.mark.parametrize("step", [1, 3, 1000])
@pytest.mark.parametrize(
    ("tokenizer", "opening", "text", "reasoning", "content"),
    [
        (THINKING, "", "<think>\nhm\n</think>\n\nyes\n", "hm\n", "yes\n"),
        (THINKING, "<think>\n", "hm\n</think>\n\nyes", "hm\n", "yes"),
        (THINKING, "is <think> a word?<|im_start|>", " yes", "", " yes"),
        (THINKING, "", "<think>\n\n</think>\n\nyes", "", "yes"),
        (THINKING, "", "a < b, a <thin", "", "a < b, a <thin"),
        (THINKING, "", "<think>cut", "cut", ""),
        (
            HARMONIC,
            "",
            "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>yes",
            "hm",
            "yes",
        ),
        (HARMONIC, "", "<|channel|>final<|message|>yes", "", "yes"),
        (HARMONIC, "", "<|channel|>analysis<|message|>a<|end|><|start|>nothing", "a", "nothing"),
        (HARMONIC, "", "just text", "", "just text"),
    ],
)
def test_parts(tokenizer, opening, text, reasoning, content, step):
    parts = Parts(tokenizer, opening)
    found = []
    for i in range(0, len(text), step):
        found += parts.feed(text[i : i + step])
    found += parts.rest()
    assert "".join(t for kind, t in found if kind == REASONING) == reasoning
    assert "".join(t for kind, t in found if kind == CONTENT) == content


def test_an_answer_that_the_user_began_is_no_header():
    parts = Parts(HARMONIC, "The", begun=True)
    assert parts.feed(" answer") == [(CONTENT, " answer")]
    assert Parts(THINKING, "<think>", begun=True).feed("hm") == [(REASONING, "hm")]


def says(text):
    """In place of mlx-lm's ``stream_generate``: ``text``, letter by letter."""

    def stream(model, tokenizer, prompt, **options):
        for i, letter in enumerate(text):
            end = "length" if i == len(text) - 1 else None
            numbers = dict.fromkeys(("prompt_tps", "generation_tps", "peak_memory"), 0.0)
            counts = {"prompt_tokens": len(prompt), "generation_tokens": i + 1}
            given = {"text": letter, "token": 0, "finish_reason": end, "from_draft": False}
            yield SimpleNamespace(**given, **numbers, **counts)

    return stream


ANSWERS = {
    "channels": (
        HARMONIC,
        "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>yes",
    ),
    "think": (THINKING, "<think>\nhm\n</think>\n\nyes"),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_reasoning_is_no_part_of_the_answer_in_a_conversation(name, monkeypatch):
    tokenizer, text = ANSWERS[name]
    monkeypatch.setattr(engine, "stream_generate", says(text))
    model = SimpleNamespace(layers=[], make_cache=lambda: [])
    chat = Chat(model, tokenizer, Settings())
    written, thought = [], []
    for _ in range(2):  # the template of gpt-oss refuses a second turn with channels in it
        result = chat.say("hi", write=written.append, think=thought.append)
        assert (result.text, result.reasoning) == ("yes", "hm")
    assert "".join(written) == "yesyes"
    assert "".join(thought).split() == ["hm", "hm"] if name == "think" else ["hmhm"]
    assert chat.messages[1] == {"role": "assistant", "content": "yes", "reasoning_content": "hm"}


def test_text_without_a_template_is_whole(monkeypatch):
    tokenizer, text = ANSWERS["think"]
    monkeypatch.setattr(engine, "stream_generate", says(text))
    model = SimpleNamespace(layers=[], make_cache=lambda: [])
    result = engine.generate(model, tokenizer, Settings(ignore_chat_template=True))
    assert (result.text, result.reasoning) == (text, "")


@pytest.mark.parametrize(("more", "shown"), [((), True), (("-q",), False)])
def test_the_command_gives_the_answer_on_stdout(more, shown, tmp_path, monkeypatch):
    gguf = tiny.build("llama", 0)
    gguf.metadata["tokenizer.chat_template"] = TEMPLATE
    path = tiny.write(tmp_path / "m.gguf", gguf)
    monkeypatch.setattr(engine, "stream_generate", says("<think>hm</think>yes"))
    monkeypatch.setattr(engine, "_parts", lambda *_: Parts(THINKING, ""))
    result = invoke("generate", path, "-p", "x", *more)
    assert result.exit_code == 0, result.output
    assert result.stdout == "yes\n"
    assert ("hm\n\n" in result.stderr) is shown


@pytest.mark.parametrize("after_cache", [False, True])
def test_a_templates_bos_is_the_only_one(after_cache):
    metadata = {**vocabularies.bpe("llama-bpe"), "tokenizer.ggml.add_bos_token": True}
    template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer = build_tokenizer({**metadata, "tokenizer.chat_template": template}, "test.gguf")
    bos = tokenizer.bos_token_id
    text = tokenizer.encode("hello", add_special_tokens=False)
    assert tokenizer.encode("hello") == [bos, *text]
    settings = Settings(prompt="hello")
    want = text if after_cache else [bos, *text]
    assert engine.encode_prompt(tokenizer, settings, after_cache=after_cache) == want
    raw = Settings(prompt="hello", ignore_chat_template=True)
    assert engine.encode_prompt(tokenizer, raw) == [bos, *text]
    model = SimpleNamespace(layers=[], make_cache=lambda: [])
    for given in (settings, raw):
        chat = Chat(model, tokenizer, given)
        assert chat._encode([{"role": "user", "content": "hello"}]) == [bos, *text]
