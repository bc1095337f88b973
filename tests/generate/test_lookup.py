"""Prompt look-up decoding: plain's tokens, in fewer forward passes where the text repeats."""

import random

import mlx.core as mx
import pytest

from mlxfuse.errors import MLXFuseError
from mlxfuse.generate.chat import Chat
from mlxfuse.generate.lookup import Index
from mlxfuse.generate.run import Settings, generate
from mlxfuse.loader import load

from ..models import tiny

WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "the",
    "lazy",
    "dog",
    "and",
    "runs",
    "away",
    "from",
    "the",
    "quick",
    "bear",
]


def model(folder, name):
    made = tiny.build(name, 0)
    made.metadata["tokenizer.chat_template"] = (
        "{% for m in messages %}{{ m.content }}\n{% endfor %}"
    )
    return load(tiny.write(folder / f"{name}.gguf", made))


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return model(tmp_path_factory.mktemp("lookup"), "llama")


def test_drafts_are_what_followed_before():
    index = Index([1, 2, 3, 4, 1, 2, 3])
    assert index.draft(2) == [4, 1]
    assert index.draft(9) == [4, 1, 2, 3]
    assert index.draft(0) == []
    index.add(5)
    assert index.draft(3) == []
    for token in (7, 1, 2):
        index.add(token)  # only two tokens are as they were: 3 followed, last before 5
    assert index.draft(2) == [3, 5]
    assert Index([1]).draft(3) == []


def counted(pair, monkeypatch):
    """Forward passes over the rows of a prompt of one chunk and after it."""
    calls = []
    kind = type(pair[0])
    call = kind.__call__

    def counting(self, *args, **kwargs):
        calls.append(args[0].shape[1])
        return call(self, *args, **kwargs)

    monkeypatch.setattr(kind, "__call__", counting)
    return calls


def settings(text, count, **more):
    return Settings(prompt=text, max_tokens=count, ignore_chat_template=True, **more)


@pytest.mark.parametrize("prompts", [60, pytest.param(200, marks=pytest.mark.slow)])
def test_tokens_are_plains(pair, prompts):
    rng = random.Random(0)
    accepted = 0
    for i in range(prompts):
        text = " ".join(rng.choices(WORDS, k=rng.randint(1, 12)))
        # With a bias the tiny model repeats itself now and then, as real ones do.
        more = {"logit_bias": {97: 8.0, 98: 8.0}} if i % 2 else {}
        plain = generate(*pair, settings(text, 10, **more))
        more |= {"prompt_lookup": True, "num_draft_tokens": 7}
        drafted = generate(*pair, settings(text, 10, **more))
        assert drafted.tokens == plain.tokens, text
        assert (drafted.finish_reason, drafted.text) == (plain.finish_reason, plain.text)
        assert (plain.accepted, drafted.generation_tokens) == (None, plain.generation_tokens)
        accepted += drafted.accepted
    assert accepted > prompts / 4  # control: drafts were taken at all


def test_fewer_forward_passes_on_text_that_repeats(pair, monkeypatch):
    """A bias makes the tiny model say the same over and over, as real ones do in lists and code."""
    text, bias = "abcabcabc", {97: 60.0}
    calls = counted(pair, monkeypatch)
    plain = generate(*pair, settings(text, 40, logit_bias=bias))
    passes = len(calls)
    calls.clear()
    options = {"prompt_lookup": True, "num_draft_tokens": 7}
    drafted = generate(*pair, settings(text, 40, logit_bias=bias, **options))
    assert drafted.tokens == plain.tokens
    assert len(calls) <= 0.6 * passes
    assert max(calls[2:]) <= 8
    assert drafted.accepted >= 16
    assert "tokens a forward pass" in drafted.footer()
    assert "forward pass" not in plain.footer()


LINE = (
    "- [ ] {}: check the pressure, check the oil, check the temperature, write the result down.\n"
)
FUNCTION = """def test_{0}(client):
    answer = client.get('/items/{0}')
    assert answer.status_code == 200
    assert answer.json()['name'] == '{0}'

"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "text",
    [
        "".join(map(LINE.format, ("Monday", "Tuesday", "Wednesday", "Thursday"))),
        "".join(map(FUNCTION.format, ("apple", "pear", "plum"))),
    ],
    ids=["list", "code"],
)
def test_the_demo_model_on_text_that_repeats(demo, text):
    """Measured: 0.25 forward passes a token for the list, 0.39 for the code."""
    drafted = generate(*load(demo), settings(text, 64, prompt_lookup=True, num_draft_tokens=7))
    assert drafted.generation_tokens == 64
    assert 64 - drafted.accepted <= 0.6 * 64


@pytest.mark.parametrize("count", [1, 2, 3, 9])
def test_the_last_token_is_where_it_is_without(pair, count):
    plain = generate(*pair, settings("abcabcabc", count, logit_bias={97: 60.0}))
    more = {"prompt_lookup": True, "num_draft_tokens": 7, "logit_bias": {97: 60.0}}
    assert generate(*pair, settings("abcabcabc", count, **more)).tokens == plain.tokens
    assert plain.finish_reason == "length"


def test_a_conversation_goes_on_from_its_cache(pair):
    options = {"max_tokens": 8, "repetition_penalty": 1.3}
    plain, drafted = (
        Chat(*pair, Settings(prompt_lookup=lookup, num_draft_tokens=7, **options))
        for lookup in (False, True)
    )
    for text in ("the quick brown fox", "the quick brown fox", "the lazy dog", "the quick"):
        assert drafted.say(text).tokens == plain.say(text).tokens, text


def test_sampling_is_from_the_same_distribution(pair):
    """With a seed of its own each; the first token's frequencies are those of the model."""
    text, n = "abcabcab", 60
    counts = []
    for lookup in (False, True):
        mx.random.seed(5)
        found = [
            generate(*pair, settings(text, 2, temp=0.5, top_k=2, prompt_lookup=lookup)).tokens[1]
            for _ in range(n)
        ]
        counts.append({token: found.count(token) for token in set(found)})
    for token in counts[0].keys() | counts[1].keys():
        a, b = (c.get(token, 0) / n for c in counts)
        assert abs(a - b) < 0.3, counts


def test_a_cache_that_takes_nothing_back_is_refused(tmp_path):
    pair = model(tmp_path, "qwen35")
    with pytest.raises(MLXFuseError, match="--prompt-lookup: its cache cannot take tokens back"):
        generate(*pair, settings("x", 4, prompt_lookup=True))


def test_a_sliding_window_stops_drafting_and_changes_nothing(tmp_path):
    pair = model(tmp_path, "gemma3")
    text = "abcabcabcabc"
    plain = generate(*pair, settings(text, 24))
    drafted = generate(*pair, settings(text, 24, prompt_lookup=True, num_draft_tokens=7))
    assert drafted.tokens == plain.tokens
