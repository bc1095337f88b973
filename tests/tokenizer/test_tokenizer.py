"""The tokenizer against llama.cpp's tokens (golden_tokens.json), and every way it can be malformed.

make_golden_tokens.py writes the golden file and compares on as many random texts as one likes.
"""

from __future__ import annotations

import itertools
import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlxfuse.errors import GGUFError, UnsupportedError
from mlxfuse.gguf.reader import open_gguf
from mlxfuse.tokenizer import backend as tokenizer_module
from mlxfuse.tokenizer.load import build_backend, build_tokenizer, load_tokenizer
from mlxfuse.tokenizer.pretokenizers import PRE
from mlxfuse.tokenizer.vocab import read_vocab

from . import vocabularies

GOLDEN = json.loads(Path(__file__).with_name("golden_tokens.json").read_text())
FAMILIES = vocabularies.families(PRE)


def golden(name: str) -> list[list[int]]:
    rows = GOLDEN["families"][name]["rows"]
    return [choices[row] for choices, row in zip(GOLDEN["tokens"], rows, strict=True)]


def wrong(metadata: dict[str, Any], name: str) -> int:
    """How many texts get other tokens than llama.cpp's for the family ``name``."""
    tokenizer = build_tokenizer(metadata, "test.gguf")
    expected = golden(name)
    return sum(tokenizer.encode(t) != e for t, e in zip(GOLDEN["texts"], expected, strict=True))


@pytest.mark.parametrize("name", FAMILIES)
def test_tokens_are_llama_cpps(name: str) -> None:
    tokenizer = build_tokenizer(FAMILIES[name], "test.gguf")
    for text, expected in zip(GOLDEN["texts"], golden(name), strict=True):
        assert tokenizer.encode(text) == expected, text
    assert sorted(tokenizer.eos_token_ids) == GOLDEN["families"][name]["eog"]


def test_the_demo_models_tokens_are_llama_cpps(demo: Path) -> None:
    with open_gguf(demo) as file:
        tokenizer = load_tokenizer(file)
    for text, expected in zip(GOLDEN["texts"], golden("demo model"), strict=True):
        assert tokenizer.encode(text) == expected, text
        if "<" not in text:
            assert tokenizer.decode(expected) == text
    assert sorted(tokenizer.eos_token_ids) == GOLDEN["families"]["demo model"]["eog"]


def test_golden_covers_every_pre_and_tells_them_apart() -> None:
    # A wrong pattern in the table would show: no two different entries have the same tokens.
    assert set(GOLDEN["families"]) == {*FAMILIES, "demo model"}
    distinct = {pre: name for name, pre in PRE.items() if name != "gemma4"}
    for (_, first), (_, second) in itertools.combinations(distinct.items(), 2):
        assert golden(f"bpe {first}") != golden(f"bpe {second}"), (first, second)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("bpe qwen2", {"pre": "llama-bpe"}),
        ("bpe smollm", {"pre": "gpt-2"}),
        ("bpe deepseek-llm", {"pre": "deepseek-coder"}),
        ("bpe kimi-k2", {"pre": "gpt-4o"}),
        ("bpe glm5", {"pre": "chatglm-bpe"}),
        ("bpe youtu", {"pre": "tiny_aya"}),
        ("bpe cohere2moe", {"pre": "gpt-4o"}),
        ("bpe afmoe", {"pre": "deepseek-v3"}),
        ("bpe spark2_5", {"pre": "deepseek-v3"}),
        ("bpe exaone-moe", {"pre": "qwen35"}),
        ("bpe laguna", {"pre": "qwen2"}),
        ("bpe superbpe", {"pre": "default"}),
        ("bpe tekken", {"add_bos_token": False}),
        ("spm", {"add_space_prefix": False}),
        ("spm", {"add_bos_token": False}),
        ("spm phi-3", {}),
    ],
)
def test_control_wrong_metadata_shows(name: str, change: dict[str, Any]) -> None:
    changes = {f"tokenizer.ggml.{key}": value for key, value in change.items()}
    assert wrong({**FAMILIES[name], **changes, "general.name": "other"}, name) > 0


@pytest.mark.parametrize("pre", ["afmoe", "superbpe"])
def test_a_long_number_is_split_in_threes_from_the_right(pre: str) -> None:
    # A pattern that looked to the end of the number from each of its digits would take minutes.
    split = build_backend(read_vocab(vocabularies.bpe(pre), "test.gguf")).pre_tokenizer
    pieces = [piece for piece, _ in split.pre_tokenize_str("7" * 200_000)]
    assert pieces == ["77"] + ["777"] * 66_666


def test_control_missing_byte_fallback_shows() -> None:
    metadata = dict(FAMILIES["spm"])
    tokens = [re.sub("^<0x", "<byte", token) for token in metadata["tokenizer.ggml.tokens"]]
    assert wrong({**metadata, "tokenizer.ggml.tokens": tokens}, "spm") > 10


def test_control_merges_cannot_express_equal_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "spm of equal scores"
    assert wrong(FAMILIES[name], name) == 0
    monkeypatch.setattr(tokenizer_module, "needs_scores", lambda vocab: False)
    assert wrong(FAMILIES[name], name) > 0


@pytest.mark.parametrize("name", ["bpe, cut down", "gemma4, cut down"])
def test_control_merges_beyond_the_tokens_show(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    metadata = dict(FAMILIES[name])
    tokens = set(metadata["tokenizer.ggml.tokens"])
    merges = [m.split(" ") for m in metadata["tokenizer.ggml.merges"]]
    known = [" ".join(m) for m in merges if len(m) == 2 and tokens >= {*m, "".join(m)}]
    assert 100 < len(known) < len(merges) - 100
    assert wrong({**metadata, "tokenizer.ggml.merges": known}, name) > 10


@pytest.mark.parametrize("key", ["bos", "padding"])
def test_special_ids_that_name_ordinary_tokens(key: str) -> None:
    tokenizer = build_tokenizer(FAMILIES[f"bpe, {key} is a letter"], "test.gguf")
    name = {"padding": "pad"}.get(key, key) + "_token"
    letter = FAMILIES["bpe qwen2"]["tokenizer.ggml.tokens"].index("e")
    assert getattr(tokenizer, name) == tokenizer.special_tokens_map[name] == "e"
    assert getattr(tokenizer, f"{name}_id") == letter
    assert tokenizer.decode([letter], skip_special_tokens=True) == "e"
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}],
        chat_template=f"{{{{ {name} }}}}:{{{{ messages[0].content }}}}",
        tokenize=False,
    )
    assert text == "e:hi"


@pytest.mark.parametrize(
    "name", ["bpe qwen2", "bpe tekken", "spm", "spm without prefix", "spm of equal scores"]
)
def test_streamed_text_is_the_text(name: str) -> None:
    tokenizer = build_tokenizer(FAMILIES[name], "test.gguf")
    for text in GOLDEN["texts"]:
        if name.startswith("spm") and re.search(r"[<>]", text):
            continue  # each piece of text after a special token gets a space of its own
        ids = tokenizer.encode(text, add_special_tokens=False)
        detokenizer = tokenizer.detokenizer
        segments = []
        for token in ids:
            detokenizer.add_token(token)
            assert "\ufffd" not in detokenizer.text.replace("\ufffd" * text.count("\ufffd"), "")
            segments.append(detokenizer.last_segment)
        detokenizer.finalize()
        segments.append(detokenizer.last_segment)
        assert detokenizer.text == "".join(segments) == text
        assert detokenizer.tokens == ids
        assert tokenizer.decode(ids) == text


def test_detokenizers_of_one_wrapper_do_not_share_state() -> None:
    tokenizer = build_tokenizer(FAMILIES["bpe qwen2"], "test.gguf")
    first, second = tokenizer.detokenizer, tokenizer.detokenizer
    emoji = tokenizer.encode("😀")
    first.add_token(emoji[0])
    second.add_token(tokenizer.encode("a")[0])
    assert (first.text, second.text) == ("", "a")
    for token in emoji[1:]:
        first.add_token(token)
    assert first.text == "😀"


def test_decoding_cut_characters_padding_and_special_tokens() -> None:
    tokenizer = build_tokenizer(FAMILIES["bpe qwen2"], "test.gguf")
    emoji = tokenizer.encode("😀")
    assert tokenizer.decode(emoji[:1]) == "\ufffd"
    assert tokenizer.decode([*emoji, len(tokenizer), 10**9]) == "😀"
    ids = tokenizer.encode("<think>hi<|im_end|>")
    assert tokenizer.decode(ids) == "<think>hi<|im_end|>"
    assert tokenizer.decode(ids, skip_special_tokens=True) == "<think>hi"
    assert tokenizer.batch_decode([ids, emoji]) == ["<think>hi<|im_end|>", "😀"]


@pytest.mark.parametrize("name", ["bpe qwen2", "spm", "gemma4"])
def test_surrogates_are_joined_or_replaced(name: str) -> None:
    tokenizer = build_tokenizer(FAMILIES[name], "test.gguf")
    assert tokenizer.encode("a\ud83d\ude00b") == tokenizer.encode("a😀b")
    assert tokenizer.encode("a\ud83db\ude00") == tokenizer.encode("a\ufffdb\ufffd")
    both = tokenizer._tokenizer(["x\ud83d", "y"])["input_ids"]
    assert both == [tokenizer.encode("x\ufffd"), tokenizer.encode("y")]


def test_special_ids_vocabulary_and_load() -> None:
    class File:
        path = Path("test.gguf")
        metadata = FAMILIES["spm"]

    tokenizer = load_tokenizer(File())
    tokens = File.metadata["tokenizer.ggml.tokens"]
    assert len(tokenizer) == len(tokens) == tokenizer.vocab_size
    assert tokenizer.get_vocab() == {token: i for i, token in enumerate(tokens)}
    assert (tokenizer.bos_token, tokenizer.bos_token_id) == ("<s>", 1)
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("</s>", 2)
    assert tokenizer.encode("", add_special_tokens=True) == [1]
    assert tokenizer.encode("", add_special_tokens=False) == []
    assert tokenizer.convert_ids_to_tokens([1, 2]) == ["<s>", "</s>"]


def test_a_gpt2_vocabulary_without_ids_has_none() -> None:
    metadata = {k: v for k, v in vocabularies.bpe("gpt-2").items() if not k.endswith("token_id")}
    tokenizer = build_tokenizer(metadata, "test.gguf")
    assert (tokenizer.bos_token, tokenizer.eos_token) == (None, None)
    names = [tokenizer.convert_ids_to_tokens(i) for i in sorted(tokenizer.eos_token_ids)]
    assert names == ["<|endoftext|>", "<|im_end|>"]


@pytest.mark.parametrize("family", ["bpe qwen2", "spm"])
@pytest.mark.parametrize("beyond", [0, 10**6, 2**32 - 1])
def test_an_id_outside_the_vocabulary_is_no_id(family: str, beyond: int) -> None:
    metadata = FAMILIES[family]
    size = len(metadata["tokenizer.ggml.tokens"])
    keys = [f"tokenizer.ggml.{name}_token_id" for name in ("padding", "eot", "eom", "fim_pad")]
    changed = metadata | dict.fromkeys(keys, size + beyond)
    assert read_vocab(changed, "x").special == read_vocab(metadata, "x").special
    assert read_vocab(changed, "x").eog == read_vocab(metadata, "x").eog
    eos = read_vocab(metadata | {"tokenizer.ggml.eos_token_id": size + beyond}, "x").special
    # SentencePiece has an id of its own for it.
    assert eos.get("eos") == (2 if family == "spm" else None)
    assert read_vocab(metadata | {keys[0]: size - 1}, "x").special["pad"] == size - 1


def test_empty_tokens_get_names() -> None:
    metadata = vocabularies.bpe("gpt-2")
    metadata["tokenizer.ggml.tokens"] = [*metadata["tokenizer.ggml.tokens"], "", ""]
    types = metadata["tokenizer.ggml.token_type"]
    metadata["tokenizer.ggml.token_type"] = np.append(types, [5, 99]).astype(np.int32)
    vocab = read_vocab(metadata, "test.gguf")
    size = len(types)
    assert vocab.tokens[size:] == [f"[EMPTY_{size}]", f"[EMPTY_{size + 1}]"]
    assert build_tokenizer(metadata, "test.gguf").decode([size, size + 1]) == ""


def test_named_chat_templates_are_kept() -> None:
    metadata = {
        **FAMILIES["bpe qwen2"],
        "tokenizer.chat_template": "plain {{ messages[0].content }}",
        "tokenizer.chat_template.tool_use": "tools {{ tools[0].name }}",
        "tokenizer.chat_templates": ["tool_use"],
    }
    tokenizer = build_tokenizer(metadata, "test.gguf")
    assert set(tokenizer.chat_template) == {"default", "tool_use"}
    messages = [{"role": "user", "content": "hi"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == "plain hi"
    with_tools = tokenizer.apply_chat_template(messages, tools=[{"name": "f"}], tokenize=False)
    assert with_tools == "tools f"


@pytest.mark.parametrize(
    ("names", "expected"), [(["rag"], "rag"), (["rag", "tool_use"], "tool_use"), (["a", "b"], "a")]
)
def test_where_all_templates_are_named_one_is_the_default(names: list[str], expected: str) -> None:
    templates = {f"tokenizer.chat_template.{name}": name for name in names}
    tokenizer = build_tokenizer({**FAMILIES["bpe qwen2"], **templates}, "test.gguf")
    assert tokenizer.has_chat_template
    messages = [{"role": "user", "content": "hi"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == expected
    assert tokenizer.apply_chat_template(messages, chat_template="a", tokenize=False) == "a"


def _set(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(metadata: dict[str, Any]) -> None:
        if value is None:
            del metadata[f"tokenizer.ggml.{key}"]
        else:
            metadata[f"tokenizer.ggml.{key}"] = value

    return change


def _append(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda m: m.update({f"tokenizer.ggml.{key}": [*m[f"tokenizer.ggml.{key}"], value]})


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("bpe qwen2", _set("model", None), "tokenizer.ggml.model: is missing"),
        ("bpe qwen2", _set("model", 3), "tokenizer.ggml.model: expected a string, found int"),
        ("bpe qwen2", _set("pre", 3), "tokenizer.ggml.pre: expected a string"),
        ("bpe qwen2", _set("tokens", None), "tokenizer.ggml.tokens: is missing"),
        ("bpe qwen2", _set("tokens", []), "tokenizer.ggml.tokens: is empty"),
        ("bpe qwen2", _set("tokens", ["a", 1]), "tokenizer.ggml.tokens: expected an array of str"),
        ("bpe qwen2", _set("tokens", "abc"), "tokenizer.ggml.tokens: expected an array of strings"),
        ("spm", _append("tokens", "<s>"), "'<s>' has two ids, 1 and"),
        ("spm", _append("tokens", "new"), "tokenizer.ggml.token_type: .* entries for"),
        ("spm", _append("tokens", "x" * 2000), "tokenizer.ggml.token_type"),
        ("spm", _set("token_type", ["x"]), "tokenizer.ggml.token_type: expected an array of num"),
        ("spm", _set("token_type", [[1], [1, 2]]), "tokenizer.ggml.token_type: expected a flat"),
        ("spm", _set("scores", np.zeros(3, "f4")), "tokenizer.ggml.scores: 3 entries for"),
        (
            "spm",
            _set("scores", np.full(vocabularies.SPM_SIZE, np.nan, "f4")),
            "tokenizer.ggml.scores: entry 0 is not a number",
        ),
        ("bpe qwen2", _set("merges", None), "tokenizer.ggml.merges: is missing"),
        ("bpe qwen2", _set("bos_token_id", True), "bos_token_id: expected a token id, found bool"),
        ("bpe qwen2", _set("bos_token_id", "<s>"), "bos_token_id: expected a token id, found str"),
        ("bpe qwen2", _set("add_bos_token", 1), "add_bos_token: expected a bool, found int"),
        ("bpe llama-bpe", _set("bos_token_id", None), "bos_token_id: is missing, and the voc"),
        (
            "bpe qwen2",
            lambda m: m.update({"tokenizer.chat_template.x": 5}),
            "tokenizer.chat_template.x: expected a string, found int",
        ),
    ],
)
def test_malformed_metadata_is_a_gguf_error(
    family: str, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    metadata = dict(FAMILIES[family])
    change(metadata)
    with pytest.raises(GGUFError, match=re.escape(message).replace(r"\.\*", ".*")) as caught:
        build_tokenizer(metadata, "some/file.gguf")
    assert str(caught.value).startswith("some/file.gguf: ")


def test_mutated_metadata_raises_only_our_errors() -> None:
    rng = random.Random(1)
    numbers = [np.zeros(1000, "f4"), np.full(1000, -np.inf, "f4"), np.ones(1000, bool), np.eye(2)]
    values = [0, -1, 2**40, True, 1.5, "", "gpt2", "llama", [], ["a", "a"], ["", ""], [1], {}]
    values += [None, ["a b"] * 3, [" "] * 2, *numbers]
    optional = ("add_bos_token", "add_eos_token", "eot_token_id", "fim_sep_token_id", "scores")
    outcomes = set()
    for _ in range(300):
        metadata = dict(rng.choice([FAMILIES["bpe qwen2"], FAMILIES["spm"], FAMILIES["gemma4"]]))
        keys = [*metadata, *(f"tokenizer.ggml.{key}" for key in optional)]
        for key in rng.sample(keys, rng.randint(1, 3)):
            metadata[key] = rng.choice(values)
        try:
            tokenizer = build_tokenizer(metadata, "test.gguf")
            tokenizer.decode(tokenizer.encode("hi <s> é\n"))
            outcomes.add("built")
        except (GGUFError, UnsupportedError) as error:
            outcomes.add(type(error).__name__)
    assert outcomes == {"built", "GGUFError", "UnsupportedError"}


def test_a_token_of_absurd_length_is_refused() -> None:
    metadata = dict(FAMILIES["spm"])
    metadata["tokenizer.ggml.tokens"] = [*metadata["tokenizer.ggml.tokens"][:-1], "x" * 1025]
    with pytest.raises(GGUFError, match="more than 1024 characters"):
        build_tokenizer(metadata, "test.gguf")


@pytest.mark.parametrize(("key", "known"), [("model", "gpt2"), ("pre", "llama-bpe")])
def test_unknown_model_and_pre_are_unsupported_by_name(key: str, known: str) -> None:
    metadata = {**FAMILIES["bpe qwen2"], f"tokenizer.ggml.{key}": "no-such"}
    with pytest.raises(UnsupportedError, match="'no-such' is not supported") as caught:
        build_tokenizer(metadata, "test.gguf")
    assert known in str(caught.value)


def test_what_is_no_text_is_left_out() -> None:
    """Control tokens and the unknown one; a user's own token is text, to the backend as well."""
    tokenizer = build_tokenizer(FAMILIES["spm"], "test.gguf")
    tokens = FAMILIES["spm"]["tokenizer.ggml.tokens"]
    unknown, start, letter, own = (tokens.index(t) for t in ("<unk>", "<s>", "e", "<think>"))
    ids = [start, unknown, letter, own]
    assert tokenizer.decode(ids, skip_special_tokens=False).startswith("<s>")
    assert tokenizer.decode(ids, skip_special_tokens=True) == "e<think>"
    backend = tokenizer._tokenizer.backend_tokenizer
    assert backend.decode([start, own], skip_special_tokens=True) == "<think>"
    added = backend.get_added_tokens_decoder()
    assert [added[i].special for i in (unknown, start, own)] == [True, True, False]
