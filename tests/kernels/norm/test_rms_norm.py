"""RMSNorm and int8 codes against float64 with the same rounding points, and what they move."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models import gemma, gemma2, gemma3_text

from mlxfuse.fusion.dispatches import dispatches
from mlxfuse.kernels import fallbacks
from mlxfuse.kernels.activations import Int8Activations
from mlxfuse.kernels.norm.quantize_int8 import KERNEL as QUANTIZE
from mlxfuse.kernels.norm.quantize_int8 import quantize_int8
from mlxfuse.kernels.norm.rms_norm import KERNEL, MAX_COLUMNS, OUTPUTS, Post, _Call, rms_norm
from mlxfuse.kernels.runtime import kernel as _kernel
from mlxfuse.kernels.runtime.source import _squeeze
from tests import msl
from tests.kernels.rounding import NORMAL, nearest, normalised, ulps
from tests.kernels.traffic import norm_ratio
from tests.kernels.variants import norm, quantize
from tests.kernels.weights import to_float64

LENGTHS = (1, 31, 64, 576, 640, 2880, 4096, 16384)
DTYPES = (mx.float16, mx.bfloat16, mx.float32)
MAX_ULPS = {mx.float16: 2, mx.bfloat16: 2, mx.float32: 8}
EPS = 1e-5


def normal(*shape: int, dtype: mx.Dtype, seed: int = 0) -> mx.array:
    rng = np.random.default_rng([seed, *shape])
    return mx.array(rng.standard_normal(shape), mx.float32).astype(dtype)


def rows_of(columns: int, dtype: mx.Dtype) -> tuple[mx.array, mx.array]:
    """Nine rows and residuals: of zeros, with one huge value, of denormals, else random."""
    x, residual = (np.array(normal(9, columns, dtype=mx.float32, seed=s)) for s in (1, 2))
    x[1] = residual[1] = 0
    x[3, columns // 2] = 6e4 if dtype == mx.float16 else 1e18
    scale = 2.0**-24 if dtype == mx.float16 else 2.0**-133
    x[4], residual[4] = np.rint(x[4] * 16) * scale, 0
    x[6] *= 1000
    return mx.array(x).astype(dtype), mx.array(residual).astype(dtype)


class Judge:
    """Counts what it has seen of the values that must be right, and of those that are exact."""

    def __init__(self, dtype: mx.Dtype) -> None:
        self.dtype = dtype
        self.values = self.exact = self.codes = self.ties = 0

    def y(self, got: mx.array, want: np.ndarray) -> None:
        assert got.dtype == self.dtype
        far = ulps(to_float64(got), want, self.dtype)
        assert far.max() <= MAX_ULPS[self.dtype]
        self.values += far.size
        self.exact += int((far == 0).sum())

    def int8(self, got: Int8Activations, y: mx.array) -> None:
        """Codes of the values that ``y`` has."""
        groups = to_float64(y).reshape(-1, 32)
        scales = nearest(np.abs(groups).max(-1) / 127, mx.float32)
        scales = np.where(scales < NORMAL, 0, scales)
        found = to_float64(got.scales).reshape(-1)
        assert ulps(found, scales, mx.float32).max() <= 1
        exact = nearest(groups / np.where(found > 0, found, np.inf)[:, None], mx.float32)
        want = np.copysign(np.floor(np.abs(exact) + 0.5), exact)
        codes = np.array(got.codes, np.float64).reshape(-1, 32)
        wrong = codes != want
        assert np.all(np.abs(np.abs(exact[wrong]) % 1 - 0.5) <= 127 * 2.0**-23)  # at ties only
        sums = nearest(found * codes.sum(-1), mx.float32)
        assert ulps(to_float64(got.sums).reshape(-1), sums, mx.float32).max() <= 1
        self.codes += codes.size
        self.ties += int(wrong.sum())

    def conclude(self) -> None:
        if self.dtype != mx.float32:
            assert self.exact >= 0.999 * self.values
        assert self.ties <= 1e-4 * self.codes


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_length_and_number_of_rows(dtype: mx.Dtype, kernels: str) -> None:
    """llama's norm of h = x + r for all outputs."""
    judge = Judge(dtype)
    for columns in LENGTHS:
        x, residual = rows_of(columns, dtype)
        weight = normal(columns, dtype=dtype)
        h = x + residual
        want = normalised(to_float64(h), to_float64(weight), EPS, dtype)
        whole = columns % 32 == 0
        for rows in (9, 1, 2, 8) if columns > 640 else range(9, 0, -1):
            given = {"residual": residual[:rows], "outputs": OUTPUTS if whole else ("y",)}
            got = rms_norm(x[:rows], weight, EPS, **given)
            assert mx.array_equal(got.h, h[:rows])
            judge.y(got.y, want[:rows])
            if whole:
                judge.int8(got.int8, got.y)
                alone = quantize_int8(got.y)
                for name in ("codes", "scales", "sums"):
                    assert mx.array_equal(getattr(alone, name), getattr(got.int8, name))
                assert mx.all(got.int8.scales[1:2] == 0)
    judge.conclude()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_norm_before_the_addition(dtype: mx.Dtype, kernels: str) -> None:
    """To the bit what a norm, an addition and another norm are; or only the first two."""
    for columns in (31, 64, 4096):
        x, residual = rows_of(columns, dtype)
        after, weight = (normal(columns, dtype=dtype, seed=s) for s in (3, 4))
        post = Post(after, 1e-3, 1.0)
        h = rms_norm(x, after, 1e-3, offset=1.0).y + residual
        got = rms_norm(x, weight, EPS, residual=residual, post=post)
        assert mx.array_equal(got.h, h)
        assert mx.array_equal(got.y, rms_norm(h, weight, EPS).y)
        alone = rms_norm(x, None, 0.0, residual=residual, outputs=(), post=post)
        assert mx.array_equal(alone.h, h)
        assert alone.y is None
        for other in (post._replace(eps=1e-5), post._replace(offset=0.0)):
            assert not mx.array_equal(rms_norm(x, weight, EPS, residual=residual, post=other).h, h)
    with pytest.raises(ValueError, match="post: expected a residual"):
        rms_norm(x, weight, EPS, post=post)
    with pytest.raises(ValueError, match=r"post: expected \(4096,\), found \(64,\)"):
        rms_norm(x, weight, EPS, residual=residual, post=Post(mx.ones((64,)), 1e-3))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_factor_of_the_sum_and_other_weights(dtype: mx.Dtype, kernels: str) -> None:
    """To the bit what a norm, an addition, a product and three norms are."""
    for columns in (31, 576):
        x, residual = rows_of(columns, dtype)
        after, *weights = (normal(columns, dtype=dtype, seed=s) for s in (3, 4, 5, 6))
        post = Post(after, 1e-3, factor=mx.array([0.37], dtype))
        want = (rms_norm(x, after, 1e-3).y + residual) * post.factor
        options = {"residual": residual, "post": post, "others": tuple(weights[1:])}
        got = rms_norm(x, weights[0], EPS, **options)
        assert mx.array_equal(got.h, want)
        for y, weight in zip((got.y, *got.others), weights, strict=True):
            assert mx.array_equal(y, rms_norm(want, weight, EPS).y)
        assert not mx.array_equal(got.y, got.others[0])
        # What is added to a norm of x before all else.
        first, aside = Post(weights[2], 1e-4, 1.0), x * 0.5
        sums = rms_norm(x, first.weight, 1e-4, offset=1.0).y + aside
        both = rms_norm(x, weights[0], EPS, beside=(first, aside), **options)
        for name in ("h", "y"):
            one = getattr(rms_norm(sums, weights[0], EPS, **options), name)
            assert mx.array_equal(getattr(both, name), one)
            assert not mx.array_equal(one, getattr(got, name))
        plain = rms_norm(x, weights[0], EPS, offset=1.0, others=(weights[1],))
        assert mx.array_equal(plain.others[0], rms_norm(x, weights[1], EPS, offset=1.0).y)
        assert plain.h is None
    with pytest.raises(ValueError, match=r"factor: expected \(1,\), found \(2,\)"):
        rms_norm(x, after, EPS, residual=residual, post=post._replace(factor=mx.ones((2,))))
    with pytest.raises(ValueError, match="others: expected y"):
        rms_norm(x, after, EPS, residual=residual, post=post, outputs=(), others=(after,))
    with pytest.raises(ValueError, match=r"weight: expected \(576,\), found \(31,\)"):
        rms_norm(x, after, EPS, others=(after[:31],))
    with pytest.raises(ValueError, match="beside: expected a norm as post"):
        rms_norm(x, after, EPS, beside=(first, aside))
    with pytest.raises(ValueError, match=r"beside: expected .*, found"):
        rms_norm(x, after, EPS, beside=(first, aside[:1]), **options)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_product_before_the_addition(dtype: mx.Dtype, kernels: str) -> None:
    """To the bit what MLX's product with a number, its addition and a norm are."""
    for columns, outputs in ((31, ()), (4096, ("y",))):
        x, residual = rows_of(columns, dtype)
        for factor in (0.22, 0.0):
            h = residual + x * factor
            options = {"residual": residual, "outputs": outputs, "post": factor}
            before = _kernel.launches["rms_norm"]
            got = rms_norm(x, None, EPS, **options)
            assert _kernel.launches["rms_norm"] - before == 1
            assert mx.array_equal(got.h, h)
    assert mx.array_equal(got.y, rms_norm(h, None, EPS).y)


OPTIONS = [
    ({}, ("int8",)),
    ({"offset": 1.0}, ("int8",)),
    ({"weight": None}, ("int8",)),
]


@pytest.mark.parametrize("added", [True, False])
def test_options(added: bool, kernels: str) -> None:
    """Each set of options on one type; fewer outputs have the same bits."""
    for (given, outputs), dtype in zip(OPTIONS, DTYPES, strict=True):
        options = {"weight": normal(640, dtype=dtype), "eps": EPS, **given}
        x, residual = rows_of(640, dtype)
        h = x + residual if added else x
        if added:
            options["residual"] = residual
        offset = options.get("offset", 0.0)
        weight = None if options["weight"] is None else to_float64(options["weight"])
        judge = Judge(dtype)
        got = rms_norm(x, **options, outputs=OUTPUTS)
        assert mx.array_equal(got.h, h) if added else got.h is None
        judge.y(got.y, normalised(to_float64(h), weight, EPS, dtype, offset=offset))
        judge.int8(got.int8, got.y)
        judge.conclude()
        few = rms_norm(x, **options, outputs=outputs)
        assert few.y is None
        assert not added or mx.array_equal(few.h, h)
        assert (few.int8 is None) == ("int8" not in outputs)
        if few.int8 is not None:
            assert few.int8.dtype == dtype
            for name in ("codes", "scales", "sums"):
                assert mx.array_equal(getattr(few.int8, name), getattr(got.int8, name))
        only = rms_norm(x, **options)
        assert only.int8 is None
        assert mx.array_equal(only.y, got.y)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_full_product(dtype: mx.Dtype, kernels: str) -> None:
    judge = Judge(dtype)
    options = itertools.product(LENGTHS, (0.0, 1.0), (True, False), (1, 2))
    for columns, offset, added, count in options:
        x, residual = rows_of(columns, dtype)
        weight = normal(columns, dtype=dtype)
        h = x + residual if added else x
        outputs = OUTPUTS[:count] if columns % 32 == 0 else ("y",)
        more = {"offset": offset}
        want = normalised(to_float64(h), to_float64(weight), EPS, dtype, **more)
        got = rms_norm(
            x, weight, EPS, residual=residual if added else None, outputs=outputs, **more
        )
        judge.y(got.y, want)
        if got.int8 is not None:
            judge.int8(got.int8, got.y)
    judge.conclude()


def test_the_casts_are_told_apart(kernels: str) -> None:
    """Control: one rounding, as the published gemma has it, is seen; so is 1.004 times too much."""
    x, weight = normal(3, 640, dtype=mx.bfloat16), normal(640, dtype=mx.bfloat16, seed=1)
    y = rms_norm(x, weight, EPS).y
    for factor, cast in ((1.0, "gemma"), (1.004, "llama")):
        want = normalised(to_float64(x), to_float64(weight) * factor, EPS, mx.bfloat16, cast=cast)
        judge = Judge(mx.bfloat16)
        judge.y(y, want)
        with pytest.raises(AssertionError):
            judge.conclude()
    x = x.astype(mx.float32)
    want = normalised(to_float64(x), None, 1.00001 * EPS, mx.float32)
    with pytest.raises(AssertionError):
        Judge(mx.float32).y(rms_norm(0.01 * x, None, EPS).y, want)


def test_ties_go_away_from_zero(kernels: str) -> None:
    values = np.zeros(64, np.float32)
    values[:8] = [127, 0.5, -0.5, 1.5, 2.5, -2.5, 126.5, 0.49999997]
    got = quantize_int8(mx.array(values))
    assert got.codes[:8].tolist() == [127, 1, -1, 2, 3, -3, 127, 0]
    assert got.scales.tolist() == [1, 0]
    assert got.sums.tolist() == [127 + 2 + 127, 0]
    codes, scales, sums = QUANTIZE.reference(mx.array(values))
    assert mx.array_equal(got.codes, codes)
    assert mx.array_equal(got.scales, scales)
    assert mx.array_equal(got.sums, sums)


def test_what_is_not_finite_stays_so(kernels: str) -> None:
    x = np.array(normal(4, 64, dtype=mx.float32))
    x[1, 5], x[2, 40], x[3, 0] = np.inf, np.nan, 3e38
    for weight in (mx.ones((64,)), None):
        got = rms_norm(mx.array(x), weight, EPS, outputs=("y", "int8"))
        want = mx.fast.rms_norm(mx.array(x), weight, EPS)
        np.testing.assert_array_equal(np.isnan(got.y), np.isnan(want))
        assert np.isnan(got.y).sum() == 1 + 64
        assert got.y[3].abs().max().item() == 0  # the sum of squares overflows, as in MLX
        wrong = np.array([[0, 0], [1, 0], [1, 1], [0, 0]], bool)
        for found in (got.int8.scales, got.int8.sums):
            np.testing.assert_array_equal(np.isnan(found), wrong)
    alone = quantize_int8(mx.array(x))
    assert alone.scales[1, 0].item() == np.inf
    assert np.isnan(alone.sums).tolist() == [[0, 0], [1, 0], [0, 1], [0, 0]]
    assert np.all(np.array(alone.codes)[1, :32] == 0)
    for mine, reference in zip(
        (alone.scales, alone.sums), QUANTIZE.reference(mx.array(x))[1:], strict=True
    ):
        np.testing.assert_array_equal(mine, reference)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("module", "offset"),
    [
        (nn.RMSNorm, 0.0),
        (gemma.RMSNorm, 1.0),
        (gemma2.RMSNorm, 1.0),
        (gemma3_text.RMSNorm, 1.0),
    ],
)
def test_it_is_the_norm_of_mlx_lm(
    module: Callable[..., nn.Module],
    offset: float,
    dtype: mx.Dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x = normal(5, 640, dtype=dtype)
    layer = module(640, eps=1e-6)
    layer.weight = normal(640, dtype=dtype, seed=1)
    want = layer(x)
    monkeypatch.setenv("MLXFUSE_KERNELS", "reference")
    assert mx.array_equal(rms_norm(x, layer.weight, 1e-6, offset=offset).y, want)
    # Control: with one rounding, as the published gemma has it.
    exact = mx.fast.rms_norm(x.astype(mx.float32), offset + layer.weight.astype(mx.float32), 1e-6)
    assert mx.array_equal(exact.astype(dtype), want) == (dtype == mx.float32)


def test_other_types_promote_without_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = normal(2, 64, dtype=mx.float16), normal(64, dtype=mx.float32)
    monkeypatch.setenv("MLXFUSE_KERNELS", "emulated")
    key = "rms_norm", "x is mlx.core.float16, its weight mlx.core.float32"
    before = fallbacks[key]
    got = rms_norm(x, weight, EPS, outputs=("y", "int8"))
    assert fallbacks[key] == before + 1
    assert mx.array_equal(got.y, mx.fast.rms_norm(x, weight, EPS))
    assert got.y.dtype == got.int8.dtype == mx.float32
    got = rms_norm(x, None, EPS, residual=x.astype(mx.float32))
    assert got.h.dtype == mx.float32
    for shape, reason in (
        ((0, 64), "x has no rows"),
        ((2, MAX_COLUMNS + 4), "rows of more than 16384 values"),
    ):
        x = mx.ones(shape)
        assert KERNEL.refuse(_Call(x, None, EPS, None, 0.0, ("y",))) == reason
        assert mx.array_equal(rms_norm(x, None, EPS).y, mx.fast.rms_norm(x, None, EPS))
    assert quantize_int8(mx.zeros((0, 32))).scales.shape == (0, 1)


def test_arguments_that_do_not_fit_are_refused() -> None:
    x, weight = mx.zeros((2, 48)), mx.zeros((48,))
    with pytest.raises(ValueError, match=r"weight: expected \(48,\), found \(32,\)"):
        rms_norm(x, mx.zeros((32,)), EPS)
    with pytest.raises(ValueError, match=r"residual: expected \(2, 48\), found \(48,\)"):
        rms_norm(x, weight, EPS, residual=weight)
    for outputs in ((), ("y", "sums"), ("y", "fp8")):
        with pytest.raises(ValueError, match="outputs: expected some of"):
            rms_norm(x, weight, EPS, outputs=outputs)
    with pytest.raises(ValueError, match="needs rows of a multiple of 32 values, found 48"):
        rms_norm(x, weight, EPS, outputs=("y", "int8"))
    with pytest.raises(ValueError, match=r"x: expected \[\.\.\., K\] with K > 0"):
        rms_norm(mx.array(1.0), None, EPS)
    for bad in (x, mx.zeros((2, 32), mx.int8), mx.array(1.0)):
        with pytest.raises(ValueError, match="K a multiple of 32"):
            quantize_int8(bad)


def test_one_dispatch() -> None:
    x, weight = mx.zeros((2, 3, 576), mx.float16), mx.zeros((576,), mx.float16)

    def all_outputs() -> list[mx.array]:
        got = rms_norm(x, weight, EPS, residual=x, offset=1.0, outputs=OUTPUTS)
        return [got.h, got.y, got.int8.codes, got.int8.scales, got.int8.sums]

    mx.eval(x, weight)
    assert dispatches(all_outputs) == {"rms_norm": 1}
    assert dispatches(lambda: quantize_int8(x).codes) == {"quantize_int8": 1}


def test_lengths_of_a_piece_share_a_program() -> None:
    programs = {norm(m, k, mx.float16).launch.program for m in (1, 7) for k in (64, 576, 1024)}
    assert len(programs) == 1
    launch = norm(3, 2880, mx.float16).launch
    assert launch.threadgroup == (256, 1, 1)  # 720 quads in three pieces
    assert launch.grid == (3 * 256, 1, 1)
    assert norm(1, 16384, mx.float16).launch.threadgroup == (256, 1, 1)
    assert norm(1, 1, mx.float16, outputs=("y",)).launch.threadgroup == (32, 1, 1)


@pytest.mark.parametrize(
    "variant",
    [
        norm(70, 576, mx.float16),
        norm(24, 2880, mx.bfloat16, outputs=("int8",)),
        norm(8, 16384, mx.float32, added=False, outputs=("y",)),
        quantize(16, 1024, mx.float16),
    ],
    ids=str,
)
def test_traffic(variant) -> None:
    assert norm_ratio(variant) <= 1.001


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch):
    """Runs the kernels with one text of their source replaced."""
    whole = _kernel.header

    def plant(old: str, new: str) -> None:
        old, new = (_squeeze(text).strip() for text in (old, new))

        def header(parts: tuple[str, ...]) -> str:
            assert old in whole(parts)
            return whole(parts).replace(old, new)

        monkeypatch.setattr(_kernel, "header", header)
        monkeypatch.setenv("MLXFUSE_KERNELS", "emulated")
        _kernel._compiled.cache_clear()

    yield plant
    _kernel._compiled.cache_clear()


BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"


def test_what_is_planted_is_found(planted) -> None:
    """Controls: a row read twice, a missing barrier, a store past the row, halves to even."""
    twice = "v[p] = load_quad<T, whole>(x, row.first, quad_of(row, p), row.columns);"
    planted(twice, f"{twice} v[p] += load_quad<T, whole>(x, row.first, 0, row.columns) * T(0);")
    with pytest.raises(AssertionError, match="x"):
        norm_ratio(norm(2, 2048, mx.float32))
    x = normal(2, 576, dtype=mx.float32)  # 144 quads for 160 threads
    for old, new, kinds in (
        (BARRIER, "", {"data-race", "uninitialised-read"}),
        ("if (at < row.columns) {", "if (at <= row.columns) {", {"data-race", "out-of-bounds"}),
    ):
        planted(old, new)
        with msl.installed(build="checked"), pytest.raises(msl.MslRunError) as caught:
            rms_norm(x, None, EPS)
        assert caught.value.kind in kinds
    planted("metal::round(", "metal::rint(")
    with msl.installed(build="fast"):
        got = quantize_int8(mx.array([127, 0.5, 2.5, *[0] * 29]))
    assert got.codes[:3].tolist() == [127, 0, 2]
