"""What chooses tokens and what ends an answer, against what each option is said to do."""

import math

import mlx.core as mx
import numpy as np
import pytest

from mlxfuse.errors import MLXFuseError
from mlxfuse.generate.run import Settings, generate
from mlxfuse.generate.sampling import Sampling, StopTexts
from mlxfuse.loader import load
from mlxfuse.models.sampling import WHOLE_CONTEXT, recommended

from ..models import tiny


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    path = tiny.write(tmp_path_factory.mktemp("sampling") / "m.gguf", tiny.build("llama", 0))
    return load(path)


def processed(tokenizer, logits, tokens, **options):
    row = mx.array([logits])
    for processor in Sampling(**options).logits_processors(tokenizer):
        row = processor(mx.array(tokens), row)
    return np.array(row[0], dtype=np.float64)


def test_penalties_and_biases(pair):
    tokenizer = pair[1]
    logits = [2.0, -2.0, 3.0, -1.0, 0.5]
    assert processed(tokenizer, logits, [0, 1], repetition_penalty=1.0).tolist() == logits
    got = processed(tokenizer, logits, [0, 1], repetition_penalty=2.0)
    assert got.tolist() == [1.0, -4.0, 3.0, -1.0, 0.5]
    got = processed(tokenizer, logits, [0, 0, 1], presence_penalty=0.5)
    assert got.tolist() == [1.5, -2.5, 3.0, -1.0, 0.5]
    got = processed(tokenizer, logits, [0, 0, 1], frequency_penalty=0.5)
    assert got.tolist() == [1.0, -2.5, 3.0, -1.0, 0.5]
    options = {"frequency_penalty": 0.5, "presence_penalty": 1.0}
    got = processed(tokenizer, logits, [0, 2, 3], repetition_context_size=2, **options)
    assert got.tolist() == [2.0, -2.0, 1.5, -2.5, 0.5]
    assert (
        processed(tokenizer, logits, [0], repetition_context_size=0, **options).tolist() == logits
    )
    got = processed(tokenizer, logits, [0], logit_bias={1: 4.0, 4: -math.inf})
    assert got.tolist() == [2.0, 2.0, 3.0, -1.0, -math.inf]
    for token in (-1, tokenizer.vocab_size):
        with pytest.raises(MLXFuseError, match=rf"{token} is no token of this model"):
            Sampling(logit_bias={token: 1.0}).logits_processors(tokenizer)


def test_as_many_candidates_as_there_are_is_no_limit(pair):
    logits = mx.zeros((1, pair[1].vocab_size))
    for size in (pair[1].vocab_size, 10**6):
        Sampling(temp=1, top_k=size).sampler(pair[1])(logits)


@pytest.mark.parametrize(
    ("pieces", "stops", "want"),
    [
        (["ab", "cd"], (), "abcd"),
        (["ab", "cd"], ("bc",), "a"),
        (["ab", "a", "bx", "y"], ("abx",), "ab"),
        (["aab"], ("ab", "aa"), ""),
        (["a", "a", "b", "c"], ("aab",), ""),
        (["x", "a", "a"], ("aab",), "xaa"),
        (["one", "\n", "\n", "two"], ("\n\n",), "one"),
        (["ab"], ("",), "ab"),
    ],
)
def test_a_text_ends_before_the_first_stop_text(pieces, stops, want):
    stop = StopTexts(stops)
    got = ""
    for piece in pieces:
        got += stop.feed(piece)
        assert want.startswith(got)
        if stop.found:
            break
    else:
        got += stop.rest()
    assert got == want
    assert (stop.found is not None) == (want != "".join(pieces))


def test_an_answer_ends_before_a_stop_text(pair):
    plain = generate(*pair, Settings(prompt="Hello", ignore_chat_template=True, max_tokens=24))
    stop = plain.text[7:10]
    at = plain.text.index(stop)
    shown = []
    got = generate(
        *pair,
        Settings(prompt="Hello", ignore_chat_template=True, max_tokens=24, stop=(stop, "\0")),
        write=shown.append,
    )
    assert got.text == "".join(shown) == plain.text[:at]
    assert (got.finish_reason, got.end_token) == ("stop", None)
    assert got.tokens == plain.tokens[: len(got.tokens)]
    assert len(got.tokens) < len(plain.tokens)


def test_what_a_file_recommends():
    asked = {
        "general.sampling.temp": 0.6,
        "general.sampling.top_k": 20,
        "general.sampling.top_p": 0.95,
        "general.sampling.penalty_last_n": -1,
        "general.sampling.penalty_repeat": 1.1,
    }
    assert recommended(asked) == (
        {
            "temp": 0.6,
            "top_p": 0.95,
            "top_k": 20,
            "repetition_penalty": 1.1,
            "repetition_context_size": WHOLE_CONTEXT,
        },
        [],
    )
    assert recommended({}) == ({}, [])


@pytest.mark.parametrize(
    ("key", "value"),
    [("temp", math.nan), ("temp", -1.0), ("top_p", 1.5), ("top_k", 2.5), ("min_p", "x"),
     ("top_k", True), ("mirostat", 2)],
)  # fmt: skip
def test_a_recommendation_that_means_nothing_is_left_out_and_told(key, value):
    found, notes = recommended({f"general.sampling.{key}": value, "general.sampling.min_p": 0.1})
    assert found == {"min_p": 0.1}
    (note,) = notes if key != "min_p" else ["general.sampling.min_p"]
    assert f"general.sampling.{key}" in note


def test_the_footer_tells_what_was_chosen_and_by_whom():
    assert Sampling().describe() == "Sampling: greedy"
    assert Sampling(top_k=5, seed=1).describe() == "Sampling: greedy"
    some = Sampling(temp=0.6, top_k=20)
    assert some.describe({"top_k"}) == "Sampling: temp 0.6, top-k 20 (the file's)"
    assert some.chosen() == {"temp": 0.6, "top_k": 20}
    assert Sampling(repetition_penalty=1.1).describe() == "Sampling: greedy, repetition-penalty 1.1"


def test_xtc_leaves_ends_and_newlines_alone(pair):
    """It takes away the likely tokens but for the least likely of them."""
    tokenizer = pair[1]
    (newline,) = tokenizer.encode("\n", add_special_tokens=False)
    end, other, least = tokenizer.eos_token_id, newline + 1, newline + 2
    logits = np.full((200, tokenizer.vocab_size), -math.inf, np.float32)
    logits[:, [newline, end, other, least]] = np.log([0.25, 0.25, 0.3, 0.2])
    sampler = Sampling(temp=1, xtc_probability=1, xtc_threshold=0.15).sampler(tokenizer)
    free = Sampling(temp=1).sampler(tokenizer)  # control
    mx.random.seed(0)
    mx.disable_compile()  # compiling mlx-lm's functions takes seconds
    try:
        assert set(sampler(mx.array(logits)).tolist()) == {newline, end, least}
        assert set(free(mx.array(logits)).tolist()) == {newline, end, other, least}
    finally:
        mx.enable_compile()
