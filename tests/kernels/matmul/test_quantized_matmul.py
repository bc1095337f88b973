"""Multiplication by quantised weights against float64 products of the decoded weights."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from unittest import mock

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlxfuse import KernelError
from mlxfuse.formats import BY_NAME, Format
from mlxfuse.kernels.matmul import quantized_matmul as module
from mlxfuse.kernels.matmul.product import Call
from mlxfuse.kernels.matmul.tile_program import ACTIVATIONS
from mlxfuse.kernels.runtime import backend as _backend
from mlxfuse.kernels.runtime import kernel as _kernel
from mlxfuse.kernels.weight import AffineSegment, Part, QuantizedWeight
from mlxfuse.nn.quantized import QuantizedLinear
from tests import msl

from ..builds import in_turn
from ..flat import call_of, flat
from ..matmul_cases import (
    AFFINE,
    EPS,
    FACTORS,
    GATED,
    NMSE,
    K,
    M,
    N,
    activated,
    allowed,
    assert_close,
    assert_product,
    by_mlx,
    cases,
    joined,
    made,
    magnitudes,
    matrix,
    random_x,
    spread,
    sums,
)
from ..pairwise import Case, pairs, possible
from ..weights import WITH_KERNEL, expected, random_blocks, segment, to_float64

quantized_matmul = flat(module.quantized_matmul)

CASES = cases()


def name_of(case: Case) -> str:
    values = [case[f] for f in ("format", "m", "n", "k", "activation", "layout")]
    options = [o for o in ("bias", "residual") if case[o]]
    dtype = str(case["dtype"]).removeprefix("mlx.core.")
    return "-".join([dtype, *(str(v) for v in values if v is not None), *options])


def every_prompt(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let prompts run in a variant, as if it had been the fastest."""
    monkeypatch.setattr(
        module,
        "tuned",
        lambda call: replace(call, variant=variant) if call.kind == "prompt" else call,
    )


def launched() -> int:
    return _kernel.launches["quantized_matmul"]


def scaled(x: mx.array, parts: list[np.ndarray], ids: mx.array | None) -> mx.array:
    """x times a power of two, so that activations are not all straight lines."""
    size = max(float(np.sqrt(np.mean(y**2))) for y in sums(x, parts, ids))
    return x * 2.0 ** round(np.log2(1.5 / size))


@pytest.mark.parametrize(("case", "kernels"), in_turn(CASES, name_of), indirect=["kernels"])
def test_every_pair(case: Case, kernels: str) -> None:
    """Every two values of `FACTORS` that may meet; in the checked build 300 rows at most."""
    if kernels == "checked":
        case = {**case, "n": min(case["n"], 300)}
    m, dtype, activation = case["m"], case["dtype"], case["activation"]
    weight, parts = (found := made(case)).weight, found.parts
    rng = np.random.default_rng(m)
    lead = (2, m // 2) if m % 2 == 0 else (m,)
    ids = None
    if case["layout"] == "experts":
        ids = mx.array(rng.integers(0, 2, lead), mx.uint32)
    # Of experts, x has a row for each group of ids, if they are in groups.
    given = lead[:1] if ids is not None and len(lead) == 2 else lead
    x = random_x(int(np.prod(given)), case["k"], dtype, seed=m)
    x = scaled(x, parts, ids).reshape(*given, -1)
    v, errors = sums(x, parts, ids), [4 * EPS[dtype] * e for e in magnitudes(x, parts, ids)]
    bias = residual = None
    if case["bias"]:
        bias = random_x(2 if ids is not None else 1, weight.rows, dtype, seed=3)
        at = np.cumsum([0, *(p.rows for p in weight.parts)])
        b = to_float64(bias)
        if ids is None:
            bias = bias[0]
        else:
            b = b[np.array(ids).reshape(-1)]
        v = [y + b[:, i:j] for y, i, j in zip(v, at, at[1:], strict=False)]
    theirs = by_mlx(case)
    want = activated(activation, v)
    bounds = spread(activation, v, errors, erf=5e-7 if theirs else 1.5e-7)
    if case["layout"] != "split":
        want, bounds = [np.concatenate(want, axis=-1)], [np.concatenate(bounds, axis=-1)]
    if case["residual"]:
        residual = random_x(m, want[0].shape[1], dtype, seed=5).reshape(*lead, -1)
        want = [want[0] + to_float64(residual).reshape(want[0].shape)]
    if case["bias"] or case["residual"] or activation:
        bounds = [e + EPS[dtype] * np.abs(y) for e, y in zip(bounds, want, strict=True)]
    before, fallbacks = launched(), _kernel.fallbacks.total()
    # The order of threads matters no more where there are more of them, and takes longer.
    with msl.using(orders=msl.ORDERS if case["n"] < 4099 else ()):
        got = quantized_matmul(
            x,
            weight,
            bias=bias,
            residual=residual,
            activation=activation,
            split=case["layout"] == "split",
            experts=ids,
        )
    assert (launched() - before, _kernel.fallbacks.total() - fallbacks) == (0 if theirs else 1, 0)
    for y, exact, bound in zip(got, want, bounds, strict=True):
        assert y.shape == (*lead, exact.shape[1])
        assert_close(y, exact, bound, dtype)


def test_the_cases_have_every_pair() -> None:
    assert set().union(*map(pairs, CASES)) == possible(FACTORS, allowed)
    assert all(allowed(case) for case in CASES)
    assert not possible({"m": M, "n": N}, allowed) - set().union(*map(pairs, CASES))


PRODUCT = [
    pytest.param(f, k, dtype, id=f"{f.name}-{k}-{dtype}")
    for f, k, dtype in itertools.product(WITH_KERNEL, K, NMSE)
    if k % f.block_size == 0
]


@pytest.mark.slow
@pytest.mark.parametrize(("format", "k", "dtype"), PRODUCT)
def test_the_full_product(format: Format, k: int, dtype: mx.Dtype, kernels: str) -> None:
    """Every M and N; the checked build up to 300 rows. All of it takes a core half an hour."""
    largest = 300 if kernels == "checked" else max(N)
    data = random_blocks(format, largest, k)
    x = random_x(max(M), k, dtype)
    w = expected(data, format).astype(np.float64)
    want = to_float64(x) @ w.T
    bound = 4 * EPS[dtype] * (np.abs(to_float64(x)) @ np.abs(w).T)
    for n, m in itertools.product((n for n in N if n <= largest), M):
        weight = QuantizedWeight.whole(segment(np.ascontiguousarray(data[:n]), format))
        # The pairs run in every order of threads.
        with msl.using(orders=()):
            (y,) = quantized_matmul(x[:m], weight)
        assert_close(y, want[:m, :n], bound[:m, :n], dtype)


def test_one_wrong_block_is_seen(kernels: str) -> None:
    format = BY_NAME["Q6_K"]
    data = random_blocks(format, 64, 512)
    w = expected(data, format)
    data[40, 209] ^= 0x80  # the sign of one block's scale, one of 128
    x = random_x(1, 512, mx.float32)
    (y,) = quantized_matmul(x, QuantizedWeight.whole(segment(data, format)))
    with pytest.raises(AssertionError):
        assert_product(y, x, w)


@pytest.mark.parametrize("m", [1, 3])
@pytest.mark.parametrize(
    "names", [("Q4_K", "Q4_K", "Q6_K"), ("Q5_0", "Q8_0", "Q5_0")], ids="-".join
)
def test_joined_parts_equal_each_alone(names: tuple[str, ...], m: int, kernels: str) -> None:
    found = joined(names, (37, 8, 10), 512)
    x = random_x(m, 512, mx.float16)
    before = launched()
    outputs = quantized_matmul(x, found.weight, split=True)
    assert launched() - before == 1
    for got, alone, w in zip(outputs, found.weight.split(), found.parts, strict=True):
        assert mx.array_equal(got, quantized_matmul(x, alone)[0])
        assert_product(got, x, w)
    assert mx.array_equal(quantized_matmul(x, found.weight)[0], mx.concatenate(outputs, axis=-1))


GATE_AND_UP = [("Q4_K", "Q4_K"), ("Q4_K", "Q6_K"), ("IQ2_S", "IQ1_S"), ("IQ1_M", "IQ1_S")]


@pytest.mark.parametrize("names", GATE_AND_UP, ids="-".join)
def test_gate_and_up_equal_each_alone(names: tuple[str, str], kernels: str) -> None:
    """Without the activation, bit for bit; that is what an unfused model computes."""
    found = joined(names, (37, 37), 512)
    x = random_x(1, 512, mx.float16)
    before = launched()
    gate, up = quantized_matmul(x, found.weight, split=True)
    assert launched() - before == 1
    alone = [quantized_matmul(x, w)[0] for w in found.weight.split()]
    assert mx.array_equal(gate, alone[0])
    assert mx.array_equal(up, alone[1])
    assert not mx.array_equal(gate, up)


# What the README says of them, as root mean squares.
TOLERANCE = {mx.float32: "1e-7", mx.float16: "6e-4", mx.bfloat16: "5e-3"}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("activation", ["swiglu", "geglu_tanh"])
def test_gate_and_up_with_their_activation(activation: str, dtype: mx.Dtype, kernels: str) -> None:
    """Beside the activation of both products; nearer to the exact result, as less is rounded."""
    found = joined(("Q4_K", "Q4_K"), (300, 300), 512)
    x = scaled(random_x(1, 512, dtype), found.parts, None)
    fused = to_float64(quantized_matmul(x, found.weight, activation=activation)[0])
    gate, up = quantized_matmul(x, found.weight, split=True)
    one_by_one = to_float64(
        {"swiglu": nn.silu, "geglu_tanh": nn.gelu_approx}[activation](gate) * up
    )
    (want,) = activated(activation, sums(x, found.parts))

    def apart(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.sqrt(np.sum((a - b) ** 2) / np.sum(want**2)))

    assert 0 < apart(fused, one_by_one) <= float(TOLERANCE[dtype])
    if dtype != mx.float32:
        assert apart(fused, want) < 0.75 * apart(one_by_one, want)
    # Control: a tenth of one result, of 300.
    wrong = fused + np.where(np.abs(fused) == np.abs(fused).max(), 0.1 * fused, 0)
    assert apart(wrong, one_by_one) > float(TOLERANCE[dtype])


def test_the_readme_says_how_near_they_are() -> None:
    text = Path(__file__, *[".."] * 4, "README.md").resolve().read_text()
    said = ", ".join(f"{bound} in {dtype}" for dtype, bound in TOLERANCE.items())
    assert said.replace("mlx.core.", "") in " ".join(text.split())


@pytest.mark.parametrize("m", [1, 3, 40])
@pytest.mark.parametrize("name", ["Q4_K", "affine4g64"])
def test_parts_of_one_format_may_lie_apart(name: str, m: int, kernels: str) -> None:
    """As gate and up of a model of MLX-LM do, which are two arrays each."""
    held, parts = zip(*(matrix(name, 37, 256, seed=seed) for seed in (1, 2)), strict=True)
    weight = QuantizedWeight(tuple(Part(segment, 0, 37) for segment in held))
    x = scaled(random_x(m, 256, mx.float32), list(parts), None)
    before = launched()
    outputs = quantized_matmul(x, weight, split=True)
    (got,) = quantized_matmul(x, weight, activation="swiglu")
    assert launched() - before == (0 if m == 40 and name.startswith("affine") else 2)
    for y, w in zip(outputs, parts, strict=True):
        assert_product(y, x, w)
    (want,) = activated("swiglu", sums(x, parts))
    assert_close(got, want, np.zeros(()), mx.float32)


def stock(x: mx.array, parts: list[np.ndarray], activation: str) -> np.ndarray:
    """As MLX-LM computes it: everything is rounded to x's type."""
    v = [x @ mx.array(w).astype(x.dtype).T for w in parts]
    if activation == "swiglu_clipped":
        gate, up = mx.minimum(v[0], 7), mx.clip(v[1], -7, 7)
        return to_float64((up + 1) * gate * mx.sigmoid(1.702 * gate))
    act = {"silu": nn.silu, "gelu": nn.gelu, "gelu_tanh": nn.gelu_approx, "relu2": nn.relu2}
    y = act[GATED.get(activation, activation)](v[0])
    return to_float64(y * v[1] if activation in GATED else y)


@pytest.mark.parametrize("dtype", list(NMSE), ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_after_many_rows(
    activation: str, dtype: mx.Dtype, kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLX multiplies, and rounds; no further from the exact result than MLX-LM's operations."""
    every_prompt("dequantize", monkeypatch)
    found = joined(("Q4_K", "Q4_K"), (150, 150), 4096)
    parts = found.parts if activation in GATED else [np.concatenate(found.parts)]
    x = scaled(random_x(40, 4096, dtype), parts, None)
    (want,) = activated(activation, sums(x, parts))
    (got,) = quantized_matmul(x, found.weight, activation=activation)

    def error(y: np.ndarray) -> float:
        return float(np.sum((y - want) ** 2) / np.sum(want**2))

    assert got.dtype == dtype
    assert error(to_float64(got)) <= (2 if dtype == mx.bfloat16 else 1) * NMSE[dtype]
    if dtype == mx.bfloat16:
        most = 0.95 if activation in GATED else 1.0  # a square is rounded once by both
        assert error(to_float64(got)) <= most * error(stock(x, parts, activation))


# Rows, columns and SIMD-groups of a tile; M, N and K.
TILES = [
    ("Q4_K", mx.float16, (64, 64, 4), (33, 130, 768)),
    ("Q4_K", mx.bfloat16, (16, 32, 4), (9, 45, 256)),
    ("Q4_K", mx.float32, (128, 64, 8), (150, 70, 512)),
    ("Q4_0", mx.bfloat16, (32, 32, 4), (31, 70, 288)),
    ("Q8_0", mx.float16, (192, 32, 8), (187, 33, 96)),
    ("Q3_K", mx.bfloat16, (128, 64, 8), (200, 1, 256)),
    ("Q6_K", mx.float32, (64, 32, 4), (64, 300, 256)),
    ("MXFP4", mx.float16, (128, 64, 8), (128, 64, 160)),
    ("affine8g32", mx.float32, (128, 32, 8), (66, 37, 96)),
    # Codebooks of 1 and of 8 KiB, of which the latter does not fit beside tiles of float32.
    ("IQ3_XXS", mx.float32, (32, 64, 4), (17, 70, 256)),
    ("IQ2_S", mx.float16, (192, 32, 8), (130, 70, 256)),
    ("IQ2_S", mx.float32, (64, 64, 4), (40, 70, 256)),
]


@pytest.mark.parametrize(("name", "dtype", "shape", "sizes"), TILES, ids=str)
def test_tiles(
    name: str,
    dtype: mx.Dtype,
    shape: tuple[int, ...],
    sizes: tuple[int, ...],
    kernels: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    every_prompt(f"tiles{shape[1]}", monkeypatch)
    m, n, k = sizes
    held, w = matrix(name, n, k, dtype)
    x = random_x(m, k, dtype)
    weight = QuantizedWeight.whole(held)
    assert module.tile_shape(module.tuned(Call(x, weight))) == shape
    before = launched()
    (y,) = quantized_matmul(x.reshape(1, m, k), weight)
    assert launched() - before == 1
    assert_product(y[0], x, w)


@pytest.mark.parametrize(
    "names", [("Q5_0", "Q5_0"), ("Q4_K", "Q8_0"), ("IQ2_S", "IQ4_XS")], ids="-".join
)
def test_tiles_of_gate_and_up(
    names: tuple[str, str], kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    every_prompt("tiles64", monkeypatch)
    found = joined(names, (45, 45), 512)
    x = scaled(random_x(35, 512, mx.float32), found.parts, None)
    residual = random_x(35, 45, mx.float32, seed=3)
    before = launched()
    (got,) = quantized_matmul(x, found.weight, activation="swiglu", residual=residual)
    assert launched() - before == 1
    (want,) = activated("swiglu", sums(x, found.parts))
    assert_close(got, want + to_float64(residual), np.zeros(()), mx.float32)


def test_tiles_with_parts(kernels: str) -> None:
    found = joined(("Q4_K", "Q4_K", "Q6_K"), (70, 8, 10), 512)
    x = random_x(35, 512, mx.float32)
    for got, w in zip(quantized_matmul(x, found.weight, split=True), found.parts, strict=True):
        assert_product(got, x, w)


@pytest.mark.parametrize("name", AFFINE)
def test_weights_of_mlx(name: str, kernels: str) -> None:
    """One row by each kind; many rows are left to MLX."""
    dtype = mx.float16
    held, w = matrix(name, 70, 640, dtype)
    weight, x = QuantizedWeight.whole(held), random_x(40, 640, dtype)
    assert_product(quantized_matmul(x[:1], weight)[0], x[:1], w)
    bits, group, mode = AFFINE[name]
    how = {"group_size": group, "bits": bits, "mode": mode, "transpose": True}
    want = mx.quantized_matmul(x, *held.arrays.values(), **how)
    assert mx.array_equal(quantized_matmul(x, weight)[0], want)


@pytest.mark.parametrize("m", [1, 3])
def test_scales_of_mlx_may_be_of_another_type(m: int, kernels: str) -> None:
    for scales, dtype in ((mx.float32, mx.float16), (mx.bfloat16, mx.float32)):
        held, w = matrix("affine4g64", 70, 640, scales)
        assert {a.dtype for a in held.arrays.values()} == {mx.uint32, scales}
        x = random_x(m, 640, dtype)
        assert_product(quantized_matmul(x, QuantizedWeight.whole(held))[0], x, w)


def test_scales_of_no_kernel_are_refused() -> None:
    held, _ = matrix("affine4g64", 70, 640)
    for wrong in ({"scales": held.arrays["scales"].astype(mx.float32)}, {}):
        arrays = {**held.arrays, **wrong}
        if not wrong:
            arrays |= {n: arrays[n].astype(mx.int32) for n in ("scales", "supers")}
        with pytest.raises(ValueError, match="scales of MLX weights"):
            AffineSegment(4, 64, "affine", 640, arrays)


@pytest.mark.parametrize("names", [("Q4_K", "Q4_K"), ("Q4_K", "Q6_K")], ids="-".join)
@pytest.mark.parametrize("shared", [True, False])
def test_experts(shared: bool, names: tuple[str, str], kernels: str) -> None:
    found = joined(names, (11, 11), 256, experts=4)
    ids = mx.array([[3, 0], [1, 1], [2, 3]])
    x = scaled(random_x(3 if shared else 6, 256, mx.float32), found.parts, ids)
    x = x if shared else x.reshape(3, 2, 256)
    before = launched()
    (got,) = quantized_matmul(x, found.weight, activation="swiglu", experts=ids)
    assert launched() - before == 1
    assert got.shape == (3, 2, 11)
    v = sums(x, found.parts, ids)
    errors = [4 * EPS[mx.float32] * e for e in magnitudes(x, found.parts, ids)]
    (want,), (bound,) = activated("swiglu", v), spread("swiglu", v, errors)
    assert_close(got, want, bound + EPS[mx.float32] * np.abs(want), mx.float32)


def _mlx_rows(ids: np.ndarray) -> int:
    """Rows that MLX's gather_qmm multiplies: 16 at a time, once for each expert among them
    (gather_qmm_rhs in mlx/backend/metal/kernels/quantized.h).
    """
    return 16 * sum(len(set(ids[i : i + 16])) for i in range(0, len(ids), 16))


@pytest.mark.parametrize(("tokens", "most"), [(128, 2.01), (512, 1.24), (2048, 1.08)])
def test_prompts_of_experts_multiply_no_more_rows_than_mlx(tokens: int, most: float) -> None:
    """8 of 128 experts for each token, drawn at random."""
    chosen = np.argsort(np.random.default_rng(tokens).random((tokens, 128)), axis=1)[:, :8]
    ids = np.sort(chosen.ravel())
    weight = joined(("Q4_0",), (1,), 32, experts=128).weight
    call = call_of(mx.zeros((len(ids), 32)), weight, experts=mx.array(ids, mx.uint32))
    assert call.kind == "grouped"
    many = module.tile_shape(call).rows
    row_ends, tile_ends = (np.array(x) for x in module.ends(call.experts.ids, 128, many))
    np.testing.assert_array_equal(row_ends, np.cumsum(np.bincount(ids, minlength=128)))
    np.testing.assert_array_equal(tile_ends, np.cumsum(-(-np.bincount(ids, minlength=128) // many)))
    launch = module.KERNEL.launch(call)
    assert tile_ends[-1] <= launch.grid[1]
    # Rows are multiplied by eights.
    rows = np.diff(row_ends, prepend=0)
    ours = (-(-rows // 8) * 8).sum()
    assert len(ids) < ours <= most * len(ids)
    assert ours <= _mlx_rows(ids)


def test_a_tile_of_few_rows_multiplies_few() -> None:
    """Counted: SIMD-group operations of one expert's rows, eight at a time in a tile of 32."""
    found = []
    for rows in (16, 17, 24, 32):
        weight = joined(("Q4_0",), (8,), 64, experts=1).weight
        call = call_of(mx.zeros((rows, 64), mx.float16), weight, experts=mx.zeros(rows, mx.uint32))
        with mock.patch.object(module, "MOST_FOR_16", 0):
            launch = module.KERNEL.launch(call)
        with msl.installed(lint=False), msl.counting() as counted:
            _kernel.run(launch)
        found.append(counted[0].simd_operations)
    assert found[0] < found[1] == found[2] < found[3]
    assert found[3] - found[2] == found[1] - found[0]


@pytest.mark.parametrize("dtype", list(NMSE), ids=str)
def test_biases_and_clipped_swiglu_of_experts(dtype: mx.Dtype, kernels: str) -> None:
    """As gpt-oss has them, with gate and up beyond the limit of 7 on both sides."""
    found = joined(("MXFP4", "MXFP4"), (37, 37), 96, experts=4)
    ids = mx.array([[3, 0], [1, 1], [2, 3]])
    x = 6 * scaled(random_x(3, 96, dtype), found.parts, ids)
    bias = random_x(4, 74, dtype, seed=3)
    of = to_float64(bias)[np.array(ids).reshape(-1)]
    v = [y + b for y, b in zip(sums(x, found.parts, ids), np.split(of, 2, -1), strict=True)]
    assert all(y.max() > 7 > -7 > y.min() for y in v)
    (got,) = quantized_matmul(x, found.weight, bias=bias, activation="swiglu_clipped", experts=ids)
    (want,) = activated("swiglu_clipped", v)
    assert_close(got, want, np.zeros(()), dtype)
    for other in (mx.roll(bias, 1, 0), mx.roll(bias, 37, 1)):  # of other experts; up's for gate
        (wrong,) = quantized_matmul(
            x, found.weight, bias=other, activation="swiglu_clipped", experts=ids
        )
        with pytest.raises(AssertionError):
            assert_close(wrong, want, np.zeros(()), dtype)
    (y,) = quantized_matmul(
        mx.full((1, 96), float("nan")), found.weight, activation="swiglu_clipped", experts=ids[0]
    )
    assert mx.all(mx.isnan(y))


SUMMED = [
    ("IQ3_S", mx.float16, 2, 37, 2, False),
    ("Q4_K", mx.float16, 3, 37, 2, True),
    ("MXFP4", mx.bfloat16, 1, 8, 4, False),
    ("affine4g64", mx.float32, 2, 3, 9, True),
    ("Q6_K", mx.float32, 9, 70, 1, False),
]


@pytest.mark.parametrize(("name", "dtype", "m", "n", "k", "more"), SUMMED)
def test_sums_over_experts(
    name: str, dtype: mx.Dtype, m: int, n: int, k: int, more: bool, kernels: str
) -> None:
    """In float32, rounded once; each expert's product has the bits of its own matrix."""
    rng = np.random.default_rng(m)
    held, w = matrix(name, n, 256, dtype, experts=11)
    weight = QuantizedWeight.whole(held)
    ids = mx.array(np.stack([rng.permutation(11)[:k] for _ in range(m)]))
    x = random_x(m * k, 256, dtype).reshape(m, k, 256)
    scores = mx.array(rng.uniform(0, 1, (m, k)).astype(np.float32))
    options = {}
    if more:
        options["bias"] = random_x(11, n, dtype, seed=3)
        options["residual"] = random_x(m, n, dtype, seed=5)

    def exact(scores: mx.array) -> tuple[np.ndarray, np.ndarray]:
        """The sum, and that of the absolute values that are added up."""
        flat = ids.reshape(-1)
        (v,), (size,) = sums(x, [w], flat), magnitudes(x, [w], flat)
        if more:
            v = v + to_float64(options["bias"])[np.array(flat)]
        weights = to_float64(scores).reshape(m, k, 1)
        v, size = ((a.reshape(m, k, n) * weights).sum(1) for a in (v, size))
        return v + to_float64(options["residual"]) if more else v, size

    before = launched()
    (got,) = quantized_matmul(x, weight, experts=ids, scores=scores, **options)
    assert launched() - before == 1
    assert got.shape == (m, n)
    want, size = exact(scores)
    bound = 4 * EPS[mx.float32] * size + EPS[dtype] * np.abs(want)
    assert np.all(np.abs(to_float64(got) - want) <= bound)
    (half,) = quantized_matmul(x, weight, experts=ids, scores=scores.astype(mx.float16), **options)
    want, size = exact(scores.astype(mx.float16))
    assert np.all(np.abs(to_float64(half) - want) <= bound)
    for wrong in (mx.roll(scores, 1, -1), mx.roll(scores, 1, 0)):
        if not mx.array_equal(wrong, scores):  # control
            (other,) = quantized_matmul(x, weight, experts=ids, scores=wrong, **options)
            assert not np.all(np.abs(to_float64(other) - exact(scores)[0]) <= bound)
    if dtype == mx.float32:
        # With scores of 1 or 2 nothing but the sums is rounded: in order, by every eighth.
        twos = 2.0 ** mx.array(rng.integers(0, 2, (m, k)), mx.float32)
        (got,) = quantized_matmul(x, weight, experts=ids, scores=twos)
        each = quantized_matmul(x, weight, experts=ids)[0] * twos[..., None]
        partial = [sum(each[:, i] for i in range(g, k, 8)) for g in range(min(k, 8))]
        assert mx.array_equal(got, sum(partial[1:], partial[0]))


def test_no_rows_give_no_rows(kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLXFUSE_KERNELS", "emulated" if kernels != "metal" else "auto")
    found = joined(("Q4_K", "Q6_K"), (11, 11), 256)
    for lead in ((0,), (2, 0), (0, 40)):
        x = mx.zeros((*lead, 256), mx.float16)
        bias = mx.zeros((22,), mx.float16)
        residual = mx.zeros((*lead, 11), mx.float16)
        (y,) = quantized_matmul(x, found.weight, bias=bias, residual=residual, activation="swiglu")
        assert (y.shape, y.dtype) == ((*lead, 11), mx.float16)
        parts = quantized_matmul(x, found.weight, split=True)
        assert [p.shape for p in parts] == [(*lead, 11)] * 2


def test_gradients_are_those_of_the_reference_or_an_error(
    kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = joined(("Q4_K", "Q6_K"), (11, 11), 256)
    x = random_x(2, 256, mx.float32)

    def grad(x: mx.array, *, differentiable: bool = False) -> mx.array:
        def loss(x: mx.array) -> mx.array:
            (y,) = quantized_matmul(
                x, found.weight, activation="swiglu", differentiable=differentiable
            )
            return y.sum()

        return mx.grad(loss)(x)

    with pytest.raises((KernelError, ValueError), match=r"no gradient|vjp"):
        grad(x)
    before = launched()
    gate, up = (mx.array(w) for w in found.parts)
    want = mx.grad(lambda x: ((g := x @ gate.T) * mx.sigmoid(g) * (x @ up.T)).sum())(x)
    assert mx.allclose(grad(x, differentiable=True), want, rtol=1e-4, atol=1e-4)
    single = QuantizedLinear(found.weight.split()[0])
    single.train()
    assert mx.allclose(mx.grad(lambda x: single(x).sum())(x), gate.sum(axis=0), rtol=1e-4)
    assert launched() == before


def test_mlx_refuses_gradients_of_a_metal_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a Mac; here as far as the graph that would be run."""
    found = joined(("Q4_K",), (11,), 256)
    monkeypatch.setattr(_backend, "_no_device", lambda: None)
    monkeypatch.setenv("MLXFUSE_KERNELS", "metal")

    def loss(x: mx.array) -> mx.array:
        return quantized_matmul(x, found.weight)[0].sum()

    records: list[object] = []
    mx.export_function(records.append, loss, mx.zeros((1, 256)))
    assert records
    with pytest.raises(ValueError, match=r"\[Primitive::vjp\] Not implemented for CustomKernel"):
        mx.export_function(records.append, mx.grad(loss), mx.zeros((1, 256)))


def test_shapes_that_do_not_fit_are_refused() -> None:
    weight = joined(("Q4_0", "Q4_0"), (6, 8), 64).weight
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
    three = joined(("Q4_0",), (6,), 64, experts=3).weight
    ids, scores = mx.zeros((2, 2), mx.uint32), mx.ones((2, 2))
    with pytest.raises(ValueError, match=r"scores \(2,\) of expert ids \(2, 2\)"):
        quantized_matmul(mx.zeros((2, 2, 64)), three, experts=ids, scores=scores[0])
    with pytest.raises(ValueError, match=r"ids \(2, 2\), x \(2, 64\)"):
        quantized_matmul(x, three, experts=ids, scores=scores)
    with pytest.raises(ValueError, match="one part and no activation"):
        quantized_matmul(
            mx.zeros((2, 2, 64)), three, experts=ids, scores=scores, activation="relu2"
        )
    with pytest.raises(ValueError, match=r"bias: expected \(3, 6\), found \(6,\)"):
        quantized_matmul(x, three, bias=mx.zeros((6,)), experts=mx.array([0, 1]))


def test_launch_geometry_is_a_pure_function_of_shapes() -> None:
    weight = joined(("Q4_0", "Q4_0"), (20, 8), 64).weight
    x = mx.zeros((7, 64), mx.float16)
    call = call_of(x, weight, split=True)
    launch = module._launch(call)
    assert launch.grid == ((5 + 2) * 64, 1, 1)  # 4 rows a threadgroup; 8 rows of x at a time
    assert launch.shapes == ((7, 20), (7, 8))
    assert launch.threadgroup == (64, 1, 1)
    assert module._launch(call).program is launch.program
    routes = [call_of(mx.zeros((m, 64)), weight, split=True).route for m in (1, 2, 8, 9, 256, 257)]
    assert routes == ["vector", "batch", "batch", "tiles", "tiles", "dequantize"]
