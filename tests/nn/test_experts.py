"""Experts' matrices: which kernel multiplies them, bit for bit, and what is read of them."""

import mlx.core as mx
import numpy as np
import pytest

from mlxfuse.formats import BY_NAME
from mlxfuse.kernels.quantized_matmul import quantized_matmul
from mlxfuse.kernels.weight import Part, QuantizedWeight, Segment
from mlxfuse.nn import experts
from mlxfuse.nn.experts import QuantizedSwitchLinear, SwitchLinear
from mlxfuse.nn.quantized import QuantizedLinear
from tests import msl
from tests.kernels.weights import expected, random_blocks, segment

EXPERTS, ROWS, COLUMNS = 5, 22, 64
FORMAT = BY_NAME["MXFP4"]
DATA = random_blocks(FORMAT, EXPERTS * ROWS, COLUMNS)


def switch(bias: mx.array | None = None) -> tuple[QuantizedSwitchLinear, np.ndarray]:
    """The last 10 rows of every expert's 22, and their values [experts, 10, columns]."""
    part = Part(segment(DATA, FORMAT, experts=EXPERTS), 12, 10)
    values = expected(DATA, FORMAT).reshape(EXPERTS, ROWS, COLUMNS)[:, 12:]
    return QuantizedSwitchLinear(QuantizedWeight((part,)), bias), values


def activations(*lead: int, dtype: mx.Dtype = mx.float16) -> mx.array:
    rng = np.random.default_rng(3)
    return mx.array(rng.standard_normal((*lead, 1, COLUMNS)), mx.float32).astype(dtype)


@pytest.mark.parametrize("shared", [True, False])
def test_each_row_has_the_bits_of_its_experts_own_linear(shared: bool, kernels: str) -> None:
    bias = mx.array(np.random.default_rng(4).standard_normal((EXPERTS, 10)), mx.float16)
    layer, _ = switch(bias)
    ids = mx.array([[3, 0, 3], [1, 4, 0]], mx.uint32)
    x = activations(2, 1) if shared else activations(2, 3)
    got = layer(x, ids)
    assert got.shape == (2, 3, 1, 10)
    rows = DATA.reshape(EXPERTS, ROWS, -1)[:, 12:]
    for i in range(2):
        for j in range(3):
            expert = int(ids[i, j])
            own = QuantizedWeight.whole(segment(rows[expert].copy(), FORMAT))
            want = QuantizedLinear(own, bias[expert])(x[i, 0 if shared else j])
            assert mx.array_equal(got[i, j], want), (i, j)


def test_only_the_chosen_experts_bytes_are_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLXFUSE_KERNELS", "emulated")
    layer, _ = switch()
    total = sum(a.nbytes for a in layer._streams[0].values())
    for ids, chosen in (([4, 2], 2), ([1, 1], 1), ([0, 1, 2, 3, 4], 5)):
        with msl.installed(), msl.counting() as found:
            mx.eval(layer(activations(len(ids)), mx.array(ids, mx.uint32)))
        (counts,) = found
        moved = sum(
            b.distinct_read for n, b in counts.buffers.items() if n[:-1] in ("codes", "scales")
        )
        assert moved == total * chosen // EXPERTS


def test_a_sum_over_experts_loads_their_bytes_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLXFUSE_KERNELS", "emulated")
    layer, _ = switch()
    total = sum(a.nbytes for a in layer._streams[0].values())
    ids = mx.array([[4, 2, 0], [2, 4, 1]], mx.uint32)
    x = activations(2, 3)[..., 0, :]
    with msl.installed(), msl.counting() as found:
        mx.eval(quantized_matmul(x, layer.weight, experts=ids, scores=mx.ones((2, 3))))
    (counts,) = found
    streams = [b for n, b in counts.buffers.items() if n[:-1] in ("codes", "scales")]
    assert sum(b.distinct_read for b in streams) == total * 4 // EXPERTS
    # Each use reads them once; of the rows of MXFP4, of 64 weights, two lanes have some.
    assert sum(b.read_bytes for b in streams) == total * 6 // EXPERTS
    assert counts.buffers["x"].distinct_read == x.nbytes


def test_many_rows_dequantise_every_expert_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where kernels run, in operations of MLX: rows of a part, and of a whole segment."""
    monkeypatch.setattr(experts, "unavailable", lambda: None)
    seen = []
    real = experts.dequantize
    monkeypatch.setattr(
        experts, "dequantize", lambda s, *a, **k: seen.append(1) or real(s, *a, **k)
    )
    layer, values = switch()
    whole = QuantizedSwitchLinear(QuantizedWeight.whole(segment(DATA, FORMAT, experts=EXPERTS)))
    every = expected(DATA, FORMAT).reshape(EXPERTS, ROWS, COLUMNS)
    for count in (8 * EXPERTS, 8 * EXPERTS + 1):
        ids = np.sort(np.random.default_rng(0).integers(0, EXPERTS, count))
        x = activations(count, dtype=mx.float32)
        for made, weight in ((layer, values), (whole, every)):
            got = made(x, mx.array(ids, mx.uint32), sorted_indices=True)
            want = np.array(x, np.float64) @ weight[ids].swapaxes(1, 2)
            assert np.abs(np.array(got) - want).max() <= 1e-5 * np.abs(want).max()
        assert len(seen) == (0 if count == 8 * EXPERTS else 2)
        seen.clear()
    half = layer(x.astype(mx.float16), mx.array(ids, mx.uint32))
    wide = np.array(layer(x.astype(mx.float16).astype(mx.float32), mx.array(ids, mx.uint32)))
    assert half.dtype == mx.float16
    assert np.array_equal(np.array(half), wide.astype(np.float16))


@pytest.mark.parametrize("dtype", [mx.float16, mx.float32])
def test_the_reference_sums_in_float32_and_rounds_once(dtype: mx.Dtype) -> None:
    layer, values = switch()
    x, ids = activations(7, 1, dtype=dtype), np.random.default_rng(1).integers(0, EXPERTS, (7, 2))
    got = layer(x, mx.array(ids))
    assert got.dtype == dtype
    wide = np.array(x.astype(mx.float32), np.float64)
    want = np.einsum("tuvc,tknc->tkvn", wide, values[ids].astype(np.float64))
    ulp = 2.0**-11 if dtype == mx.float16 else 1e-6
    error = np.abs(np.array(got.astype(mx.float32)) - want)
    assert (error <= 1.01 * ulp * np.abs(want) + 1e-6 * np.abs(want).max()).all()


def test_no_rows_give_none() -> None:
    layer, values = switch()
    dense = SwitchLinear(mx.array(values))
    x, ids = mx.zeros((1, 0, 1, 1, COLUMNS)), mx.zeros((1, 0, 2), mx.uint32)
    for made in (layer, dense):
        assert made(x, ids).shape == (1, 0, 2, 1, 10)


def test_a_layer_counts_its_own_rows() -> None:
    """Gate and up share a segment; MLX-LM adds up what is in the tree."""
    both = segment(DATA, FORMAT, experts=EXPERTS)
    weight = QuantizedWeight((Part(both, 0, 12), Part(both, 12, 10)))
    gate, up = (QuantizedSwitchLinear(w) for w in weight.split())
    held = [sum(a.nbytes for a in layer._streams[0].values()) for layer in (gate, up)]
    assert held == [DATA.nbytes * 12 // ROWS, DATA.nbytes * 10 // ROWS]
    assert isinstance(both, Segment)
    assert sum(held) == both.nbytes
