"""From the file's bytes to quantised layers: exact values, no byte twice, errors."""

import gc
import os
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map, tree_reduce

from mlxfuse.errors import GGUFError
from mlxfuse.gguf.reader import open_gguf
from mlxfuse.gguf.relayout import restore
from mlxfuse.kernels.matmul.dequantize import dequantize
from mlxfuse.loader import load
from mlxfuse.models import streams
from mlxfuse.models.rows import RowSource
from mlxfuse.nn.experts import QuantizedSwitchLinear
from mlxfuse.nn.quantized import QuantizedEmbedding, QuantizedLinear
from tests.models import tiny

KERNEL_CASES = [
    name for name, case in tiny.CASES.items() if set(case.formats.values()) - {"F32", "F16", "BF16"}
]


def quantised(path: Path, **more: object) -> nn.Module:
    """Unfused, but with the layers that a fused model has."""
    return load(path, fuse="residual", **more)[0]


def dense(layer: nn.Module) -> np.ndarray:
    if not isinstance(layer, (QuantizedLinear, QuantizedEmbedding, QuantizedSwitchLinear)):
        return np.array(layer.weight)
    rows = []
    for part in layer.weight.parts:
        rows.append(np.array(dequantize(part.segment))[..., part.first :, :][..., : part.rows, :])
    return np.concatenate(rows)


@pytest.mark.parametrize("name", KERNEL_CASES)
def test_every_layer_has_the_dense_models_weights(name: str, tmp_path: Path) -> None:
    path = tiny.write(tmp_path / "m.gguf", tiny.build(name, 0))
    want = dict(load(path)[0].named_modules())
    found = dict(quantised(path).named_modules())
    assert found.keys() >= {n for n, m in want.items() if "weight" in m}
    kinds = set()
    for at, module in want.items():
        if "weight" not in module:
            continue
        layer = found[at]
        kinds.add(type(layer))
        assert np.array_equal(dense(layer), np.array(module.weight)), at
        if "bias" in module:
            assert mx.array_equal(layer.bias, module.bias), at
    assert {QuantizedEmbedding, QuantizedLinear} <= kinds


def test_a_wrong_row_order_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Control for the test above: llama's q and k as the file has them."""
    path = tiny.write(tmp_path / "m.gguf", tiny.build("llama-q4", 0))
    want = load(path)[0].layers[0].self_attn
    monkeypatch.setattr("mlxfuse.models.rows.RowSource.order", lambda self: None)
    found = quantised(path).layers[0].self_attn
    assert not np.array_equal(dense(found.q_proj), np.array(want.q_proj.weight))
    assert np.array_equal(dense(found.v_proj), np.array(want.v_proj.weight))


def test_a_group_is_one_weight_and_its_layers_are_views(tmp_path: Path) -> None:
    path = tiny.write(tmp_path / "m.gguf", tiny.build("llama-q4", 0))
    attention = quantised(path).layers[0].self_attn
    whole = attention.q_proj.place.whole
    assert [s.name for s in whole.segments] == ["Q4_0", "Q8_0"]
    assert [(p.segment.name, p.first, p.rows) for p in whole.parts] == [
        ("Q4_0", 0, 64),
        ("Q4_0", 64, 32),
        ("Q8_0", 0, 32),
    ]
    for i, name in enumerate(("q_proj", "k_proj", "v_proj")):
        place = attention[name].place
        assert (place.whole, place.first) == (whole, i)
        assert place.whole is whole
        (segment,) = attention[name].weight.segments
        address = {n: np.asarray(a).ctypes.data for n, a in segment.arrays.items()}
        part = whole.parts[i]
        for n, a in part.segment.arrays.items():
            assert address[n] == np.asarray(a)[part.first :].ctypes.data


def test_the_streams_are_the_files_bytes(tmp_path: Path) -> None:
    path = tiny.write(tmp_path / "m.gguf", tiny.build("llama-k-quants", 0))
    model = quantised(path)
    with open_gguf(path) as file:
        for i, name in ((0, "ffn_down"), (1, "attn_v")):
            tensor = file.tensors[f"blk.{i}.{name}.weight"]
            block = model.layers[i]
            layer = block.mlp.down_proj if name == "ffn_down" else block.self_attn.v_proj
            (segment,) = layer.weight.segments
            arrays = {n: np.asarray(a) for n, a in segment.arrays.items()}
            out = np.empty((tensor.shape[0], tensor.row_bytes), np.uint8)
            restore(arrays, tensor.format, out)
            assert out.tobytes() == file.read(tensor).tobytes()


def test_what_mlx_lm_does_to_a_model_leaves_the_streams(tmp_path: Path) -> None:
    path = tiny.write(tmp_path / "m.gguf", tiny.build("qwen2", 0))
    model = quantised(path)
    with open_gguf(path) as file:
        stored = sum(t.nbytes for t in file.tensors.values())
    # MLX-LM's own count of what a model takes.
    counted = tree_reduce(lambda n, a: n + a.nbytes if isinstance(a, mx.array) else n, model, 0)
    assert counted == stored
    layer = model.layers[0].self_attn.q_proj
    before = dense(layer)
    model.set_dtype(mx.bfloat16)
    assert model.layers[0].input_layernorm.weight.dtype == mx.bfloat16
    assert np.array_equal(dense(layer), before)
    assert not [n for n, _ in tree_flatten(model.trainable_parameters()) if "stream" in n]
    model.update(tree_map(lambda a: a, model.parameters()))


def test_look_up_and_tied_head_share_the_bytes(tmp_path: Path) -> None:
    path = tiny.write(tmp_path / "m.gguf", tiny.build("llama", 0))
    table = np.array(load(path)[0].model.embed_tokens.weight)
    embedding = quantised(path).model.embed_tokens
    ids = mx.array([[3, 0, 258], [7, 7, 1]])
    assert np.array_equal(np.array(embedding(ids)), table[np.array(ids)])
    x = np.random.RandomState(0).standard_normal((5, 64)).astype(np.float32)
    got = np.array(embedding.as_linear(mx.array(x)))
    np.testing.assert_allclose(got, x @ table.T, rtol=0, atol=2e-5)
    assert embedding(mx.zeros((1, 0), mx.int32)).shape == (1, 0, 64)


DENSE = "its linears are dense and quantised"


def test_a_type_without_a_kernel_is_reported(tmp_path: Path) -> None:
    model = tiny.build("llama-k-quants", 0)
    shape = model.weights("blk.1.attn_v.weight").shape
    blocks = np.zeros((shape[0], 292 * shape[1] // 256), np.uint8)
    model.tensors["blk.1.attn_v.weight"] = blocks, "Q8_K"
    path = tiny.write(tmp_path / "m.gguf", model)
    loaded, _ = load(path, fuse="all")
    report = loaded.load_report
    assert report.dequantized == {"Q8_K": [1, shape[0] * 292, shape[0] * 256 * 4]}
    assert report.lines() == ["Q8_K has no kernel: 1 matrices of 0.0 MB take 0.1 MB"]
    assert str(report.patch).startswith("qkv 1/2 (1 mixed: q4_k, q6_k), gate/up 2/2")
    assert report.patch.rows()[0] == ("qkv", "1", "2", f"1 mixed: q4_k, q6_k; 1: {DENSE}")
    assert isinstance(loaded.layers[1].self_attn.q_proj, QuantizedLinear)
    assert ("qkv", "model.layers.1.self_attn", DENSE) in report.patch.skipped
    assert load(path)[0].load_report.dequantized == {}


def test_a_file_that_shrinks_while_it_loads_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny.write(tmp_path / "m.gguf", tiny.build("llama", 0))
    real = streams.fill

    def shrink(*arguments: object) -> None:
        real(*arguments)
        os.truncate(path, path.stat().st_size // 2)

    monkeypatch.setattr(streams, "fill", shrink)
    with pytest.raises(GGUFError, match="changed while open"):
        quantised(path)


def test_the_next_groups_bytes_are_read_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one group and no more, which bounds the memory; nobody has asked for them yet."""
    path = tiny.write(tmp_path / "m.gguf", tiny.build("llama-k-quants", 0))
    plain = quantised(path)
    loaders: list[streams.StreamLoader] = []
    ahead: list[int] = []
    real, real_init = streams.fill, streams.StreamLoader.__init__

    def fill(*arguments: object) -> None:
        reading = loaders[0]._ahead[1]
        assert not streams.wait(reading, timeout=60).not_done
        ahead.append(len(reading))
        real(*arguments)

    def made(self: streams.StreamLoader, *arguments: object) -> None:
        real_init(self, *arguments)
        loaders.append(self)

    monkeypatch.setattr(streams, "fill", fill)
    monkeypatch.setattr(streams.StreamLoader, "__init__", made)
    model = quantised(path)
    assert max(ahead) == 3  # q, k and v
    assert ahead[-1] == 0
    assert len(loaders) == 1
    for (name, a), (_, b) in zip(
        tree_flatten(model.parameters()), tree_flatten(plain.parameters()), strict=True
    ):
        assert mx.array_equal(a, b), name


def test_no_reader_is_left_when_loading_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is closed then, and its number may be another file's."""
    path = tiny.write(tmp_path / "m.gguf", tiny.build("llama-k-quants", 0))
    real, running = RowSource.bytes, []

    def slow(self: RowSource, *arguments: object, **options: object) -> np.ndarray:
        running.append(self)
        threading.Event().wait(0.05)
        found = real(self, *arguments, **options)
        running.remove(self)
        return found

    def fail(*arguments: object) -> None:
        raise ValueError("no")

    monkeypatch.setattr(RowSource, "bytes", slow)
    monkeypatch.setattr(streams, "fill", fail)
    with pytest.raises(ValueError, match="no"):
        quantised(path)
    assert running == []


def test_a_long_relayout_offers_an_export(tmp_path: Path) -> None:
    report = quantised(tiny.write(tmp_path / "m.gguf", tiny.build("llama-q4", 0))).load_report
    assert report.as_dict()["ways"] == {"relaid": report.ways["relaid"]}
    assert not any("export" in line for line in report.lines())
    (line,) = replace(report, seconds={"relayout": 5.6}).lines()
    assert line.startswith("Laying out the weights took 6 s; `mlxfuse export MODEL FOLDER`")


def test_relayout_time_has_the_arrays_it_fills(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny.write(tmp_path / "m.gguf", tiny.build("llama-k-quants", 0))
    clock = [0.0]
    real = streams.allocate

    def slow(*arguments: object) -> dict[str, mx.array]:
        clock[0] += 1.0
        return real(*arguments)

    monkeypatch.setattr(streams, "allocate", slow)
    monkeypatch.setattr(streams, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    seconds = quantised(path).load_report.seconds
    assert clock[0] > 3
    assert seconds["relayout"] == sum(seconds.values()) == clock[0]


def test_the_demo_model_takes_its_files_bytes(demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Resident bytes after load, and the steps that are timed."""
    monkeypatch.setenv("MLXFUSE_KERNELS", "emulated")
    with open_gguf(demo) as file:
        stored = sum(t.nbytes for t in file.tensors.values())
    # Other tests' models, and their buffers, which MLX reuses for smaller arrays.
    gc.collect()
    mx.clear_cache()
    before = mx.get_active_memory()
    model, _ = load(demo)
    assert stored <= mx.get_active_memory() - before <= 1.001 * stored
    assert str(model.load_report.patch).startswith("qkv 30/30")
    assert model.load_report.seconds.keys() == {
        *("header", "tokenizer", "read", "relayout", "dequantize")
    }
