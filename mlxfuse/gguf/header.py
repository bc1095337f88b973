"""The header of one GGUF file: key-value pairs and tensor descriptions, every bound checked.

Layout and limits: ``ggml/docs/gguf.md`` (the format) and ``ggml/src/gguf.cpp`` (what llama.cpp
accepts). All integers are little-endian. Nothing here allocates more than the bytes that are
still in the file allow: every count is compared with them first.
"""

from __future__ import annotations

import math
import mmap
import os
import struct
from dataclasses import dataclass
from typing import NamedTuple, NoReturn

import numpy as np
from numpy.typing import NDArray

from mlxfuse.errors import GGUFError, UnsupportedError
from mlxfuse.formats import FORMATS, REMOVED, Format

# A key's value: strings in arrays become a list, numbers and bools in arrays a 1-D array.
Value = int | float | bool | str | list[str] | NDArray[np.generic]

MAX_LENGTH = 1 << 30  # bytes of a string, elements of an array: gguf.cpp
MAX_KEY = (1 << 16) - 1  # bytes of a key: gguf.md
MAX_NAME = 63  # bytes of a tensor name: GGML_MAX_NAME less the NUL
MAX_DIMS = 4
DEFAULT_ALIGNMENT = 32

BOOL, STRING, ARRAY = 7, 8, 9
SCALARS = {
    0: struct.Struct("<B"),
    1: struct.Struct("<b"),
    2: struct.Struct("<H"),
    3: struct.Struct("<h"),
    4: struct.Struct("<I"),
    5: struct.Struct("<i"),
    6: struct.Struct("<f"),
    BOOL: struct.Struct("<B"),
    10: struct.Struct("<Q"),
    11: struct.Struct("<q"),
    12: struct.Struct("<d"),
}
U32, I64, U64 = SCALARS[4], SCALARS[11], SCALARS[10]
UINT32 = 4

MIN_PAIR = 8 + 1 + 4 + 1  # key length, one character, type, one byte
MIN_TENSOR = 8 + 4 + 4 + 8  # name length, dimensions, type, offset

# What people put where a GGUF file belongs, by its first bytes.
LOOKALIKES = {
    b"version https://git-lfs": "a Git LFS pointer, not the file; run `git lfs pull`",
    b"lmgg": "a GGML file from before GGUF; convert the model again",
    b"fmgg": "a GGMF file from before GGUF; convert the model again",
    b"tjgg": "a GGJT file from before GGUF; convert the model again",
    b"PK\x03\x04": "a zip archive (a PyTorch checkpoint?); convert it to GGUF",
    b"<": "an HTML or XML page, probably a failed download; download the model again",
}


@dataclass(frozen=True, slots=True)
class Tensor:
    """Where one tensor lies.

    name    as in the file.
    format  its type: block size and bytes per block.
    shape   row-major, as in numpy and MLX (ggml's ``ne`` reversed); () is one element.
    offset  of its first byte from the start of its file.
    nbytes  of all its rows.
    shard   index of its file in ``GGUFFile.paths``.
    """

    name: str
    format: Format
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    shard: int

    @property
    def row_bytes(self) -> int:
        """Bytes of one row; a row runs along the last axis and is contiguous."""
        return self.format.row_bytes(self.shape[-1] if self.shape else 1)

    @property
    def rows(self) -> int:
        """Rows over all the leading axes."""
        return math.prod(self.shape[:-1])


class Header(NamedTuple):
    """One parsed header; ``offsets`` has the byte at which each key's value starts."""

    version: int
    metadata: dict[str, Value]
    offsets: dict[str, int]
    tensors: dict[str, Tensor]


def show(text: str) -> str:
    """A name from a file for a message: quoted, escaped, never long."""
    return ascii(text if len(text) <= 64 else text[:61] + "...")


class Cursor:
    """A position in a mapped file that refuses to leave it."""

    __slots__ = ("data", "path", "position", "size")

    def __init__(self, path: str | os.PathLike[str], data: mmap.mmap) -> None:
        self.path = path
        self.data = data
        self.size = len(data)
        self.position = 0

    @property
    def left(self) -> int:
        return self.size - self.position

    def fail(self, what: str, at: int | None = None) -> NoReturn:
        raise GGUFError(self.path, what, self.position if at is None else at)

    def need(self, nbytes: int, what: str) -> None:
        if nbytes > self.left:
            self.fail(
                f"truncated or corrupt: {what} needs {nbytes} bytes, {self.left} are left; "
                "download the file again"
            )

    def take(self, nbytes: int, what: str) -> bytes:
        self.need(nbytes, what)
        start, self.position = self.position, self.position + nbytes
        return self.data[start : self.position]

    def number(self, layout: struct.Struct, what: str) -> int | float:
        self.need(layout.size, what)
        value: int | float = layout.unpack_from(self.data, self.position)[0]
        self.position += layout.size
        return value

    def integer(self, layout: struct.Struct, what: str) -> int:
        return int(self.number(layout, what))

    def text(self, what: str, longest: int = MAX_LENGTH) -> str:
        start = self.position
        length = self.integer(U64, f"the length of {what}")
        if length > longest:
            self.fail(f"{what} is {length} bytes long; at most {longest} are allowed", start)
        try:
            return str(self.take(length, what), "utf-8")
        except UnicodeDecodeError as error:
            self.fail(f"{what} is not valid UTF-8", start + 8 + error.start)

    def name(self, what: str, longest: int) -> str:
        start = self.position
        name = self.text(what, longest)
        if "\0" in name:
            self.fail(f"{what} {show(name)} holds a NUL", start)
        return name

    def count(self, what: str, least: int) -> int:
        """A count of things that take at least ``least`` bytes each."""
        start = self.position
        count = self.integer(I64, f"the number of {what}")
        if not 0 <= count <= self.left // least:
            self.fail(
                f"truncated or corrupt: {count} {what} announced, {self.left} bytes are left for "
                "them; download the file again",
                start,
            )
        return count


def _strings(cursor: Cursor, count: int, what: str) -> list[str]:
    """``count`` strings. A vocabulary has 10^5 to 10^6 of them, so this loop is kept bare."""
    data, size, unpack = cursor.data, cursor.size, U64.unpack_from
    position = cursor.position
    strings: list[str] = []
    append = strings.append
    try:
        for _ in range(count):
            start = position + 8
            length = unpack(data, position)[0]
            position = start + length
            if length > MAX_LENGTH or position > size:
                cursor.position = start - 8
                cursor.text(f"string {len(strings)} of {what}")  # says what is wrong
            append(str(data[start:position], "utf-8"))
    except struct.error:
        cursor.position = position
        cursor.need(8, f"the length of string {len(strings)} of {what}")
    except UnicodeDecodeError as error:
        cursor.fail(f"string {len(strings)} of {what} is not valid UTF-8", start + error.start)
    cursor.position = position
    return strings


def _array(cursor: Cursor, what: str) -> list[str] | NDArray[np.generic]:
    start = cursor.position
    kind = cursor.integer(U32, f"the element type of {what}")
    if kind == ARRAY:
        cursor.fail(f"{what} is an array of arrays, which GGUF does not allow", start)
    if kind != STRING and kind not in SCALARS:
        cursor.fail(f"{what} has element type {kind}; types 0 to 12 exist", start)
    start = cursor.position
    count = cursor.integer(U64, f"the length of {what}")
    least = 8 if kind == STRING else SCALARS[kind].size
    if count > min(MAX_LENGTH, cursor.left // least):
        cursor.fail(
            f"truncated or corrupt: {what} announces {count} elements, {cursor.left} bytes are "
            "left for them; download the file again",
            start,
        )
    if kind == STRING:
        return _strings(cursor, count, what)
    start = cursor.position
    values = np.frombuffer(cursor.take(count * least, what), SCALARS[kind].format)
    if kind != BOOL:
        return values
    if (wrong := np.flatnonzero(values > 1)).size:
        cursor.fail(f"{what} has a bool that is neither 0 nor 1", start + int(wrong[0]))
    return values.view(np.bool_)


def _value(cursor: Cursor, kind: int, what: str) -> Value:
    start = cursor.position
    if kind == ARRAY:
        return _array(cursor, what)
    if kind == STRING:
        return cursor.text(what)
    value = cursor.number(SCALARS[kind], what)
    if kind != BOOL:
        return value
    if value > 1:
        cursor.fail(f"{what} is {value}; a bool is 0 or 1", start)
    return bool(value)


def _check_magic(cursor: Cursor) -> None:
    head = cursor.data[:32]
    if head[:4] == b"GGUF":
        cursor.position = 4
        return
    for magic, what in LOOKALIKES.items():
        if head.startswith(magic):
            cursor.fail(f"not a GGUF file: {what}")
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= cursor.size - 8:
        cursor.fail("not a GGUF file: it looks like safetensors; convert it to GGUF")
    if b"GGUF".startswith(head[:4]):
        cursor.need(4, "the magic")
    cursor.fail(f"not a GGUF file: expected the magic b'GGUF', found {head[:4]!r}")


def _version(cursor: Cursor) -> int:
    start = cursor.position
    version = cursor.integer(U32, "the version")
    if version in (2, 3):
        return version
    if version and version & 0xFFFF == 0:
        cursor.fail("a big-endian GGUF file; swap it with `gguf-convert-endian FILE little`", start)
    advice = "update mlxfuse" if version > 3 else "convert the model again"
    cursor.fail(f"GGUF version {version}; versions 2 and 3 can be read: {advice}", start)


def _pairs(cursor: Cursor, count: int) -> tuple[dict[str, Value], dict[str, int], int]:
    """The key-value pairs, where each value starts, and the alignment of the data."""
    metadata: dict[str, Value] = {}
    offsets: dict[str, int] = {}
    alignment = DEFAULT_ALIGNMENT
    for index in range(count):
        start = cursor.position
        key = cursor.name(f"key {index}", MAX_KEY)
        if not key:
            cursor.fail(f"key {index} is empty", start)
        if key in metadata:
            cursor.fail(f"key {show(key)} appears twice", start)
        start = cursor.position
        kind = cursor.integer(U32, f"the type of {show(key)}")
        if kind not in SCALARS and kind not in (STRING, ARRAY):
            cursor.fail(f"{show(key)} has value type {kind}; types 0 to 12 exist", start)
        offsets[key] = cursor.position
        metadata[key] = value = _value(cursor, kind, show(key))
        if key == "general.alignment":
            if kind != UINT32 or not isinstance(value, int):
                cursor.fail(f"'general.alignment' has value type {kind}; uint32 expected", start)
            alignment = value
            if alignment.bit_count() != 1:
                cursor.fail(f"'general.alignment' is {alignment}; a power of 2 expected", start)
    return metadata, offsets, alignment


def _format(cursor: Cursor, name: str) -> Format:
    start = cursor.position
    kind = cursor.integer(U32, f"the type of tensor {show(name)}")
    if kind in FORMATS:
        return FORMATS[kind]
    if kind in REMOVED:
        raise UnsupportedError(
            f"{os.fspath(cursor.path)}: tensor {show(name)} has type {REMOVED[kind]} (id {kind}), "
            "which llama.cpp has removed; quantise the model again to a type of today"
        )
    if kind < 256:  # ggml numbers its types densely: one that is newer than our table
        raise UnsupportedError(
            f"{os.fspath(cursor.path)}: tensor {show(name)} has type id {kind}, which this version "
            f"of mlxfuse does not know (it knows ids up to {max(FORMATS)}); update mlxfuse"
        )
    cursor.fail(f"tensor {show(name)} has type id {kind}; no such type", start)


def _tensor(cursor: Cursor, index: int, shard: int) -> tuple[Tensor, int]:
    """One description, its offset still relative to the data section, and where that stands."""
    name = cursor.name(f"the name of tensor {index}", MAX_NAME)
    start = cursor.position
    dims = cursor.integer(U32, f"the number of dimensions of {show(name)}")
    if dims > MAX_DIMS:
        cursor.fail(f"tensor {show(name)} has {dims} dimensions; at most {MAX_DIMS}", start)
    start = cursor.position
    ne = [cursor.integer(I64, f"the shape of {show(name)}") for _ in range(dims)]
    # Axes of length 0 are legal; the others must still multiply to something that fits.
    if any(n < 0 for n in ne) or math.prod(max(n, 1) for n in ne) >= (1 << 63) - 1:
        cursor.fail(f"tensor {show(name)} has the impossible shape {tuple(ne[::-1])}", start)
    form = _format(cursor, name)
    columns = ne[0] if ne else 1
    if columns % form.block_size:
        cursor.fail(
            f"tensor {show(name)} has rows of {columns}, not a multiple of "
            f"{form.name}'s block of {form.block_size}",
            start,
        )
    nbytes = form.row_bytes(math.prod(ne))
    at = cursor.position
    offset = cursor.integer(U64, f"the offset of {show(name)}")
    return Tensor(name, form, tuple(ne[::-1]), offset, nbytes, shard), at


def _tensors(
    cursor: Cursor, count: int, alignment: int, shard: int, header_only: bool
) -> dict[str, Tensor]:
    found: dict[str, tuple[Tensor, int]] = {}
    for index in range(count):
        start = cursor.position
        tensor, at = _tensor(cursor, index, shard)
        if tensor.name in found:
            cursor.fail(f"tensor {show(tensor.name)} appears twice", start)
        found[tensor.name] = tensor, at

    data_start = -(-cursor.position // alignment) * alignment
    expected = 0  # tensors lie one after the other, each padded to the alignment
    tensors: dict[str, Tensor] = {}
    for t, at in found.values():
        if t.offset != expected:
            cursor.fail(
                f"tensor {show(t.name)} is at offset {t.offset} of the data; {expected} expected "
                "(tensors follow each other without gaps)",
                at,
            )
        begin = data_start + t.offset
        if begin + t.nbytes > cursor.size and not header_only:
            cursor.fail(
                f"truncated or corrupt: tensor {show(t.name)} ends at byte {begin + t.nbytes}, "
                f"the file at {cursor.size}; download the file again",
                begin,
            )
        tensors[t.name] = Tensor(t.name, t.format, t.shape, begin, t.nbytes, shard)
        expected += -(-t.nbytes // alignment) * alignment
    return tensors


def parse(
    path: str | os.PathLike[str], data: mmap.mmap, shard: int, *, header_only: bool = False
) -> Header:
    """The header of one file.

    Args:
        path: for messages.
        data: the whole file.
        shard: what ``Tensor.shard`` shall be.
        header_only: the file ends where its tensors' bytes would begin.

    Raises:
        GGUFError: malformed.
        UnsupportedError: a tensor type that ggml removed or that is newer than this package.
    """
    cursor = Cursor(path, data)
    _check_magic(cursor)
    version = _version(cursor)
    n_tensors = cursor.count("tensors", MIN_TENSOR)
    n_pairs = cursor.count("key-value pairs", MIN_PAIR)
    metadata, offsets, alignment = _pairs(cursor, n_pairs)
    return Header(
        version, metadata, offsets, _tensors(cursor, n_tensors, alignment, shard, header_only)
    )
