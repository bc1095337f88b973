# ruff: noqa: RUF001
"""The vocabulary of a GGUF file: ``tokenizer.ggml.*`` checked and put into one record.

Nothing here needs a tokenizer library; defaults, the end-of-generation set and the repairs of
mistyped special tokens follow llama.cpp.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NoReturn

import numpy as np

from ..errors import GGUFError, UnsupportedError
from .pretokenizers import PRE, Pre

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

_MODELS = ("gpt2", "llama", "gemma4")
# Beyond any real vocabulary; building SPM merges takes time quadratic in it.
_LONGEST_TOKEN = 1024

# Texts that end a generation whatever the metadata says.
_EOG_TEXTS = """<|eot_id|> <|im_end|> <|end|> <|return|> <|call|> <|flush|> <|calls|> <end_of_turn>
<|endoftext|> </s> <|eom_id|> <EOT> _<EOT> [EOT] [EOS] <|end_of_text|> <end_of_utterance> <eos>
<turn|> <|tool_response> <｜end▁of▁sentence｜> [e~["""
_EOG = frozenset(_EOG_TEXTS.split())
# The fill-in-the-middle tokens that end a generation, by the key that overrides their texts.
_FIM_EOG = {
    "fim_pad_token_id": ("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"),
    "fim_rep_token_id": ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"),
    "fim_sep_token_id": ("<|file_sep|>",),
}
# gpt-oss's channel markers: typed control in the files, but part of the text that a user sees.
_ALWAYS_TEXT = ("<|channel|>", "<|message|>", "<|start|>", "<|constrain|>")


@dataclass(frozen=True)
class Vocab:
    """A checked vocabulary.

    ``tokens[i]`` is the text of id ``i`` and ``types[i]`` its type (int8; the constants above);
    ``scores`` is float32 or None; ``merges`` holds each pair once, best first; ids in ``special``
    (``bos``, ``eos``, ``eot``, ``eom``, ``unk``, ``pad``), ``eog`` and ``suppressed``, which
    are never to be generated, are within the vocabulary.
    """

    model: str
    pre: Pre | None
    tokens: list[str]
    ids: dict[str, int]
    types: np.ndarray
    scores: np.ndarray | None
    merges: list[tuple[str, str]]
    special: dict[str, int]
    eog: frozenset[int]
    add_bos: bool
    add_eos: bool
    add_space_prefix: bool
    rstrip: frozenset[int]
    chat_templates: dict[str, str] = field(default_factory=dict)
    suppressed: tuple[int, ...] = ()

    @property
    def is_spm(self) -> bool:
        """SentencePiece-like: merges by score, U+2581 for a space, bytes as ``<0xXX>``."""
        return self.model == "llama"

    @property
    def parsed(self) -> list[int]:
        """The ids of the tokens whose text stands for them wherever it is in a prompt."""
        return np.flatnonzero(np.isin(self.types, (CONTROL, USER_DEFINED, UNKNOWN))).tolist()


class _Reader:
    """Typed look-ups in ``tokenizer.ggml.*`` that raise GGUFError with the key's name."""

    def __init__(self, metadata: Mapping[str, object], path: str | os.PathLike[str]) -> None:
        self.metadata, self.path = metadata, path

    def fail(self, key: str, what: str) -> NoReturn:
        raise GGUFError(self.path, f"tokenizer.ggml.{key}: {what}")

    def get(self, key: str) -> object:
        return self.metadata.get(f"tokenizer.ggml.{key}")

    def text(self, key: str) -> str | None:
        value = self.get(key)
        if value is not None and not isinstance(value, str):
            self.fail(key, f"expected a string, found {type(value).__name__}")
        return value

    def flag(self, key: str, default: bool) -> bool:
        value = self.get(key)
        if value is None:
            return default
        if not isinstance(value, bool | np.bool_):
            self.fail(key, f"expected a bool, found {type(value).__name__}")
        return bool(value)

    def token_id(self, key: str, size: int) -> int | None:
        """An id; None where it is absent or outside the vocabulary, as llama.cpp takes those."""
        value = self.get(key)
        if value is None:
            return None
        if isinstance(value, bool | np.bool_) or not isinstance(value, int | np.integer):
            self.fail(key, f"expected a token id, found {type(value).__name__}")
        # Padding ids one past the end, or -1 as uint32, are common in files.
        return int(value) if 0 <= value < size else None

    def strings(self, key: str, why: str) -> list[str]:
        value = self.get(key)
        if value is None:
            self.fail(key, f"is missing; {why}")
        if not isinstance(value, list) or not all(map(str.__instancecheck__, value)):
            self.fail(key, "expected an array of strings")
        return value

    def numbers(self, key: str, size: int | None, kinds: str) -> np.ndarray | None:
        value = self.get(key)
        if value is None:
            return None
        try:
            array = np.asarray(value)
        except ValueError:  # a ragged list
            self.fail(key, "expected a flat array of numbers")
        if array.ndim != 1 or array.dtype.kind not in kinds:
            self.fail(key, f"expected an array of numbers, found {array.dtype} {array.shape}")
        if size is not None and array.size < size:
            self.fail(key, f"{array.size} entries for {size} tokens")
        return array[:size]


def read_vocab(metadata: Mapping[str, object], path: str | os.PathLike[str]) -> Vocab:
    """Checks ``tokenizer.ggml.*`` of ``metadata``; ``path`` is only for the messages.

    Raises:
        GGUFError: a key that is missing, of the wrong type or out of range, a token or merge that
            cannot be, duplicated tokens.
        UnsupportedError: a tokenizer model or pre-tokenizer that is not in the table.
    """
    read = _Reader(metadata, path)
    model = read.text("model")
    if model is None:
        read.fail("model", "is missing; the file has no tokenizer")
    if model not in _MODELS:
        raise UnsupportedError(
            f"{path}: tokenizer model {model!r} is not supported; supported: {', '.join(_MODELS)}"
        )
    pre = None if model == "llama" else _pre(read, model)
    tokens = [
        token or f"[EMPTY_{i}]" for i, token in enumerate(read.strings("tokens", "no vocabulary"))
    ]
    if not tokens:
        read.fail("tokens", "is empty")
    ids = _unique(read, tokens)
    types = _types(read, len(tokens))
    scores = read.numbers("scores", len(tokens), "fi")
    if scores is not None:
        scores = scores.astype(np.float32)
        if np.isnan(scores).any():
            read.fail("scores", f"entry {int(np.isnan(scores).argmax())} is not a number")
    merges: list[tuple[str, str]] = []
    if model == "llama":
        if max(map(len, tokens)) > _LONGEST_TOKEN:
            read.fail("tokens", f"a token has more than {_LONGEST_TOKEN} characters")
    else:
        merges = _merges(read)

    special = _special_ids(read, model, len(tokens))
    eog = _end_of_generation(read, ids, types, special)
    return Vocab(
        model=model,
        pre=pre,
        tokens=tokens,
        ids=ids,
        types=types,
        scores=scores,
        merges=merges,
        special=special,
        eog=eog,
        add_bos=_add(read, "bos", special, pre is None or pre.add_bos)
        or (model == "gemma4" and "bos" in special),
        add_eos=_add(read, "eos", special, False),
        add_space_prefix=read.flag("add_space_prefix", pre is None),
        rstrip=_rstrip(metadata, ids, types),
        chat_templates=_chat_templates(metadata, path),
        suppressed=_suppressed(read, len(tokens)),
    )


def _pre(read: _Reader, model: str) -> Pre:
    # An absent key means "default" in llama.cpp too, which warns of worse output.
    name = "gemma4" if model == "gemma4" else read.text("pre") or "default"
    if name not in PRE:
        raise UnsupportedError(
            f"{read.path}: tokenizer.ggml.pre {name!r} is not supported; known: {', '.join(PRE)}"
        )
    return PRE[name]


def _unique(read: _Reader, tokens: Sequence[str]) -> dict[str, int]:
    ids = {token: i for i, token in enumerate(tokens)}
    if len(ids) != len(tokens):
        i = next(i for i, token in enumerate(tokens) if ids[token] != i)
        read.fail("tokens", f"{tokens[i]!r} has two ids, {i} and {ids[tokens[i]]}")
    return ids


def _types(read: _Reader, size: int) -> np.ndarray:
    types = read.numbers("token_type", size, "iu")
    if types is None:
        return np.full(size, NORMAL, np.int8)
    known = (types >= NORMAL) & (types <= BYTE)
    return np.where(known, types, 0).astype(np.int8)


def _merges(read: _Reader) -> list[tuple[str, str]]:
    """The pairs, best first; like llama.cpp's, they may name what is no token."""
    merges: dict[tuple[str, str], None] = {}
    for merge in read.strings("merges", "a BPE vocabulary needs it"):
        # A part may itself begin with a space.
        space = merge.find(" ", 1)
        if space > 0 and space + 1 < len(merge):  # as in llama.cpp, another line does nothing
            merges.setdefault((merge[:space], merge[space + 1 :]))
    return list(merges)


def _special_ids(read: _Reader, model: str, size: int) -> dict[str, int]:
    keys = {"bos": "bos", "eos": "eos", "eot": "eot", "eom": "eom", "unk": "unknown"}
    keys["pad"] = "padding"
    found = {name: read.token_id(f"{key}_token_id", size) for name, key in keys.items()}
    # SentencePiece's own ids. For gpt2 llama.cpp assumes 11, Falcon's, which fits no other model.
    if model == "llama":
        for name, default in (("unk", 0), ("bos", 1), ("eos", 2)):
            if found[name] is None and default < size:
                found[name] = default
    return {name: value for name, value in found.items() if value is not None}


def _suppressed(read: _Reader, size: int) -> tuple[int, ...]:
    found = read.numbers("suppress_tokens", None, "iu")
    return () if found is None else tuple(i for i in found.tolist() if 0 <= i < size)


def _add(read: _Reader, name: str, special: Mapping[str, int], default: bool) -> bool:
    """Whether ``name`` (bos, eos) is added; a demand for a token that is not there is an error."""
    wanted = read.flag(f"add_{name}_token", default)
    if wanted and name not in special:
        read.fail(f"{name}_token_id", f"is missing, and the vocabulary adds {name.upper()}")
    return wanted


def _end_of_generation(
    read: _Reader, ids: Mapping[str, int], types: np.ndarray, special: Mapping[str, int]
) -> frozenset[int]:
    """The ids that stop a generation; also retypes (in ``types``) tokens that files get wrong."""
    eog = {ids[text] for text in _EOG if text in ids}
    for i in eog:
        if types[i] != UNUSED:
            types[i] = CONTROL
    for key, texts in _FIM_EOG.items():
        given = read.token_id(key, len(types))
        named = next((ids[text] for text in texts if text in ids), None)
        found = named if given is None else given
        if found is not None:
            eog.add(found)
            if given is None and types[found] == NORMAL:
                types[found] = CONTROL
    for text in _ALWAYS_TEXT:
        if text in ids:
            types[ids[text]] = USER_DEFINED
    eog.update(special[name] for name in ("eos", "eot", "eom") if name in special)

    def drop(text: str, new_type: int) -> None:
        if text in ids and ids[text] in eog:
            eog.discard(ids[text])
            types[ids[text]] = new_type

    has = {text for text in _EOG if text in ids and ids[text] in eog}
    calls = "<|call|>" in has or "<|calls|>" in has
    if calls and ("<|return|>" in has or "<|flush|>" in has):
        drop("<|end|>", USER_DEFINED)  # closes a channel, not the reply
    if "<|tool_response>" in has:
        drop("</s>", NORMAL)
    return frozenset(eog)


def _rstrip(
    metadata: Mapping[str, object], ids: Mapping[str, int], types: np.ndarray
) -> frozenset[int]:
    """Special tokens that swallow the space after them: Phi-3's, known only by the model's name."""
    name = metadata.get("general.name")
    if not isinstance(name, str) or not any(phi in name.lower() for phi in ("phi-3", "phi3")):
        return frozenset()
    found = set(np.flatnonzero(np.isin(types, (CONTROL, USER_DEFINED, UNKNOWN))).tolist())
    if "</s>" in ids:
        found.add(ids["</s>"])
    return frozenset(found - {ids.get(t, -1) for t in ("<unk>", "<s>", "<|endoftext|>")})


def _chat_templates(metadata: Mapping[str, object], path: str | os.PathLike[str]) -> dict[str, str]:
    """``tokenizer.chat_template`` as "default", ``tokenizer.chat_template.<name>`` as name.

    Where only named ones are there, the default is one of them.
    """
    prefix = "tokenizer.chat_template"
    found = {}
    for key, value in metadata.items():
        if key != prefix and not key.startswith(prefix + "."):
            continue
        if not isinstance(value, str):
            raise GGUFError(path, f"{key}: expected a string, found {type(value).__name__}")
        found[key[len(prefix) + 1 :] or "default"] = value
    if found and "default" not in found:  # as in llama.cpp
        found["default"] = found.get("tool_use") or next(iter(found.values()))
    return found
