"""Well-formed files: what comes out is what was written."""

from __future__ import annotations

import gc
import math
import mmap
import os
from pathlib import Path

import gguf as gguf_py
import numpy as np
import pytest

from mlxfuse.errors import GGUFError
from mlxfuse.formats import BY_NAME, FORMATS
from mlxfuse.gguf import GGUFFile, open_gguf, reader
from tests.gguf import make
from tests.gguf.make import T, Typed

ARRAYS = {
    code: np.array(values, dtype=code)
    for code, values in {
        "u1": [0, 255],
        "i1": [-128, 127],
        "u2": [0, 65535],
        "i2": [-32768, 32767],
        "u4": [0, 2**32 - 1],
        "i4": [-(2**31), 2**31 - 1],
        "u8": [0, 2**64 - 1],
        "i8": [-(2**63), 2**63 - 1],
        "f4": [-1.5, np.inf],
        "f8": [0.1, -np.inf],
        "?": [True, False, True],
    }.items()
}
SCALARS = {
    "one u8": Typed(make.U8, 255),
    "one i8": Typed(make.I8, -128),
    "one u16": Typed(make.U16, 65535),
    "one i16": Typed(make.I16, -32768),
    "one u32": Typed(make.U32, 2**32 - 1),
    "one i32": Typed(make.I32, -(2**31)),
    "one u64": Typed(make.U64, 2**64 - 1),
    "one i64": Typed(make.I64, -(2**63)),
    "one f32": Typed(make.F32, 0.5),
    "one f64": Typed(make.F64, 0.1),
}


@pytest.mark.parametrize("version", [2, 3])
def test_every_value_type(tmp_path: Path, version: int) -> None:
    strings = ["", "a", "héllo", "日本", "\U0001f600", "with\0nul", "x" * 300]
    metadata = {
        **SCALARS,
        **ARRAYS,
        "yes": True,
        "no": False,
        "text": "späm",
        "strings": strings,
        "none": [],
        "no numbers": np.array([], "f4"),
    }
    with open_gguf(make.write(tmp_path / "a", metadata, version=version)) as f:
        assert f.version == version
        assert list(f.metadata) == list(metadata)
        for key, typed in SCALARS.items():
            assert f.metadata[key] == typed.value
            assert type(f.metadata[key]) is type(typed.value)
        for key, array in [*ARRAYS.items(), ("no numbers", np.array([], "f4"))]:
            found = f.metadata[key]
            assert isinstance(found, np.ndarray)
            assert found.dtype == array.dtype
            assert not found.flags.writeable
            np.testing.assert_array_equal(found, array)
        assert f.metadata["yes"] is True
        assert f.metadata["no"] is False
        assert f.metadata["text"] == "späm"
        assert f.metadata["strings"] == strings
        assert f.metadata["none"] == []


@pytest.mark.parametrize("alignment", [1, 32, 64, 4096])
def test_tensors_of_every_format(tmp_path: Path, alignment: int) -> None:
    tensors = [
        T(f.name, f.id, (2, 3, f.block_size * 2), os.urandom(12 * f.type_size))
        for f in FORMATS.values()
    ]
    path = make.write(
        tmp_path / "a", {"general.alignment": alignment}, tensors, alignment=alignment
    )
    with open_gguf(path) as f:
        assert list(f.tensors) == [t.name for t in tensors]
        for t in tensors:
            found = f.tensors[str(t.name)]
            assert found.format is FORMATS[t.id]
            assert found.shape == t.shape
            assert found.nbytes == len(t.payload())
            assert found.row_bytes == 2 * found.format.type_size
            assert found.rows == 6
            assert found.offset % alignment == 0
            assert f.view(found).tobytes() == t.payload()
            assert f.read(found).tobytes() == t.payload()
            want = t.payload()[2 * found.row_bytes : 5 * found.row_bytes]
            assert f.read(found, slice(2, 5)).tobytes() == want
            assert f.read(found, slice(-1, None)).tobytes() == t.payload()[-found.row_bytes :]
            assert f.read(found, slice(5, 2)).size == 0


def test_shapes_at_the_edge(tmp_path: Path) -> None:
    """A tensor without dimensions is one element; axes of length 0 are legal in llama.cpp too."""
    shapes = [(), (0,), (2, 0), (0, 32), (1, 1, 1, 1), (0, 2**40)]
    tensors = [T(str(s), "F32", s) for s in shapes] + [T("end", "Q4_0", (0, 64))]
    with open_gguf(make.write(tmp_path / "a", {}, tensors)) as f:
        for shape in shapes:
            t = f.tensors[str(shape)]
            assert t.shape == shape
            assert t.nbytes == 4 * math.prod(shape)
            assert f.read(t).nbytes == f.view(t).nbytes == t.nbytes
        assert f.read(f.tensors["end"]).size == 0


def test_data_need_not_be_padded_at_the_end(tmp_path: Path) -> None:
    raw = make.gguf({}, [T("a", "F32", (3,))])
    path = tmp_path / "a"
    path.write_bytes(raw[: len(raw) - 20])
    with open_gguf(path) as f:
        assert f.read(f.tensors["a"]).tobytes() == bytes(range(12))
    path.write_bytes(raw[: len(raw) - 21])
    with pytest.raises(GGUFError, match="tensor 'a' ends at byte"):
        open_gguf(path)


def test_header_alone(tmp_path: Path) -> None:
    """HEADER_EMPTY: no keys and no tensors is well-formed; it has no architecture."""
    with open_gguf(make.write(tmp_path / "a")) as f:
        assert (dict(f.metadata), f.tensors, f.size) == ({}, {}, 24)
        with pytest.raises(GGUFError, match=r"'general\.architecture' is missing"):
            _ = f.architecture


def test_views_are_read_only_and_outlive_the_file(tmp_path: Path) -> None:
    f = open_gguf(make.write(tmp_path / "a", {}, [T("a", "F32", (4,))]))
    view = f.view(f.tensors["a"])
    fresh = f.read(f.tensors["a"])
    assert np.shares_memory(view, f.view(f.tensors["a"]))
    assert not np.shares_memory(view, fresh)
    with pytest.raises(ValueError, match="read-only"):
        view[0] = 1
    fresh[0] = 1
    f.close()
    f.close()
    del f
    gc.collect()
    assert view.tobytes() == bytes(range(16))


def test_no_file_stays_open(tmp_path: Path) -> None:
    def count() -> int:
        gc.collect()
        return len(os.listdir("/dev/fd"))

    good = make.shards(tmp_path, [[T("a")], [T("b")]])[0]
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(good.read_bytes()[:-20])
    before = count()
    with open_gguf(good):
        assert count() > before
    assert count() == before
    for _ in range(3):
        with pytest.raises(GGUFError):
            open_gguf(bad)
    assert count() == before


def test_read_sees_a_file_that_shrank(tmp_path: Path) -> None:
    path = make.write(tmp_path / "a", {}, [T("a", "F32", (4096,)), T("b", "F32", (4096,))])
    with open_gguf(path) as f:
        os.truncate(path, f.tensors["b"].offset + 100)
        assert f.read(f.tensors["a"]).size == 4 * 4096
        with pytest.raises(GGUFError, match="ends inside tensor 'b'") as caught:
            f.read(f.tensors["b"])
        assert caught.value.offset == f.tensors["b"].offset + 100


def test_read_goes_on_after_a_short_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "READ_CHUNK", 7)
    payload = os.urandom(400)
    with open_gguf(make.write(tmp_path / "a", {}, [T("a", "F32", (100,), payload)])) as f:
        assert f.read(f.tensors["a"]).tobytes() == payload


def test_read_refuses_a_stride(tmp_path: Path) -> None:
    with (
        open_gguf(make.write(tmp_path / "a", {}, [T("a", "F32", (4, 4))])) as f,
        pytest.raises(ValueError, match="step 1"),
    ):
        f.read(f.tensors["a"], slice(0, 4, 2))


@pytest.fixture
def keys(tmp_path: Path) -> GGUFFile:
    return open_gguf(
        make.write(
            tmp_path / "keys",
            {
                "general.architecture": "llama",
                "n": 7,
                "minus": Typed(make.I32, -1),
                "big": Typed(make.U64, 2**63),
                "eps": 0.5,
                "nan": math.nan,
                "inf": Typed(make.F64, math.inf),
                "flag": True,
                "names": ["a", "b"],
                "numbers": np.array([1, 2], "i4"),
            },
        )
    )


def test_get(keys: GGUFFile) -> None:
    assert keys.architecture == "llama"
    assert keys.get("n", int) == 7
    assert keys.get("eps", float) == 0.5
    as_float = keys.get("n", float)
    assert (type(as_float), as_float) == (float, 7.0)
    assert keys.get("flag", bool) is True
    assert keys.get("names", list) == ["a", "b"]
    assert keys.get("numbers", list) == [1, 2]
    assert keys.get("absent", int, 3) == 3
    assert keys.get("absent", str, None) is None


@pytest.mark.parametrize(
    ("key", "kind", "what"),
    [
        ("absent", int, "'absent' is missing"),
        ("eps", int, "int expected, found float"),
        ("flag", int, "int expected, found bool"),
        ("flag", float, "float expected, found bool"),
        ("n", bool, "bool expected, found int"),
        ("n", str, "str expected, found int"),
        ("n", list, "list expected, found int"),
        ("names", str, "str expected, found list"),
        ("numbers", int, "int expected, found ndarray"),
        ("minus", int, "0 to 2147483647 expected, found -1"),
        ("big", int, "0 to 2147483647 expected, found 9223372036854775808"),
        ("nan", float, "a finite number expected, found nan"),
        ("inf", float, "a finite number expected, found inf"),
    ],
)
def test_get_refuses(keys: GGUFFile, key: str, kind: type, what: str) -> None:
    with pytest.raises(GGUFError, match=what) as caught:
        keys.get(key, kind)
    if key != "absent":  # the offset is that of the value
        raw = keys.path.read_bytes()
        assert caught.value.offset == raw.index(make.string(key)) + 8 + len(key) + 4


def test_a_default_does_not_hide_a_wrong_type(keys: GGUFFile) -> None:
    with pytest.raises(GGUFError, match="int expected"):
        keys.get("eps", int, 3)


def test_shards(tmp_path: Path) -> None:
    """Tensors of every shard in order, metadata of the first; links are followed by name."""
    files = [[T("a"), T("b", "Q8_0", (2, 32))], [], [T("c", data=b"sixteen bytes...")]]
    real = make.shards(tmp_path, files, "m", **{"general.architecture": "llama"})
    folder = tmp_path / "snapshot"
    folder.mkdir()
    links = [folder / p.name for p in real]
    for i, (link, path) in enumerate(zip(links, real, strict=True)):
        link.symlink_to(path.rename(tmp_path / f"blob{i}"))
    with open_gguf(links[0]) as f:
        assert f.paths == tuple(links)
        assert f.path == links[0]
        assert f.architecture == "llama"
        assert f.size == sum(p.stat().st_size for p in links)
        assert {t.name: t.shard for t in f.tensors.values()} == {"a": 0, "b": 0, "c": 2}
        assert f.view(f.tensors["c"]).tobytes() == b"sixteen bytes..."
        assert f.read(f.tensors["c"]).tobytes() == b"sixteen bytes..."


def test_a_set_of_one_may_have_any_name(tmp_path: Path) -> None:
    make.shards(tmp_path, [[T("a")]])[0].rename(tmp_path / "renamed.gguf")
    with open_gguf(tmp_path / "renamed.gguf") as f:
        assert list(f.tensors) == ["a"]


def test_a_file_of_gguf_py(tmp_path: Path) -> None:
    """An independent writer: names, shapes, types, bytes and metadata as it was told."""
    rng = np.random.default_rng(0)
    weights = rng.standard_normal((6, 64)).astype(np.float32)
    q8 = gguf_py.quantize(weights, gguf_py.GGMLQuantizationType.Q8_0)
    path = tmp_path / "a.gguf"
    writer = gguf_py.GGUFWriter(path, "qwen2")
    writer.add_block_count(3)
    writer.add_rope_freq_base(10000.0)
    writer.add_token_list(["<s>", "é"])
    writer.add_token_scores([0.0, -1.5])
    writer.add_add_bos_token(False)
    writer.add_tensor("f", weights)
    writer.add_tensor("q", q8, raw_dtype=gguf_py.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with open_gguf(path) as f:
        assert f.architecture == "qwen2"
        assert f.get("qwen2.block_count", int) == 3
        assert f.get("qwen2.rope.freq_base", float) == 10000.0
        assert f.get("tokenizer.ggml.tokens", list) == ["<s>", "é"]
        assert f.get("tokenizer.ggml.scores", list) == [0.0, -1.5]
        assert f.get("tokenizer.ggml.add_bos_token", bool) is False
        assert f.tensors["f"].format is BY_NAME["F32"]
        assert f.tensors["q"].format is BY_NAME["Q8_0"]
        assert f.tensors["f"].shape == f.tensors["q"].shape == (6, 64)
        assert f.read(f.tensors["f"]).tobytes() == weights.tobytes()
        assert f.read(f.tensors["q"]).tobytes() == q8.tobytes()


def test_the_mapping_is_read_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[object] = []
    real = mmap.mmap
    monkeypatch.setattr(mmap, "mmap", lambda *a, **k: (seen.append(k["access"]), real(*a, **k))[1])
    open_gguf(make.write(tmp_path / "a")).close()
    assert seen == [mmap.ACCESS_READ]
