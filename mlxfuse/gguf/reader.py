"""GGUF files, one or a set of shards, over a read-only mapping.

``open_gguf`` checks everything in the header before it returns (see ``gguf.header``); tensor bytes
are read when asked for. A set of shards is named ``PREFIX-00001-of-0000N.gguf`` and opened by its
first file, which alone has the metadata, as in llama.cpp.
"""

from __future__ import annotations

import math
import mmap
import os
import re
import stat
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import IO, Any, NamedTuple, TypeVar, overload

import numpy as np
from numpy.typing import NDArray

from mlxfuse.errors import GGUFError, ModelRefError
from mlxfuse.gguf.header import Header, Tensor, Value, parse, show

__all__ = ["GGUFFile", "Tensor", "Value", "open_gguf"]

T = TypeVar("T", int, float, bool, str, list[Any])  # what a key can be looked up as
D = TypeVar("D")

SHARD_NAME = re.compile(r"(?P<prefix>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)
# macOS refuses a single read of 2 GiB or more.
READ_CHUNK = 1 << 30


class _Missing:
    """The default of a look-up that has none."""


_MISSING = _Missing()


class _Shard(NamedTuple):
    path: Path
    file: IO[bytes]
    data: mmap.mmap
    header: Header


class GGUFFile:
    """An open GGUF file or set of shards; a context manager.

    path      the file that was named, the first shard of a set.
    paths     every file, in order.
    version   2 or 3.
    size      bytes of all files together.
    metadata  key -> int, float, bool, str, list[str], or for arrays of numbers and bools a
              read-only 1-D numpy array of the file's type. Every string is valid UTF-8.
    tensors   name -> Tensor, in file order.
    """

    def __init__(self, shards: tuple[_Shard, ...]) -> None:
        """Takes over open, parsed and mutually checked files; use ``open_gguf``."""
        first = shards[0]
        self._shards = shards
        self._offsets = first.header.offsets
        self.path = first.path
        self.paths = tuple(s.path for s in shards)
        self.version = first.header.version
        self.size = sum(len(s.data) for s in shards)
        self.metadata: Mapping[str, Value] = MappingProxyType(first.header.metadata)
        self.tensors: dict[str, Tensor] = {}
        for shard in shards:
            self.tensors.update(shard.header.tensors)

    def __enter__(self) -> GGUFFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the files. Arrays that ``view`` gave out stay valid."""
        for shard in self._shards:
            shard.file.close()
            try:
                shard.data.close()
            except BufferError:  # a view is alive: the mapping goes when the last of them does
                continue

    @property
    def architecture(self) -> str:
        """``general.architecture``, for example ``llama``."""
        return self.get("general.architecture", str)

    @overload
    def get(self, key: str, kind: type[T]) -> T: ...
    @overload
    def get(self, key: str, kind: type[T], default: D) -> T | D: ...
    def get(self, key: str, kind: type[T], default: D | _Missing = _MISSING) -> T | D:
        """The value of ``key``, which must be of the given type.

        Args:
            key: the full name, for example ``llama.block_count``.
            kind: int (a count or an index, 0 to 2^31 - 1), float (an integer will do; it must be
                finite), bool, str or list (any array; its elements come as Python objects).
            default: returned as it is if the file lacks the key.

        Raises:
            GGUFError: a value of another type or out of bounds; a missing key without default.
        """
        if key not in self.metadata:
            if isinstance(default, _Missing):
                raise GGUFError(self.path, f"the key {show(key)} is missing from the metadata")
            return default
        value: object = self.metadata[key]
        if kind is list and isinstance(value, np.ndarray):
            value = value.tolist()
        elif kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            what = f"{kind.__name__} expected, found {type(value).__name__}"
        elif isinstance(value, float) and not math.isfinite(value):
            what = f"a finite number expected, found {value}"
        elif type(value) is int and not 0 <= value < 2**31:
            what = f"0 to {2**31 - 1} expected, found {value}"
        else:
            return value
        raise GGUFError(self.path, f"{show(key)}: {what}", self._offsets[key])

    def view(self, tensor: Tensor) -> NDArray[np.uint8]:
        """The tensor's bytes in the mapping: read-only uint8 ``[tensor.nbytes]``, no copy.

        The file must not shrink while the view is in use; ``read`` has no such condition.
        """
        data = self._shards[tensor.shard].data
        return np.frombuffer(data, np.uint8, tensor.nbytes, tensor.offset)

    def read(self, tensor: Tensor, rows: slice | None = None) -> NDArray[np.uint8]:
        """The bytes of a tensor, or of some of its rows, in fresh memory.

        Args:
            tensor: one of ``tensors``.
            rows: a slice, of step 1, over the ``tensor.rows`` rows of all the leading axes.

        Returns:
            uint8 ``[rows * tensor.row_bytes]``.

        Raises:
            GGUFError: the file has become shorter than it was, or cannot be read.
        """
        start, stop, step = (rows or slice(None)).indices(tensor.rows)
        if step != 1:
            raise ValueError(f"rows are read in order; a slice of step 1 expected, found {rows}")
        shard = self._shards[tensor.shard]
        position = tensor.offset + start * tensor.row_bytes
        out = np.empty(max(stop - start, 0) * tensor.row_bytes, np.uint8)
        left = out.data
        while left:
            try:
                done = os.preadv(shard.file.fileno(), [left[:READ_CHUNK]], position)
            except OSError as error:
                what = f"cannot read tensor {show(tensor.name)}: {error.strerror}"
                raise GGUFError(shard.path, what, position) from error
            if not done:
                what = f"the file ends inside tensor {show(tensor.name)}; it changed while open"
                raise GGUFError(shard.path, what, position)
            left = left[done:]
            position += done
        return out


def open_gguf(path: str | os.PathLike[str]) -> GGUFFile:
    """Open a GGUF file, or the set of shards whose first file it is, and check its headers.

    Raises:
        ModelRefError: no such file, not a regular file, no permission, or not the first shard.
        GGUFError: malformed; one of the shards is missing or does not belong to the set.
        UnsupportedError: a tensor type that ggml removed or that is newer than this package.
    """
    return GGUFFile(open_shards(path))


def open_shards(path: str | os.PathLike[str], *, header_only: bool = False) -> tuple[_Shard, ...]:
    """The files of `open_gguf`; with ``header_only`` they end where tensors would begin."""
    if "\0" in os.fspath(path):
        raise ModelRefError(f"{os.fspath(path)!r} holds a NUL and cannot be a path")
    with ExitStack() as stack:  # closes what is open if a later check fails
        first = _open_shard(Path(path), 0, stack, header_only)
        shards = [first]
        count = _number(first, "split.count", 0)
        if count > 1:
            prefix = _first_shard_prefix(first, count)
            for index in range(1, count):
                name = _shard_path(first.path, prefix, index, count)
                shards.append(_open_shard(name, index, stack, header_only))
            _check_set(shards, count)
        stack.pop_all()
    return tuple(shards)


def _map(path: Path, stack: ExitStack) -> tuple[IO[bytes], mmap.mmap]:
    """A regular file (links are followed) and its mapping, both owned by ``stack``."""
    try:
        # Looked at before it is opened: opening a pipe waits, opening a device may act.
        if not stat.S_ISREG(path.stat().st_mode):
            kind = "a directory" if path.is_dir() else "not a regular file"
            raise ModelRefError(f"{path} is {kind}; a GGUF file expected")
        file = stack.enter_context(path.open("rb", buffering=0))
        if not os.fstat(file.fileno()).st_size:
            raise GGUFError(path, "the file is empty; download it again", 0)
        return file, stack.enter_context(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except OSError as error:
        raise ModelRefError(f"{path}: {error.strerror}; a GGUF file expected") from error


def _open_shard(path: Path, index: int, stack: ExitStack, header_only: bool) -> _Shard:
    try:
        file, data = _map(path, stack)
    except ModelRefError as error:
        if not index:
            raise
        raise GGUFError(path, f"shard {index + 1} of the set cannot be opened: {error}") from error
    return _Shard(path, file, data, parse(path, data, index, header_only=header_only))


def _number(shard: _Shard, key: str, default: int) -> int:
    """A ``split.`` key: an integer that is not negative."""
    if key not in shard.header.metadata:
        return default
    value = shard.header.metadata[key]
    if type(value) is not int or value < 0:
        found = value if type(value) is int else type(value).__name__
        at = shard.header.offsets[key]
        raise GGUFError(shard.path, f"{key}: an integer >= 0 expected, found {found}", at)
    return value


def _shard_path(first: Path, prefix: str, index: int, count: int) -> Path:
    return first.with_name(f"{prefix}-{index + 1:05d}-of-{count:05d}.gguf")


def _first_shard_prefix(shard: _Shard, count: int) -> str:
    """The common part of the set's names; refuses a file that is not the first of its set."""
    number = _number(shard, "split.no", 0)
    name = SHARD_NAME.fullmatch(shard.path.name)
    if not name or (int(name["number"]), int(name["count"])) != (number + 1, count):
        raise GGUFError(
            shard.path,
            f"its header says shard {number + 1} of {count}, so its name must end in "
            f"-{number + 1:05d}-of-{count:05d}.gguf; give the files their original names",
        )
    if number:
        first = _shard_path(shard.path, name["prefix"], 0, count)
        raise ModelRefError(
            f"{shard.path} is shard {number + 1} of {count}; open the first, {first}"
        )
    return name["prefix"]


def _check_set(shards: list[_Shard], count: int) -> None:
    owners: dict[str, _Shard] = {}
    for index, shard in enumerate(shards):
        number, of = _number(shard, "split.no", -1), _number(shard, "split.count", -1)
        if (number, of) != (index, count):
            raise GGUFError(
                shard.path,
                f"split.no {index} and split.count {count} expected, found {number} and {of} "
                "(-1: absent); the files do not belong together",
            )
        for name in shard.header.tensors:
            if name in owners:
                other = owners[name].path.name
                raise GGUFError(shard.path, f"tensor {show(name)} is in {other} too")
            owners[name] = shard
    total = _number(shards[0], "split.tensors.count", len(owners))
    if total != len(owners):
        raise GGUFError(
            shards[0].path,
            f"split.tensors.count says {total} tensors; the {count} shards have {len(owners)}",
            shards[0].header.offsets["split.tensors.count"],
        )
