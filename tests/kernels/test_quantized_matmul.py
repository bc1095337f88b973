"""Multiplication by quantised weights against float64 products of the decoded weights."""

from __future__ import annotations

import itertools
import math

import mlx.core as mx
import numpy as np
import pytest

from mlxfuse.formats import BY_NAME, Format
from mlxfuse.kernels import _kernel
from mlxfuse.kernels import quantized_matmul as module
from mlxfuse.kernels.quantized_matmul import ACTIVATIONS, quantized_matmul, route
from mlxfuse.kernels.weight import AffineSegment, Part, QuantizedWeight

from .weights import WITH_KERNEL, expected, random_blocks, segment, to_float64

NMSE = {mx.float32: 1e-10, mx.float16: 1e-6, mx.bfloat16: 1e-5}
EPS = {mx.float32: 2.0**-23, mx.float16: 2.0**-10, mx.bfloat16: 2.0**-7}
M = (1, 2, 3, 5, 8, 9, 32, 40)
N = (1, 7, 300)
K = (32, 96, 256, 576, 768, 2880, 4096)


def pairs(format: Format) -> list[tuple[int, int, int, mx.Dtype]]:
    """Shapes in which every two values of M, N, K and dtype meet at least once, greedily."""
    values = (M, N, tuple(k for k in K if k % format.block_size == 0), tuple(NMSE))
    open_pairs = {
        ((i, a), (j, b))
        for i, j in itertools.combinations(range(4), 2)
        for a in values[i]
        for b in values[j]
    }
    chosen = []
    while open_pairs:
        best = max(
            itertools.product(*values),
            key=lambda v: sum(p in open_pairs for p in itertools.combinations(enumerate(v), 2)),
        )
        chosen.append(best)
        open_pairs -= set(itertools.combinations(enumerate(best), 2))
    return chosen


def random_x(rows: int, columns: int, dtype: mx.Dtype, seed: int = 0) -> mx.array:
    rng = np.random.default_rng(seed)
    return mx.array(rng.standard_normal((rows, columns)).astype(np.float32)).astype(dtype)


def assert_close(got: mx.array, x: mx.array, w: np.ndarray) -> None:
    """Judge ``x @ w.T``: NMSE, or for few columns an error bound for each output."""
    dtype = x.dtype
    assert got.dtype == dtype
    x64, w64, y = to_float64(x), w.astype(np.float64), to_float64(got)
    want = x64 @ w64.T
    assert y.shape == want.shape
    if w.shape[0] < 32:
        bound = 4 * EPS[dtype] * (np.abs(x64) @ np.abs(w64).T)
        assert np.all(np.abs(y - want) <= bound)
    else:
        assert np.sum((y - want) ** 2) <= NMSE[dtype] * np.sum(want**2)


@pytest.mark.parametrize("format", WITH_KERNEL, ids=lambda f: f.name)
def test_every_pair_of_shapes(format: Format, kernels: str) -> None:
    data = random_blocks(format, max(N), max(K) if format.block_size == 256 else 2 * 2880)
    before = _kernel.launches["quantized_matmul"]
    shapes = pairs(format)
    for m, n, k, dtype in shapes:
        part = np.ascontiguousarray(data[:n, : format.row_bytes(k)])
        x = random_x(m, k, dtype, seed=m)
        (y,) = quantized_matmul(x, QuantizedWeight.whole(segment(part, format)))
        assert_close(y, x, expected(part, format))
    ran = sum(route(m) != "dequantize" for m, *_ in shapes)
    assert _kernel.launches["quantized_matmul"] - before == ran


@pytest.mark.slow
@pytest.mark.parametrize("format", WITH_KERNEL, ids=lambda f: f.name)
def test_the_full_product(format: Format, kernels: str) -> None:
    rows = 300 if kernels == "checked" else 4099
    for k in (k for k in K if k % format.block_size == 0):
        data = random_blocks(format, rows, k)
        w = expected(data, format)
        for n, m, dtype in itertools.product((*N, rows), M, NMSE):
            weight = QuantizedWeight.whole(segment(np.ascontiguousarray(data[:n]), format))
            x = random_x(m, k, dtype)
            assert_close(quantized_matmul(x, weight)[0], x, w[:n])


def test_one_wrong_block_is_seen(kernels: str) -> None:
    format = BY_NAME["Q6_K"]
    data = random_blocks(format, 64, 512)
    w = expected(data, format)
    data[40, 209] ^= 0x80  # the sign of one block's scale, one of 128
    x = random_x(1, 512, mx.float32)
    (y,) = quantized_matmul(x, QuantizedWeight.whole(segment(data, format)))
    with pytest.raises(AssertionError):
        assert_close(y, x, w)


def joined(
    names: tuple[str, ...], rows: tuple[int, ...], columns: int
) -> tuple[QuantizedWeight, list[np.ndarray]]:
    """Parts of the given formats, those of one format in one segment, and their weights."""
    data = [
        random_blocks(BY_NAME[name], n, columns, seed)
        for seed, (name, n) in enumerate(zip(names, rows, strict=True))
    ]
    parts: dict[int, Part] = {}
    for name in dict.fromkeys(names):
        mine = [i for i, n in enumerate(names) if n == name]
        whole = segment(np.concatenate([data[i] for i in mine]), BY_NAME[name])
        for i in mine:
            parts[i] = Part(whole, sum(rows[j] for j in mine if j < i), rows[i])
    weights = [expected(d, BY_NAME[n]) for d, n in zip(data, names, strict=True)]
    return QuantizedWeight(tuple(parts[i] for i in sorted(parts))), weights


@pytest.mark.parametrize("m", [1, 3])
@pytest.mark.parametrize(
    "names", [("Q4_K",) * 3, ("Q4_K", "Q4_K", "Q6_K"), ("Q5_0", "Q8_0", "Q5_0")], ids="-".join
)
def test_joined_parts_equal_each_alone(names: tuple[str, ...], m: int, kernels: str) -> None:
    weight, w = joined(names, (37, 8, 10), 512)
    x = random_x(m, 512, mx.float16)
    before = _kernel.launches["quantized_matmul"]
    outputs = quantized_matmul(x, weight, split=True)
    assert _kernel.launches["quantized_matmul"] - before == 1
    for got, alone, decoded in zip(outputs, weight.split(), w, strict=True):
        assert mx.array_equal(got, quantized_matmul(x, alone)[0])
        assert_close(got, x, decoded)
    assert mx.array_equal(quantized_matmul(x, weight)[0], mx.concatenate(outputs, axis=-1))


def activated(name: str | None, y: np.ndarray) -> np.ndarray:
    """The activations in float64, by their definitions."""
    erf = np.vectorize(math.erf)
    act = {
        None: lambda v: v,
        "silu": lambda v: v / (1 + np.exp(-v)),
        "gelu": lambda v: 0.5 * v * (1 + erf(v / math.sqrt(2))),
        "gelu_tanh": lambda v: (
            0.5 * v * (1 + np.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3)))
        ),
        "relu2": lambda v: np.maximum(v, 0) ** 2,
    }
    gates = {"swiglu": "silu", "geglu": "gelu", "geglu_tanh": "gelu_tanh"}
    if name in gates:
        gate, up = np.split(y, 2, axis=-1)
        return act[gates[name]](gate) * up
    return act[name](y)


@pytest.mark.parametrize("m", [1, 3, 40])
@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
def test_epilogues(activation: str | None, m: int, kernels: str) -> None:
    weight, w = joined(("Q4_K", "Q4_K"), (45, 45), 256)
    rng = np.random.default_rng(1)
    for dtype in (mx.float32, mx.float16):
        x = random_x(m, 256, dtype) * 0.02
        bias = mx.array(rng.standard_normal(90).astype(np.float32)).astype(dtype)
        y = to_float64(x) @ np.concatenate(w).astype(np.float64).T + to_float64(bias)
        want = activated(activation, y)
        residual = random_x(*want.shape, dtype, seed=5)
        want = want + to_float64(residual)
        (got,) = quantized_matmul(x, weight, bias=bias, residual=residual, activation=activation)
        error = np.sum((to_float64(got) - want) ** 2) / np.sum(want**2)
        assert error <= NMSE[dtype]


@pytest.mark.parametrize("dtype", list(NMSE), ids=str)
@pytest.mark.parametrize("name", ["Q4_0", "Q8_0", "Q3_K", "Q4_K", "Q6_K", "MXFP4"])
def test_tiles(name: str, dtype: mx.Dtype, kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LARGE", "tiles")
    format = BY_NAME[name]
    before = _kernel.launches["quantized_matmul"]
    for m, n, k in ((33, 70, format.block_size), (64, 300, 768), (40, 1, 512)):
        data = random_blocks(format, n, k)
        x = random_x(m, k, dtype)
        (y,) = quantized_matmul(x, QuantizedWeight.whole(segment(data, format)))
        assert_close(y, x, expected(data, format))
    assert _kernel.launches["quantized_matmul"] - before == 3


def test_tiles_with_parts_and_epilogues(kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LARGE", "tiles")
    x = random_x(35, 512, mx.float32) * 0.02
    weight, w = joined(("Q4_K", "Q4_K", "Q6_K"), (70, 8, 10), 512)
    for got, decoded in zip(quantized_matmul(x, weight, split=True), w, strict=True):
        assert_close(got, x, decoded)
    weight, w = joined(("Q5_0", "Q5_0"), (45, 45), 512)
    residual = random_x(35, 45, mx.float32, seed=3)
    (got,) = quantized_matmul(x, weight, activation="swiglu", residual=residual)
    y = to_float64(x) @ np.concatenate(w).astype(np.float64).T
    want = activated("swiglu", y) + to_float64(residual)
    assert np.sum((to_float64(got) - want) ** 2) <= 1e-10 * np.sum(want**2)


AFFINE = [(b, g, "affine") for b in (4, 8) for g in (32, 64, 128)] + [(4, 32, "mxfp4")]


@pytest.mark.parametrize(("bits", "group", "mode"), AFFINE)
def test_weights_of_mlx(
    bits: int, group: int, mode: str, kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for dtype in (mx.float32, mx.float16):
        source = random_x(70, 640, dtype, seed=9)
        names = ("codes", "scales", "supers")
        packed = mx.quantize(source, group_size=group, bits=bits, mode=mode)
        arrays = dict(zip(names, packed, strict=False))
        weight = QuantizedWeight.whole(AffineSegment(bits, group, mode, 640, arrays))
        exact = [a if a.dtype != mx.float16 else a.astype(mx.float32) for a in packed]
        w = mx.dequantize(*exact, group_size=group, bits=bits, mode=mode).astype(mx.float32)
        for large, m in (("dequantize", 1), ("dequantize", 3), ("tiles", 40)):
            monkeypatch.setattr(module, "LARGE", large)
            x = random_x(m, 640, dtype)
            assert_close(quantized_matmul(x, weight)[0], x, np.array(w))
        # Many rows are left to MLX, whose CPU sums float16 products in float16.
        monkeypatch.setattr(module, "LARGE", "dequantize")
        how = {"group_size": group, "bits": bits, "mode": mode}
        want = mx.quantized_matmul(x, *packed, transpose=True, **how)
        assert mx.array_equal(quantized_matmul(x, weight)[0], want)


@pytest.mark.parametrize("shared", [True, False])
def test_experts(shared: bool, kernels: str) -> None:
    format = BY_NAME["Q4_K"]
    data = random_blocks(format, 4 * 22, 256)
    w = expected(data, format).reshape(4, 22, 256).astype(np.float64)
    whole = segment(data, format, experts=4)
    weight = QuantizedWeight((Part(whole, 0, 11), Part(whole, 11, 11)))
    ids = mx.array([[3, 0], [1, 1], [2, 3]])
    x = random_x(3 if shared else 6, 256, mx.float32)
    x = x.reshape(3, 256) if shared else x.reshape(3, 2, 256)
    (got,) = quantized_matmul(x, weight, activation="swiglu", experts=ids)
    rows = to_float64(x)
    rows = np.repeat(rows[:, None], 2, axis=1) if shared else rows
    want = activated("swiglu", np.einsum("tkc,tknc->tkn", rows, w[np.array(ids)]))
    assert got.shape == (3, 2, 11)
    assert np.sum((to_float64(got) - want) ** 2) <= 1e-10 * np.sum(want**2)


def test_shapes_that_do_not_fit_are_refused() -> None:
    weight, _ = joined(("Q4_0", "Q4_0"), (6, 8), 64)
    x = mx.zeros((2, 64))
    with pytest.raises(ValueError, match=r"x: expected \[\.\.\., 64\], found \(2, 32\)"):
        quantized_matmul(mx.zeros((2, 32)), weight)
    with pytest.raises(ValueError, match=r"gate and up of equal rows, found \[6, 8\]"):
        quantized_matmul(x, weight, activation="swiglu")
    with pytest.raises(ValueError, match=r"bias: expected \(14,\), found \(6,\)"):
        quantized_matmul(x, weight, bias=mx.zeros((6,)))
    with pytest.raises(ValueError, match=r"residual: expected \(2, 14\)"):
        quantized_matmul(x, weight, residual=mx.zeros((2, 6)))
    with pytest.raises(ValueError, match="activation: expected"):
        quantized_matmul(x, weight, activation="tanh")
    with pytest.raises(ValueError, match="expert ids"):
        quantized_matmul(x, weight, experts=mx.array([0, 1]))


def test_launch_geometry_is_a_pure_function_of_shapes() -> None:
    weight, _ = joined(("Q4_0", "Q4_0"), (20, 8), 64)
    x = mx.zeros((9, 64), mx.float16)
    call = module._Call(x, weight, None, None, None, True, None)
    launch = module._launch(call)
    assert launch.grid == ((5 + 2) * 64, 2, 1)  # 4 rows a threadgroup; 5 rows of x at a time
    assert launch.shapes == ((9, 20), (9, 8))
    assert launch.threadgroup == (64, 1, 1)
    assert module._launch(call).program is launch.program
    assert [route(m) for m in (1, 2, 32, 33)] == ["vector", "batch", "batch", "dequantize"]
