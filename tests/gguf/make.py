"""Tiny GGUF files, byte by byte, with a hook for every field, so that any of them can be wrong.

``gguf()`` with plain arguments gives a valid file; each keyword puts a chosen value, or raw bytes,
where the right one would stand.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mlxfuse.formats import BY_NAME, FORMATS

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
LAYOUT = dict(zip((U8, I8, U16, I16, U32, I32, F32, U64, I64, F64), "BbHhIifQqd", strict=True))
OF_DTYPE = {
    np.dtype(code).newbyteorder("="): kind
    for code, kind in zip(
        ("u1", "i1", "u2", "i2", "u4", "i4", "f4", "?", "u8", "i8", "f8"),
        (U8, I8, U16, I16, U32, I32, F32, BOOL, U64, I64, F64),
        strict=True,
    )
}


@dataclass(frozen=True)
class Typed:
    """A scalar of a chosen GGUF type, or raw bytes said to be of that type."""

    kind: int
    value: int | float | bytes


@dataclass(frozen=True)
class T:
    """A tensor. ``shape`` is row-major; bytes are 0, 1, 2, ... unless ``data`` is given.

    ``kind`` is a type's name or a raw id; the other fields override what would be written.
    """

    name: str | bytes
    kind: str | int = "F32"
    shape: tuple[int, ...] = (4,)
    data: bytes | None = None
    dims: int | None = None
    offset: int | None = None
    name_length: int | None = None

    @property
    def id(self) -> int:
        return BY_NAME[self.kind].id if isinstance(self.kind, str) else self.kind

    def payload(self) -> bytes:
        if self.data is not None:
            return self.data
        form = FORMATS[self.id]
        nbytes = math.prod(self.shape) // form.block_size * form.type_size
        return bytes(i % 256 for i in range(nbytes))


def string(text: str | bytes, length: int | None = None) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", (len(raw) if length is None else length) & (1 << 64) - 1) + raw


def array(kind: int, payload: bytes, count: int) -> Typed:
    """An array's value with its element type and count as given."""
    return Typed(ARRAY, struct.pack("<IQ", kind, count) + payload)


def value(item: object) -> tuple[int, bytes]:
    """(type id, bytes): bool, int (u32), float (f32), str, list[str], numpy array or Typed."""
    if isinstance(item, Typed):
        if isinstance(item.value, bytes):
            return item.kind, item.value
        return item.kind, struct.pack("<" + LAYOUT[item.kind], item.value)
    if isinstance(item, bool):
        return BOOL, bytes([item])
    if isinstance(item, int):
        return U32, struct.pack("<I", item)
    if isinstance(item, float):
        return F32, struct.pack("<f", item)
    if isinstance(item, str | bytes):
        return STRING, string(item)
    if isinstance(item, np.ndarray):
        return value(array(OF_DTYPE[item.dtype], item.tobytes(), item.size))
    assert isinstance(item, list)
    return value(array(STRING, b"".join(map(string, item)), len(item)))


def pair(key: str | bytes, item: object, key_length: int | None = None) -> bytes:
    kind, payload = value(item)
    return string(key, key_length) + struct.pack("<I", kind) + payload


def pad(raw: bytes, alignment: int) -> bytes:
    return raw + bytes(-len(raw) % alignment)


def gguf(
    metadata: Mapping[str, object] | Iterable[bytes] = (),
    tensors: Iterable[T] = (),
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    n_tensors: int | None = None,
    n_pairs: int | None = None,
    alignment: int = 32,
) -> bytes:
    """A whole file. ``metadata`` is a mapping, or pairs as bytes for malformed ones.

    ``alignment`` is how the data is laid out; the key ``general.alignment`` is not added.
    """
    pairs = (
        [pair(k, v) for k, v in metadata.items()]
        if isinstance(metadata, Mapping)
        else list(metadata)
    )
    tensors = list(tensors)
    count_t = len(tensors) if n_tensors is None else n_tensors
    count_p = len(pairs) if n_pairs is None else n_pairs
    out = magic + struct.pack("<Iqq", version, count_t, count_p) + b"".join(pairs)
    data = b""
    for t in tensors:
        ne = t.shape[::-1]
        out += string(t.name, t.name_length)
        out += struct.pack("<I", len(ne) if t.dims is None else t.dims)
        out += struct.pack(f"<{len(ne)}q", *ne)
        offset = len(data) if t.offset is None else t.offset
        out += struct.pack("<IQ", t.id & 0xFFFFFFFF, offset)
        data += pad(t.payload(), alignment)
    return pad(out, alignment) + data if tensors else out


def write(path: Path, *args: object, **fields: object) -> Path:
    """``gguf(...)`` into a file."""
    path.write_bytes(gguf(*args, **fields))  # type: ignore[arg-type]
    return path


def shards(folder: Path, files: list[list[T]], prefix: str = "m", **first: object) -> list[Path]:
    """A valid set, one shard for each list of tensors; ``first`` is the first one's metadata."""
    paths = []
    for index, tensors in enumerate(files):
        split = {
            "split.no": Typed(U16, index),
            "split.count": Typed(U16, len(files)),
            "split.tensors.count": Typed(I32, sum(map(len, files))),
        }
        path = folder / f"{prefix}-{index + 1:05d}-of-{len(files):05d}.gguf"
        paths.append(write(path, {**first, **split} if index == 0 else split, tensors))
    return paths
