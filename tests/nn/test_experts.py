"""Experts' matrices: which kernel multiplies them, bit for bit, and what is read of them."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from mlxfuse.formats import BY_NAME
from mlxfuse.kernels import launches
from mlxfuse.kernels.matmul.product import Call
from mlxfuse.kernels.matmul.quantized_matmul import KERNEL, MOST_FOR_16
from mlxfuse.kernels.matmul.quantized_matmul import quantized_matmul as product
from mlxfuse.kernels.weight import Part, QuantizedWeight, Segment
from mlxfuse.nn.cpu import SwitchLinear
from mlxfuse.nn.experts import QuantizedSwitchLinear
from mlxfuse.nn.quantized import QuantizedLinear
from tests import msl
from tests.kernels.flat import flat
from tests.kernels.matmul_cases import activated, joined, random_x, sums
from tests.kernels.weights import expected, random_blocks, segment

quantized_matmul = flat(product)

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
    assert sum(b.read_bytes for b in streams) == total * 6 // EXPERTS  # each use reads them once
    assert counts.buffers["x"].distinct_read == x.nbytes


def dense_tiles(x: mx.array, weight: QuantizedWeight, **options: object) -> mx.array:
    """Rows of x in tiles of the dense kernel."""
    call = Call(x, weight)
    (y,) = KERNEL(replace(call, variant="tiles64", **options))
    return y


IDS = {
    "one each": np.arange(EXPERTS * 8) % EXPERTS,
    "ragged": np.repeat([0, 1, 3, 4], [1, 40, 9, 3]),  # none of expert 2's
    "all of one": np.full(33, 2),
    "a row": np.repeat([0, 1, 2, 3, 4], [31, 1, 1, 32, 2]),
}


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32])
@pytest.mark.parametrize("name", IDS)
def test_many_rows_have_the_bits_of_dense_tiles(name: str, dtype: mx.Dtype, kernels: str) -> None:
    """Whatever rows are beside them in a tile, and in whatever order they are given."""
    ids = np.sort(IDS[name])
    layer, values = switch()
    x = activations(len(ids), dtype=dtype)
    before = launches["quantized_matmul"]
    got = layer(x, mx.array(ids, mx.uint32), sorted_indices=True)
    assert launches["quantized_matmul"] - before == 1
    wide = np.array(x.astype(mx.float32), np.float64)
    want = wide @ values[ids].swapaxes(1, 2)
    bound = {mx.float32: 1e-5, mx.float16: 2e-3, mx.bfloat16: 1.6e-2}[dtype]
    assert np.abs(np.array(got.astype(mx.float32)) - want).max() <= bound * np.abs(want).max()
    for expert in np.unique(ids):
        rows = np.flatnonzero(ids == expert)
        own = segment(DATA.reshape(EXPERTS, ROWS, -1)[expert, 12:].copy(), FORMAT)
        # 33 rows or more are a dense kernel's tiles; the last ones are other rows.
        some = mx.concatenate([x[mx.array(rows)], activations(33, dtype=dtype)])[:, 0]
        alone = dense_tiles(some, QuantizedWeight.whole(own))
        assert mx.array_equal(got[mx.array(rows), 0], alone[: len(rows)]), expert
    order = np.random.default_rng(0).permutation(len(ids))
    again = layer(x[mx.array(order)], mx.array(ids[order], mx.uint32))
    assert mx.array_equal(again, got[mx.array(order)])


@pytest.mark.parametrize("format", ["Q4_K", "Q6_K"])
def test_many_rows_of_gate_and_up(format: str, kernels: str) -> None:
    """With biases, activation and residual; two formats, and x with a row for every two ids."""
    found = joined(("Q4_K", format), (37, 37), 256, experts=3)
    ids = mx.array(np.random.default_rng(2).integers(0, 3, (19, 2)), mx.uint32)
    x, bias = random_x(19, 256, mx.float32), random_x(3, 74, mx.float32, seed=3)
    x = 0.02 * x
    residual = random_x(38, 37, mx.float32, seed=5).reshape(19, 2, 37)
    options = {"bias": bias, "activation": "swiglu_clipped", "residual": residual}
    before = launches["quantized_matmul"]
    (got,) = quantized_matmul(x, found.weight, experts=ids, **options)
    assert launches["quantized_matmul"] - before == 1
    of = np.array(bias, np.float64)[np.array(ids).reshape(-1)]
    v = [y + b for y, b in zip(sums(x, found.parts, ids), np.split(of, 2, -1), strict=True)]
    (want,) = activated("swiglu_clipped", v)
    want = want + np.array(residual).reshape(want.shape)
    assert np.abs(np.array(got).reshape(want.shape) - want).max() <= 2e-5 * np.abs(want).max()


def test_tiles_read_the_bytes_of_their_experts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """And no expert is ever held dequantised."""
    monkeypatch.setenv("MLXFUSE_KERNELS", "emulated")
    layer, _ = switch()
    total = sum(a.nbytes for a in layer._streams[0].values())
    for name, ids in IDS.items():
        ids = np.sort(ids)
        many = 16 if len(ids) / EXPERTS <= MOST_FOR_16 else 32
        uses = sum(-(-n // many) for n in np.bincount(ids).tolist())  # tiles, each of one expert
        x = activations(len(ids))
        mx.eval(x)
        with msl.installed(), msl.counting() as found:
            mx.reset_peak_memory()
            held = mx.get_active_memory()
            y = layer(x, mx.array(ids, mx.uint32), sorted_indices=True)
            mx.eval(y)
            peak = mx.get_peak_memory() - held
        (counts,) = found
        streams = [b for n, b in counts.buffers.items() if n[:-1] in ("codes", "scales")]
        assert sum(b.read_bytes for b in streams) == total * uses // EXPERTS, name
        assert sum(b.distinct_read for b in streams) == total * len(set(ids)) // EXPERTS
        assert peak < EXPERTS * 10 * COLUMNS * 2, name  # of the float16 matrices
    mx.reset_peak_memory()
    held = mx.get_active_memory()
    layer.train()  # control
    mx.eval(layer(x, mx.array(ids, mx.uint32)))
    assert mx.get_peak_memory() - held > EXPERTS * 10 * COLUMNS * 2


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


@pytest.mark.parametrize("mode", ["reference", "emulated"])
def test_no_rows_give_none(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLXFUSE_KERNELS", mode)
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
