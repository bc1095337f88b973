"""Reasoning and answer told apart, and what a conversation keeps of them."""

from types import SimpleNamespace

import pytest
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlxfuse.generate import run as engine
from mlxfuse.generate.chat import Chat
from mlxfuse.generate.parts import CONTENT, REASONING, Parts
from mlxfuse.generate.run import Settings
from mlxfuse.tokenizer.answer_format import complete
from mlxfuse.tokenizer.load import build_tokenizer

from ..cli.test_cli import TEMPLATE, invoke
from ..models import tiny
from ..server import speaker
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


# Marks of reasoning that mlx-lm has no table for, and what stands around an answer.
MARKS = {
    "magistral": ("[THINK]", "[/THINK]"),
    "seed-oss": ("<seed:think>", "</seed:think>"),
    "minimax-m3": ("<mm:think>", "</mm:think>"),
    "command-a": (
        "<|START_THINKING|>", "<|END_THINKING|>", "<|START_RESPONSE|>", "<|END_RESPONSE|>",
    ),
    "apertus": ("<|inner_prefix|>", "<|inner_suffix|>"),
}  # fmt: skip


@pytest.mark.parametrize("step", [1, 1000])
@pytest.mark.parametrize("model", MARKS)
def test_marks_of_reasoning(model, step):
    start, end, *around = MARKS[model]
    marked = speaker.tokenizer(controls=MARKS[model])
    assert marked.think_start_tokens == (marked.convert_tokens_to_ids(start),)
    assert marked.think_end_tokens == (marked.convert_tokens_to_ids(end),)
    # Of a vocabulary that has the first mark only, the marks are text.
    plain = speaker.tokenizer(controls=MARKS[model][:1])
    assert not plain.has_thinking
    answer = "yes".join(around) or "yes"
    for tokenizer, opening, text, want in [
        (marked, "", f"{start}\nhm\n{end}\n\n{answer}", ("hm\n", "yes")),
        (marked, f"x{start}\n", f"hm{end}{answer}", ("hm", "yes")),
        (plain, "", f"{start}hm{end}yes", ("", f"{start}hm{end}yes")),
    ]:
        assert split(Parts(tokenizer, opening), text, step) == want


def test_what_mlx_lm_knows_is_left_as_it_is():
    both = speaker.tokenizer(controls=("[THINK]", "[/THINK]", "<think>", "</think>"))
    assert (both.think_start, both.think_end) == ("<think>", "</think>")


def test_a_checkpoint_knows_the_same_marks():
    """Its tokenizer is wrapped by mlx-lm."""
    for made, (start, transitions) in [
        (speaker.tokenizer(controls=MARKS["magistral"]), ("[THINK]", {})),
        (HARMONIC, ("<think>", HARMONIC.response_transitions)),
    ]:
        loaded = TokenizerWrapper(made._tokenizer)
        assert loaded.think_start != "[THINK]"
        assert loaded.response_transitions == {}
        complete(loaded)
        assert (loaded.think_start, loaded.response_transitions) == (start, transitions)
        assert loaded.tool_parser is made.tool_parser
        assert loaded.tool_call_end == made.tool_call_end


def split(parts, text, step):
    """(reasoning, content) of a text that comes ``step`` characters at a time."""
    found = []
    for i in range(0, len(text), step):
        found += parts.feed(text[i : i + step])
    found += parts.rest()
    return tuple("".join(t for kind, t in found if kind == k) for k in (REASONING, CONTENT))


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
    assert split(Parts(tokenizer, opening), text, step) == (reasoning, content)


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
