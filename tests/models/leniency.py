"""Files with one key that is missing, of another type or odd: do they run here and in llama.cpp?

`changes` makes them from a tiny model, for every key that the loader asks for. llama.cpp's verdicts
are stored in ``golden_leniency.json`` by ``python -m tests.models.make_leniency``.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlxfuse.errors import MLXFuseError
from mlxfuse.gguf.reader import open_gguf
from mlxfuse.loader import load
from mlxfuse.models.config import read_config
from mlxfuse.models.plan import plan
from mlxfuse.tokenizer.vocab import read_vocab

from ..gguf.make import BOOL, F32, I32, STRING, U32, T, Typed, array, gguf, string
from ..tokenizer import vocabularies
from . import tiny

# Two kinds of vocabulary, whose keys are changed with these models only, then several kinds of
# tables and hooks.
CASES = ("llama", "llama-spm", "qwen3moe", "gemma3")
PROMPT = (5, 77, 130, 9, 200, 41, 77, 3)
Change = tuple[str, str, object]
_GONE = object()


class _Recorder(dict[str, Any]):
    """Metadata that notes which keys are asked for."""

    def __init__(self, found: Any) -> None:
        super().__init__(found)
        self.asked: set[str] = set()

    def __contains__(self, key: object) -> bool:
        self.asked.add(str(key))
        return super().__contains__(key)

    def __getitem__(self, key: str) -> Any:
        self.asked.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.add(key)
        return super().get(key, default)


def model(case: str) -> tuple[dict[str, object], list[T]]:
    """Metadata and F32 tensors of a valid file."""
    made = tiny.build(case.removesuffix("-spm"), 0)
    if case.endswith("-spm"):
        vocabulary = vocabularies.spm()
    else:
        kinds = np.array([1] * 256 + [3] * 2 + [1], np.int32)
        vocabulary = {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": "gpt-2",
            "tokenizer.ggml.tokens": [*tiny.byte_tokens(), "<|bos|>", "<|eos|>", "ab"],
            "tokenizer.ggml.token_type": kinds,
            "tokenizer.ggml.merges": ["a b"],
            "tokenizer.ggml.bos_token_id": tiny.BOS,
            "tokenizer.ggml.eos_token_id": tiny.EOS,
            "tokenizer.ggml.add_bos_token": False,
        }
    size = len(vocabulary["tokenizer.ggml.tokens"])
    tensors = []
    for name in made.tensors:
        values = made.weights(name).astype(np.float32)
        if name in ("token_embd.weight", "output.weight"):
            values = np.resize(values, (size, values.shape[1]))
        tensors.append(T(name, shape=values.shape, data=values.tobytes()))
    metadata = {"general.architecture": made.case.arch, **made.metadata, **vocabulary}
    listed = {k: np.array(v) for k, v in metadata.items() if _numbers(v)}
    return metadata | {k: v.astype(_of(v)) for k, v in listed.items()}, tensors


def _numbers(value: object) -> bool:
    return isinstance(value, list) and not isinstance(value[0], str)


def _of(values: np.ndarray) -> Any:
    return {"i": np.int32, "f": np.float32}.get(values.dtype.kind, values.dtype)


def asked(case: str, path: Path) -> set[str]:
    """The keys that the loader looks for in a file, and those that are there."""
    with open_gguf(path) as file:
        file.metadata = recorder = _Recorder(file.metadata)
        read_config(file)
        read_vocab(recorder, path)
        keys = (recorder.asked | recorder.keys()) - {"general.architecture"}
    if case.startswith("llama"):
        return keys
    return {key for key in keys if not key.startswith(("tokenizer.", "general."))}


def changes(metadata: dict[str, object], keys: set[str]) -> Iterator[Change]:
    """(key, what is done to it, its new value) for every key."""
    for key in sorted(keys):
        value = metadata.get(key, _GONE)
        if value is not _GONE:
            yield key, "missing", _GONE
        if isinstance(value, np.ndarray | list):
            yield from ((key, *change) for change in _of_array(value))
        else:
            yield from ((key, *change) for change in _of_scalar(value))


def _of_array(value: Any) -> Iterator[tuple[str, object]]:
    yield "scalar", "x" if isinstance(value, list) else 1
    yield "empty", array(STRING, b"", 0) if isinstance(value, list) else value[:0]
    yield "short", value[:-1]
    yield "long", [*value, value[-1]] if isinstance(value, list) else np.append(value, value[-1:])
    if isinstance(value, list):
        yield "numbers", np.arange(len(value), dtype=np.int32)
    else:
        yield "floats", value.astype(np.float32)
        yield "int32", value.astype(np.int32)
        yield "uint32", value.astype(np.uint32)
        yield "zeros", np.zeros_like(value)
        yield "strings", ["x"] * len(value)


def _of_scalar(value: object) -> Iterator[tuple[str, object]]:
    yield "text", "x"
    yield "no text", ""
    yield "yes", True
    yield "0", 0
    yield "1", 1
    yield "7", 7
    yield "-1", Typed(I32, -1)
    yield "0.0", 0.0
    yield "0.5", 0.5
    yield "nan", float("nan")
    yield "most", Typed(U32, 2**32 - 1)
    yield "list", np.array([1, 1], np.int32)
    if isinstance(value, int) and not isinstance(value, bool):
        yield "as int32", Typed(I32, value)
        yield "as float", float(value)
        yield "as list of 3", np.full(3, value, np.int32)
    if isinstance(value, bool):
        yield "as int", int(value)
    if isinstance(value, str):
        yield "as bytes", Typed(STRING, string(b"\xff\xfe"))
        yield "false", Typed(BOOL, b"\0")
    if isinstance(value, float):
        yield "as 64 bits", Typed(12, value)
        yield "inf", Typed(F32, float("inf"))


def file(metadata: dict[str, object], tensors: list[T], change: Change | None = None) -> bytes:
    """The bytes of a model with a change."""
    found = dict(metadata)
    if change is not None:
        key, _, value = change
        found.pop(key, None)
        if value is not _GONE:
            found[key] = value
    return gguf(found, tensors)


def reads(path: Path) -> str:
    """``runs``, or why its metadata or its tensors' shapes are refused."""
    try:
        with open_gguf(path) as opened:
            plan(opened, read_config(opened))
            read_vocab(opened.metadata, path)
    except MLXFuseError as error:
        return str(error)
    return "runs"


def logits(path: Path) -> list[float]:
    """Of the last of `PROMPT`, the first few."""
    loaded, _ = load(path)
    return [float(x) for x in loaded(mx.array([PROMPT]))[0, -1, :COUNT]]


COUNT = 6
