"""Folders that ``mlxfuse export`` writes: a GGUF header, and its weights in safetensors files.

* ``header.gguf``: the GGUF file up to its first tensor (of a set of shards, one such file each,
  ``header-00001-of-0000N.gguf``); configuration, tokenizer and chat template come from it.
* ``model-00001-of-0000N.safetensors``: what is read row by row as it was in the file is uint8
  ``[rows, row_bytes]`` under the tensor's name; what kernels read is in streams, ``[rows, n]``
  each, under ``MODULE.FORMAT.STREAM``.
* ``config.json``: which file it was, and how the streams are laid out.

Nothing in a folder is believed: names, types and shapes of arrays follow from the header, which
is checked as any GGUF file's is, and every array is compared with that.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from ..errors import ExportError, ModelRefError
from ..formats import FORMATS, Format
from .reader import GGUFFile, Tensor, open_gguf, open_shards
from .relayout import restore, stream_shapes

CONFIG = "config.json"
HEADER = "header"
_CONFIG_LIMIT = 1 << 20

# How the streams of every format are laid out; another layout is another export.
LAYOUT = hashlib.sha256(
    repr([(f.name, f.streams) for f in FORMATS.values() if f.streams]).encode()
).hexdigest()[:16]

SAFETENSORS = {"uint8": "U8", "uint16": "U16", "uint32": "U32", "float16": "F16"}
"""Names of numpy's types in safetensors files."""

_NUMPY = {name: dtype for dtype, name in SAFETENSORS.items()}


@dataclass(frozen=True, slots=True)
class Stored:
    """Rows ``start`` to ``stop`` of a tensor, in the streams ``key`` from row ``first`` on.

    order  index of the file's row for each stored row, counted from ``start``, or None.
    total  rows of the streams.
    """

    start: int
    stop: int
    key: str
    first: int
    order: NDArray[np.intp] | None
    total: int


class ExportedFile(GGUFFile):
    """A GGUF file whose weights lie in a folder's safetensors files.

    ``arrange`` has to say which of them are in streams before one is read.
    """

    def __init__(self, shards: tuple[Any, ...], folder: Path) -> None:
        """Takes over open headers; raises ExportError if a file is no safetensors file."""
        super().__init__(shards)
        self.folder = folder
        self._stored: Mapping[str, Sequence[Stored]] = {}
        self._files: dict[str, tuple[Path, Any]] = {}
        self._starts: dict[Path, dict[str, int]] = {}
        for path in sorted(folder.glob("model-*-of-*.safetensors")):
            try:
                handle: Any = safe_open(path, framework="numpy")
                names = list(handle.keys())
            except (SafetensorError, OSError) as error:
                raise ExportError(f"{path}: not a safetensors file: {error}") from error
            for name in names:
                if name in self._files:
                    raise ExportError(f"{path}: {name!a} is in another file too")
                self._files[name] = path, handle
        self.size = sum(p.stat().st_size for p in {path for path, _ in self._files.values()})

    def arrange(self, stored: Mapping[str, Sequence[Stored]]) -> None:
        """Say where rows are in streams, tensor name -> places, and compare every array.

        Raises:
            ExportError: an array is missing, left over, or has another type or shape.
        """
        self._stored = stored
        expected: dict[str, tuple[str, tuple[int, ...]]] = {}
        for tensor in self.tensors.values():
            for place in stored.get(tensor.name, ()):
                shapes = stream_shapes(tensor.format, place.total, tensor.shape[-1])
                for stream in tensor.format.streams:
                    name = stream_name(place.key, tensor.format, stream.name)
                    expected[name] = stream.dtype, shapes[stream.name]
            if tensor.name not in stored:
                expected[tensor.name] = "uint8", (tensor.rows, tensor.row_bytes)
        for name, (dtype, shape) in expected.items():
            if name not in self._files:
                raise ExportError(f"{self.folder}: the array {name!a} is missing; export it again")
            path, handle = self._files[name]
            part = handle.get_slice(name)
            found = _NUMPY.get(part.get_dtype(), part.get_dtype()), tuple(part.get_shape())
            if found != (dtype, shape):
                raise ExportError(
                    f"{path}: {name!a}: expected {dtype} of shape {shape}, "
                    f"found {found[0]} of shape {found[1]}"
                )
        if surplus := sorted(self._files.keys() - expected.keys()):
            raise ExportError(f"{self.folder}: {surplus[0]!a} has no place in the model")

    def place(self, name: str) -> tuple[Path, int]:
        """The safetensors file that has an array, and the byte at which it begins there."""
        path, _ = self._files[name]
        if path not in self._starts:
            self._starts[path] = _starts(path)
        return path, self._starts[path][name]

    def view(self, tensor: Tensor) -> NDArray[np.uint8]:
        """The tensor's bytes, as ``read`` gives them."""
        return self.read(tensor)

    def read(self, tensor: Tensor, rows: slice | None = None) -> NDArray[np.uint8]:
        """The bytes of a tensor, or of some of its rows, as the GGUF file had them."""
        start, stop, _ = (rows or slice(None)).indices(tensor.rows)
        if start >= stop:
            return np.empty(0, np.uint8)
        if tensor.name not in self._stored:
            _, handle = self._files[tensor.name]
            found: NDArray[np.uint8] = handle.get_slice(tensor.name)[start:stop]
            return found.reshape(-1)
        out = np.empty((stop - start, tensor.row_bytes), np.uint8)
        for place in self._stored[tensor.name]:
            low, high = max(start, place.start), min(stop, place.stop)
            if low < high:
                out[low - start : high - start] = self._rows(tensor, place, low, high)
        return out.reshape(-1)

    def _rows(self, tensor: Tensor, place: Stored, low: int, high: int) -> NDArray[np.uint8]:
        """Rows of the tensor that lie in one place, in the file's order."""
        if place.order is None:
            return self._restored(tensor, place, low - place.start, high - place.start)
        whole = self._restored(tensor, place, 0, place.stop - place.start)
        data = np.empty_like(whole)
        data[place.order] = whole
        return data[low - place.start : high - place.start]

    def _restored(self, tensor: Tensor, place: Stored, low: int, high: int) -> NDArray[np.uint8]:
        streams = {}
        for stream in tensor.format.streams:
            name = stream_name(place.key, tensor.format, stream.name)
            part = self._files[name][1].get_slice(name)
            streams[stream.name] = part[place.first + low : place.first + high]
        out = np.empty((high - low, tensor.row_bytes), np.uint8)
        restore(streams, tensor.format, out)
        return out


def stream_name(key: str, format: Format, stream: str) -> str:
    """The name of an array of streams in a folder's files."""
    return f"{key}.{format.name}.{stream}"


def _starts(path: Path) -> dict[str, int]:
    """Where each array of a safetensors file begins; its header was checked when it was opened."""
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
        return {
            n: 8 + size + a["data_offsets"][0] for n, a in header.items() if n != "__metadata__"
        }
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ExportError(f"{path}: changed while it was read: {error}") from error


def is_export(path: Path) -> bool:
    """Whether ``mlxfuse export`` wrote a folder, by what is in it."""
    return path.is_dir() and bool(_headers(path)) and (path / CONFIG).is_file()


def _headers(folder: Path) -> list[Path]:
    one = folder / f"{HEADER}.gguf"
    return [one] if one.is_file() else sorted(folder.glob(f"{HEADER}-*-of-*.gguf"))


def open_model(path: str | os.PathLike[str]) -> GGUFFile:
    """A GGUF file, or an exported folder as one.

    Raises:
        ExportError: the folder is not as it was written, or by another version.
        ModelRefError, GGUFError, UnsupportedError: as `open_gguf`, which reads its header.
    """
    folder = Path(path)
    if not folder.is_dir():
        return open_gguf(folder)
    if not is_export(folder):
        raise ModelRefError(f"{folder} is a folder, and not one that `mlxfuse export` wrote")
    _check_config(folder / CONFIG)
    return ExportedFile(open_shards(_headers(folder)[0], header_only=True), folder)


def _check_config(path: Path) -> None:
    try:
        with path.open("rb") as file:
            found = json.loads(file.read(_CONFIG_LIMIT))
    except (OSError, ValueError, RecursionError) as error:
        raise ExportError(f"{path}: not JSON: {error}") from None
    layout = found.get("mlxfuse_layout") if isinstance(found, dict) else None
    if layout != LAYOUT:
        raise ExportError(
            f"{path}: mlxfuse_layout: expected {LAYOUT!r}, found {str(layout)[:40]!a}; "
            "another version of mlxfuse wrote it: export the model again"
        )


def header_bytes(file: GGUFFile) -> Iterable[tuple[str, bytes]]:
    """(name in an exported folder, the file up to its first tensor) of each of its shards."""
    count = len(file.paths)
    for index, path in enumerate(file.paths):
        starts = [t.offset for t in file.tensors.values() if t.shard == index]
        with path.open("rb") as source:
            data = source.read(min(starts, default=path.stat().st_size))
        yield (
            f"{HEADER}-{index + 1:05d}-of-{count:05d}.gguf" if count > 1 else f"{HEADER}.gguf",
            data,
        )
