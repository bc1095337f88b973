"""A matrix for each head stays in its file's blocks, and gives what mlx-lm's dense one gives."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.mla import MultiLinear

from mlxfuse.formats import BY_NAME
from mlxfuse.kernels import launches
from mlxfuse.kernels.weight import QuantizedWeight
from mlxfuse.loader import load
from mlxfuse.nn.heads import QuantizedMultiLinear
from tests import msl
from tests.kernels.weights import expected, random_blocks, segment
from tests.models import tiny

HEADS, ROWS, COLUMNS = 4, 24, 64


def pair(name: str) -> tuple[QuantizedMultiLinear, MultiLinear]:
    """Ours, and mlx-lm's with the values of the same blocks."""
    format = BY_NAME[name]
    data = random_blocks(format, HEADS * ROWS, COLUMNS)
    ours = QuantizedMultiLinear(QuantizedWeight.whole(segment(data, format, experts=HEADS)))
    stock = MultiLinear(COLUMNS, ROWS, HEADS)
    stock.weight = mx.array(expected(data, format)).reshape(HEADS, ROWS, COLUMNS)
    return ours, stock


def apart(got: mx.array, want: mx.array) -> float:
    assert got.shape == want.shape
    return float(mx.abs(got - want).max() / mx.abs(want).max())


@pytest.mark.parametrize("name", ["Q8_0", "Q4_0", "Q5_1", "IQ4_NL"])
def test_each_head_multiplies_by_its_own(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLXFUSE_KERNELS", "reference")
    ours, stock = pair(name)
    for batch, length in ((1, 1), (2, 1), (1, 5)):
        x = mx.random.normal((batch, HEADS, length, COLUMNS), key=mx.random.key(0))
        assert apart(ours(x), stock(x)) < 1e-6
        assert apart(ours(x), stock(x[:, ::-1])) > 0.1  # control: of another head
    latent = mx.random.normal((1, 1, 5, ROWS), key=mx.random.key(1))
    assert apart(ours(latent, transpose=False), stock(latent, transpose=False)) < 1e-6


def test_a_decoded_token_multiplies_the_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLXFUSE_KERNELS", "emulated")
    ours, stock = pair("Q8_0")
    x = mx.random.normal((2, HEADS, 1, COLUMNS), key=mx.random.key(0))
    launches.clear()
    with msl.installed(build="fast"):
        assert apart(ours(x), stock(x)) < 1e-5
        assert launches["quantized_matmul"] == 1
        assert not launches["dequantize"]
        ours(mx.repeat(x[:1], 3, axis=2))  # a prompt of three tokens
        assert launches["dequantize"] == 1


def test_a_model_holds_the_files_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLXFUSE_KERNELS", "reference")
    gguf = tiny.build("deepseek2", 1)  # in Q8_0
    model, _ = load(tiny.write(tmp_path / "m.gguf", gguf), fuse="all")
    for i, layer in enumerate(model.layers):
        for name, tensor in (("embed_q", "attn_k_b"), ("unembed_out", "attn_v_b")):
            module = layer.self_attn[name]
            assert isinstance(module, QuantizedMultiLinear)
            data, kind = gguf.tensors[f"blk.{i}.{tensor}.weight"]
            assert kind == "Q8_0"
            assert sum(a.nbytes for s in module._streams for a in s.values()) == data.nbytes
            assert np.array_equal(np.array(module.weight.experts), 4)
