"""Malformed files: each case is a valid file with one thing wrong, refused for that very reason.

The capitalised names are those of llama.cpp's ``tests/test-gguf.cpp``, whose verdicts are kept.
"""

from __future__ import annotations

import os
import re
import struct
import tracemalloc
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from mlxfuse.errors import GGUFError, MLXFuseError, ModelRefError, UnsupportedError
from mlxfuse.formats import REMOVED
from mlxfuse.gguf import open_gguf
from tests.gguf import make
from tests.gguf.make import T, Typed, gguf, pair

ONE = {"k": 1}
KEY = 24  # byte of the first key
HUGE = 1 << 62


@dataclass(frozen=True)
class Case:
    """A name, a file, the reason it must be refused for, and where, if that is worth a check."""

    name: str
    raw: bytes
    reason: str
    offset: int | None = None
    error: type[MLXFuseError] = GGUFError


def tensors(*ts: T, **fields: object) -> bytes:
    return gguf({}, ts, **fields)  # type: ignore[arg-type]


def aligned(value: object, *ts: T, **fields: object) -> bytes:
    return gguf({"general.alignment": value}, ts, **fields)  # type: ignore[arg-type]


TWO = (T("a", "F32", (3,)), T("b", "F32", (3,)))
I8_MAX = (2**63 - 64,)

CASES = [
    Case("HEADER_BAD_MAGIC", gguf(magic=b"FUGG"), "expected the magic b'GGUF', found b'FUGG'", 0),
    Case("HEADER_BAD_VERSION_0", gguf(version=0), "GGUF version 0; versions 2 and 3", 4),
    Case("HEADER_BAD_VERSION_1", gguf(version=1), "GGUF version 1; versions 2 and 3", 4),
    Case("HEADER_BAD_VERSION_FUTURE", gguf(version=4), "GGUF version 4; .*update mlxfuse", 4),
    Case("HEADER_BAD_N_TENSORS", gguf(n_tensors=-1), "-1 tensors announced", 8),
    Case("HEADER_BAD_N_KV", gguf(n_pairs=-1), "-1 key-value pairs announced", 16),
    Case("KV_BAD_KEY_SIZE", gguf([pair("k", 1, -1)]), f"key 0 is {2**64 - 1} bytes long", KEY),
    Case("KV_EMPTY_KEY", gguf({"": Typed(make.U64, 0)}), "key 0 is empty", KEY),
    Case("KV_BAD_TYPE", gguf({"k": Typed(13, b"\0")}), "'k' has value type 13", KEY + 9),
    Case("KV_DUPLICATE_KEY", gguf([pair("k", 1)] * 2), "key 'k' appears twice", KEY + 17),
    Case("KV_BAD_ALIGN", aligned(13), "'general.alignment' is 13; a power of 2"),
    Case("KV_WRONG_TYPE_ALIGN", aligned(Typed(make.I32, 32)), "value type 5; uint32 expected"),
    Case("TENSORS_BAD_NAME_SIZE", tensors(T("x" * 64)), "tensor 0 is 64 bytes long; at most 63"),
    Case("TENSORS_BAD_N_DIMS", tensors(T("a", dims=5)), "has 5 dimensions; at most 4"),
    Case("TENSORS_BAD_SHAPE", tensors(T("a", "F32", (-1,), b"")), r"impossible shape \(-1,\)"),
    Case("TENSORS_NE_TOO_BIG", tensors(T("a", "I8", (2**33, 2**33), b"")), "impossible shape"),
    Case("TENSORS_NBYTES_TOO_BIG", tensors(T("a", "I64", (2**31,) * 2, b"")), "ends at byte 3689"),
    # 2**64 - 4 bytes: padded in 64 bits they would be none
    Case(
        "TENSORS_NBYTES_PAD_WRAP",
        tensors(T("a", "I16", (2**63 - 2,), b""), T("b", offset=0)),
        "'b' is at offset 0 .* 18446744073709551616 expected|'a' ends at byte",
    ),
    Case("2^63 - 1 elements", tensors(T("a", "I8", (2**63 - 1,), b"")), "impossible shape"),
    Case("TENSORS_BAD_TYPE", tensors(T("a", 43, (1,), b"")), "id 43,", None, UnsupportedError),
    Case("TENSORS_BAD_OFFSET", tensors(T("a", offset=2**64 - 1)), f"offset {2**64 - 1} .* 0 exp"),
    Case("TENSORS_DUPLICATE_NAME", tensors(T("a"), T("a")), "tensor 'a' appears twice"),
    Case("TENSORS_BAD_ALIGN", aligned(13, *TWO), "alignment' is 13; a power of 2"),
    Case("TENSORS_INCONSISTENT_ALIGN", tensors(*TWO, alignment=1), "offset 12 .* 32 expected"),
    Case("DATA_NOT_ENOUGH_DATA", tensors(T("a", "F32", (8,)))[:-1], "'a' ends at byte"),
    Case("DATA_BAD_ALIGN", aligned(0, *TWO), "alignment' is 0; a power of 2"),
    Case("DATA_INCONSISTENT_ALIGN", aligned(64, *TWO), "offset 32 .* 64 expected"),
    Case(
        "DATA_MEM_SIZE_OVERFLOW",
        tensors(T("a", "I8", I8_MAX, b""), T("b", "I8", I8_MAX, b"", offset=2**63 - 64)),
        "'a' ends at byte",
    ),
    # Ours.
    Case("one byte of the magic", b"G", "the magic needs 4 bytes, 1 are left", 0),
    Case("empty file", b"", "the file is empty", 0),
    Case("Git LFS pointer", b"version https://git-lfs.github.com/spec/v1\noid sha2", "git lfs"),
    Case("safetensors renamed", struct.pack("<Q", 2) + b"{}" + bytes(9), "looks like safetensors"),
    Case("GGJT", b"tjgg" + bytes(40), "from before GGUF"),
    Case("web page", b"<!doctype html><html>", "failed download"),
    Case("text file", b"hello, world\n", "found b'hell'"),
    Case("big-endian", b"GGUF" + struct.pack(">Iqq", 3, 0, 0), "big-endian.*convert-endian", 4),
    Case("key: UTF-8", gguf({b"a\xff": 1}), "key 0 is not valid UTF-8", KEY + 9),
    Case("key: surrogate", gguf({b"\xed\xa0\x80": 1}), "key 0 is not valid UTF-8", KEY + 8),
    Case("key: NUL", gguf({"a\0b": 1}), r"key 0 'a\\x00b' holds a NUL", KEY),
    Case("key: too long", gguf({"k" * 65536: 1}), "key 0 is 65536 bytes long; at most 65535", KEY),
    Case("string: UTF-8", gguf({"k": b"ab\xc3"}), "'k' is not valid UTF-8", KEY + 23),
    Case(
        "string: too long",
        gguf({"k": Typed(make.STRING, make.string("a", 2**30 + 1))}),
        "'k' is 1073741825 bytes long; at most 1073741824",
        KEY + 13,
    ),
    Case(
        "string: beyond the end",
        gguf({"k": Typed(make.STRING, make.string("a", 2))}),
        "'k' needs 2 bytes, 1 are left",
        KEY + 21,
    ),
    Case("strings: UTF-8", gguf({"k": [b"ok", b"a\xff"]}), "string 1 of 'k' is not", KEY + 44),
    Case(
        "strings: beyond the end",
        gguf({"k": make.array(make.STRING, make.string("ok") + make.string("a", 2), 2)}),
        "string 1 of 'k' needs 2 bytes, 1 are left",
        KEY + 43,
    ),
    Case(
        "strings: length beyond the end",
        gguf({"k": make.array(make.STRING, make.string("long enough") + b"abc", 2)}),
        "the length of string 1 of 'k' needs 8 bytes, 3 are left",
        KEY + 44,
    ),
    Case(
        "strings: too long",
        gguf({"k": make.array(make.STRING, make.string("a", -1), 1)}),
        f"string 0 of 'k' is {2**64 - 1} bytes long",
        KEY + 25,
    ),
    Case("array: 2^30 strings", gguf({"k": make.array(make.STRING, bytes(1000), 2**30)}), "announ"),
    Case("array: 2^62 numbers", gguf({"k": make.array(make.U8, bytes(1000), HUGE)}), "^truncated"),
    Case("array: one too many", gguf({"k": make.array(make.U32, bytes(7), 2)}), "2 elements, 7 b"),
    Case("array: nested", gguf({"k": make.array(make.ARRAY, bytes(90), 1)}), "array of arrays"),
    Case("array: type", gguf({"k": make.array(13, bytes(90), 1)}), "element type 13", KEY + 13),
    Case("array: bool", gguf({"k": make.array(make.BOOL, b"\0\1\2", 3)}), "neither 0", KEY + 27),
    Case("bool 2", gguf({"k": Typed(make.BOOL, b"\2")}), "'k' is 2; a bool is 0 or 1", KEY + 13),
    Case("alignment: array", aligned(np.array([32], "u4")), "value type 9; uint32 expected"),
    Case("alignment: bool", aligned(True), "value type 7; uint32 expected"),
    Case("2^60 tensors", gguf(n_tensors=1 << 60), f": {1 << 60} tensors announced", 8),
    Case("2^60 keys", gguf(n_pairs=1 << 60), f": {1 << 60} key-value pairs announced", 16),
    Case("one key too many", gguf(ONE, n_pairs=2), ": 2 key-value pairs announced, 17 b", 16),
    Case("name: UTF-8", tensors(T(b"\xff")), "name of tensor 0 is not valid UTF-8", KEY + 8),
    Case("name: NUL", tensors(T("a\0b")), "name of tensor 0 .* holds a NUL", KEY),
    Case("name: beyond the end", tensors(T("a", name_length=62))[:60], "tensor 0 needs 62"),
    Case("rows not whole blocks", tensors(T("a", "Q4_K", (2, 128), b"")), "rows of 128, .*Q4_K"),
    Case("no dims, blocks", tensors(T("a", "Q8_0", (), b"")), "rows of 1, not a multiple"),
    Case("0 x 2^63 elements", tensors(T("a", "F32", (0, 2**32, 2**32), b"")), "impossible shape"),
    Case("gap", tensors(TWO[0], T("b", offset=64)), "'b' is at offset 64 of the data; 32 expected"),
    Case("overlap", tensors(TWO[0], T("b", offset=0)), "'b' is at offset 0 of the data; 32 expect"),
    Case("not aligned", tensors(TWO[0], T("b", offset=12)), "'b' is at offset 12 of the data; 32"),
    Case("type 255", tensors(T("a", 255, (1,), b"")), "id 255, .*update", error=UnsupportedError),
    Case("type 256", tensors(T("a", 256, (1,), b"")), "type id 256; no such type"),
    Case("type -1", tensors(T("a", -1, (1,), b"")), "type id 4294967295; no such type"),
    *(
        Case(f"removed {name}", tensors(T("a", id, (256,), b"")), f"{name} .*removed", None,
             UnsupportedError)
        for id, name in REMOVED.items()
    ),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_refused(case: Case, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(case.raw)
    with pytest.raises(case.error) as caught:
        open_gguf(path)
    message = str(caught.value)
    assert str(path) in message
    assert len(message) < 400 + len(str(path))
    what = caught.value.what if isinstance(caught.value, GGUFError) else message
    assert re.search(case.reason, what), message
    if case.offset is not None:
        assert isinstance(caught.value, GGUFError)
        assert caught.value.offset == case.offset
    assert type(caught.value).exit_code == (3 if case.error is UnsupportedError else 4)


# The same builders with nothing wrong: a case above is refused for its fault, not for its form.
ACCEPTED = {
    "HEADER_EMPTY": gguf(),
    "KV_RANDOM_KV": gguf(ONE),
    "KV_CUSTOM_ALIGN": aligned(1),
    "TENSORS_SUCCESS": tensors(*TWO),
    "TENSORS_ZERO_DIM": tensors(T("a", "F32", (0, 3))),
    "TENSORS_CUSTOM_ALIGN": aligned(1, *TWO, alignment=1),
    "DATA_SUCCESS": tensors(*TWO),
    "DATA_CUSTOM_ALIGN": aligned(64, *TWO, alignment=64),
    "key of the longest length": gguf({"k" * 65535: 1}),
    "name of the longest length": tensors(T("x" * 63)),
    "string": gguf({"k": Typed(make.STRING, make.string("a", 1))}),
    "strings": gguf({"k": make.array(make.STRING, make.string("ok") + make.string("a"), 2)}),
    "numbers": gguf({"k": make.array(make.U32, bytes(8), 2)}),
    "bools": gguf({"k": make.array(make.BOOL, b"\0\1\1", 3)}),
    "whole blocks": tensors(T("a", "Q4_K", (2, 256))),
    "alignment 2^31": aligned(1 << 31),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_accepted(name: str, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(ACCEPTED[name])
    open_gguf(path).close()


def test_truncated_at_every_byte(tmp_path: Path) -> None:
    """Nothing but the padding after the last tensor can be missing."""
    raw = gguf(
        {"a": "llama", "t": ["a", "bc"], "n": np.arange(3, dtype="i4"), "b": True},
        [T("x", "Q8_0", (1, 32)), T("y", "F32", (2, 3))],
    )
    path = tmp_path / "m.gguf"
    path.write_bytes(raw)
    with open_gguf(path) as f:
        end = f.tensors["y"].offset + f.tensors["y"].nbytes
    assert end < len(raw)
    for length in range(end):
        path.write_bytes(raw[:length])
        with pytest.raises(GGUFError) as caught:
            open_gguf(path)
        assert caught.value.offset is not None
        assert caught.value.offset <= end
    path.write_bytes(raw[:end])
    open_gguf(path).close()


@pytest.mark.parametrize("kind", [make.STRING, make.U64, make.BOOL])
def test_a_count_is_refused_before_anything_is_allocated(tmp_path: Path, kind: int) -> None:
    path = make.write(tmp_path / "m", {"k": make.array(kind, bytes(1000), 2**30)})
    tracemalloc.start()
    try:
        with pytest.raises(GGUFError, match="1073741824 elements, 1000 bytes are left"):
            open_gguf(path)
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()


def test_control_characters_are_escaped(tmp_path: Path) -> None:
    path = make.write(tmp_path / "m", {"\x1b[2J\u202e" + "k" * 5000: Typed(13, b"\0")})
    with pytest.raises(GGUFError) as caught:
        open_gguf(path)
    assert r"'\x1b[2J\u202ekkk" in caught.value.what
    assert len(caught.value.what) < 200
    assert caught.value.what.isprintable()


# What is not a file.


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(ModelRefError, match="No such file"):
        open_gguf(tmp_path / "nosuch.gguf")
    with pytest.raises(ModelRefError, match="holds a NUL"):
        open_gguf("a\0b.gguf")
    with pytest.raises(ModelRefError, match="too long"):
        open_gguf(tmp_path / ("a" * 5000))
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(ModelRefError, match="symbolic links"):
        open_gguf(tmp_path / "loop")


def test_directory(tmp_path: Path) -> None:
    with pytest.raises(ModelRefError, match="is a directory"):
        open_gguf(tmp_path)


def test_pipe_and_device_are_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(ModelRefError, match="not a regular file"):
            open_gguf(path)


def test_no_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make.write(tmp_path / "m")

    def denied(self: Path, *args: object, **kwargs: object) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "open", denied)  # root, as in a container, may read anything
    with pytest.raises(ModelRefError, match="Permission denied"):
        open_gguf(path)
