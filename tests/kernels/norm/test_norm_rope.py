"""Norm and rotary embedding of q and k against float64, `mx.fast.rope` and mlx-lm's classes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.rope_utils import initialize_rope

from mlxfuse.fusion.dispatches import dispatches
from mlxfuse.kernels.norm.norm_rope import KERNEL, RopeOptions, _Call
from mlxfuse.kernels.norm.norm_rope import norm_rope as norm_rope_of
from mlxfuse.kernels.runtime import kernel as _kernel
from mlxfuse.kernels.runtime.source import _squeeze
from tests import msl
from tests.kernels.rounding import nearest, normalised, quantum
from tests.kernels.traffic import norm_ratio
from tests.kernels.variants import rope
from tests.kernels.weights import to_float64

EPS32 = 2.0**-24


@dataclass(frozen=True)
class Case:
    """Shapes, and further arguments of `norm_rope`; ``at``: offset, one or one for each of B."""

    columns: int
    dims: int
    dtype: mx.Dtype
    at: int | tuple[int, ...] = 0
    batch: int = 1
    length: int = 3
    heads: int = 5
    kv_heads: int = 2
    normed: bool = False
    more: tuple[tuple[str, Any], ...] = (("base", 10000.0),)

    def __str__(self) -> str:
        kind = f"{self.columns}-{self.dims}-{str(self.dtype).removeprefix('mlx.core.')}"
        return f"{kind}{'-norm' * self.normed}-{'-'.join(n for n, _ in self.more)}"

    def arguments(self) -> tuple[mx.array, mx.array | None, dict[str, Any]]:
        """q, k or None if it has no heads, and the rest."""
        rng = np.random.default_rng(self.columns)

        def normal(*shape: int) -> mx.array:
            return mx.array(rng.standard_normal(shape), mx.float32).astype(self.dtype)

        options = {"heads": self.heads, "kv_heads": self.kv_heads, "dims": self.dims}
        options |= {"offset": self.at if isinstance(self.at, int) else mx.array(self.at)}
        options |= dict(self.more)
        lead = self.batch, self.length
        q, k = (normal(*lead, n * self.columns) for n in (self.heads, self.kv_heads))
        if self.normed:
            of_q, of_k = (self.heads, self.kv_heads) if options.get("wide") else (1, 1)
            options |= {"q_weight": normal(of_q * self.columns)}
            options |= {"k_weight": normal(of_k * self.columns)}
        if not self.kv_heads:
            return q, None, {n: v for n, v in options.items() if n != "k_weight"}
        return q, k, options


FREQS = mx.array(np.geomspace(1, 5e5, 24), mx.float32)
PROPORTIONAL = mx.array([1.0, 30.0, *[float("inf")] * 30], mx.float32)
CASES = [
    Case(64, 64, mx.float32, at=100_000, heads=9, kv_heads=3, more=(("base", 1e5),)),
    Case(128, 128, mx.float16, at=(1000,), normed=True, more=(("base", 1e6), ("eps", 1e-6))),
    Case(
        *(256, 256, mx.bfloat16, (4, -3), 2, 4, 4, 1),
        normed=True,
        more=(("base", 1e6), ("norm_offset", 1.0), ("scale", 0.125)),
    ),
    Case(96, 48, mx.float16, at=9, more=(("freqs", FREQS), ("mscale", 1.1903))),
    Case(64, 64, mx.bfloat16, at=tuple(range(-4, 5)), batch=9, more=(("freqs", PROPORTIONAL),)),
    Case(80, 20, mx.float32, at=77, normed=True, more=(("base", 1e4), ("traditional", True))),
    Case(128, 64, mx.float16, at=5, more=(("base", 1e4), ("traditional", True))),
    Case(8, 2, mx.float32, at=3, heads=1, kv_heads=1),
    Case(512, 500, mx.float16, at=3, length=2, normed=True),
    Case(64, 64, mx.float16, (5, 900), 2, kv_heads=0, normed=True, more=(("freqs", PROPORTIONAL),)),
    # Norms of all heads together: fewer heads than SIMD-groups, and more.
    Case(80, 20, mx.float32, at=7, heads=3, normed=True, more=(("base", 1e4), ("wide", True))),
    Case(96, 48, mx.float16, 9, heads=13, normed=True, more=(("freqs", FREQS), ("wide", True))),
    Case(
        *(128, 128, mx.bfloat16, (4, -3), 2, 2, 8, 8),
        normed=True,
        more=(("base", 1e6), ("norm_offset", 1.0), ("traditional", True), ("wide", True)),
    ),
    # Norms without weights, also of heads that are not turned.
    Case(64, 64, mx.float32, at=11, more=(("base", 1e4), ("q_scale", 3.87))),
    Case(48, 48, mx.bfloat16, at=11, more=(("base", 1e4), ("q_scale", 3.87))),
    Case(128, 128, mx.float16, at=11, more=(("base", 1.0), ("scale", 0.0), ("q_scale", 3.87))),
]


@dataclass(frozen=True)
class Side:
    """q or k of a call with its result."""

    x: mx.array
    heads: int
    weight: mx.array | None
    factor: float | None
    got: mx.array

    @property
    def normed(self) -> bool:
        return self.weight is not None or self.factor is not None


def norm_rope(
    q: mx.array, k: mx.array | None, *, offset: Any, **options: Any
) -> tuple[mx.array, ...]:
    return norm_rope_of(q, k, offset, RopeOptions(**options))


def sides(q: mx.array, k: mx.array | None, options: dict[str, Any]) -> list[Side]:
    """Both sides of `norm_rope`, or the one that there is, run on them."""
    got = norm_rope(q, k, **options)
    factors = [options.get("q_scale"), "q_scale" in options or None]
    named = [(q, "heads", "q_weight")] + [(k, "kv_heads", "k_weight")] * (k is not None)
    return [
        Side(x, options[n], options.get(w), factor, y)
        for (x, n, w), factor, y in zip(named, factors, got, strict=False)
    ]


def exact(side: Side, options: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """float64 results with the documented rounding points, and how far float32 may be off.

    An angle is off by four roundings, its sine and cosine by the 4 units of the last place that
    Metal allows, the sum by two; the norm in float32 by 8 units.
    """
    dtype, dims, traditional = side.x.dtype, options["dims"], options.get("traditional", False)
    batch, length = side.x.shape[:2]
    v = to_float64(side.x)
    if not options.get("wide"):
        v = v.reshape(batch, length, side.heads, -1)
    offset, eps = options.get("norm_offset", 0.0), options.get("eps", 1e-6)
    if side.weight is not None:
        v = normalised(v, to_float64(side.weight), eps, dtype, offset=offset)
    elif side.factor is not None:
        factor = np.full(v.shape[-1], nearest(float(side.factor), dtype))
        v = normalised(v, factor, eps, dtype)
    v = v.reshape(batch, length, side.heads, -1).transpose(0, 2, 1, 3)
    freqs = options.get("freqs")
    if freqs is None:
        freqs = options["base"] ** (np.arange(0, dims, 2) / dims)
    first = np.broadcast_to(np.array(options["offset"], np.float64), (batch,))
    position = options.get("scale", 1.0) * (first[:, None] + np.arange(length))
    angle = (position[..., None] / np.array(freqs, np.float64))[:, None]
    turned = nearest(v[..., :dims] * nearest(options.get("mscale", 1.0), dtype), dtype)
    at = (np.s_[0:dims:2], np.s_[1:dims:2]) if traditional else (
        np.s_[: dims // 2], np.s_[dims // 2 : dims]
    )  # fmt: skip
    a, b = turned[..., at[0]], turned[..., at[1]]
    of_norm = 16 * EPS32 if side.normed and dtype == mx.float32 else 0.0
    slack = np.abs(v) * of_norm
    v[..., at[0]] = a * np.cos(angle) - b * np.sin(angle)
    v[..., at[1]] = a * np.sin(angle) + b * np.cos(angle)
    for half in at:
        slack[..., half] = (np.abs(a) + np.abs(b)) * (EPS32 * (4 * np.abs(angle) + 6) + of_norm)
    return v, slack


def judge(side: Side, options: dict[str, Any]) -> None:
    """Within the slack of float32 and one rounding; 1 in 1000 values may be two units of a head's
    largest value off, where the norm itself is rounded the other way."""
    want, slack = exact(side, options)
    got = side.got
    assert (got.shape, got.dtype) == (want.shape, side.x.dtype)
    excess = np.abs(to_float64(got) - want) - slack
    excess -= 0.501 * quantum(np.abs(want) + slack, got.dtype)
    if side.normed:
        assert np.mean(excess > 0) <= 1e-3
        excess -= 2 * quantum(np.abs(want).max(-1, keepdims=True), got.dtype)
    assert excess.max() <= 0


@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_float64(case: Case, kernels: str) -> None:
    q, k, options = case.arguments()
    before = _kernel.launches["norm_rope"]
    found = sides(q, k, options)
    assert _kernel.launches["norm_rope"] == before + 1
    # Controls: another position, another kind of pairs, other periods or weights.
    others: list[dict[str, Any]] = []
    if options.get("scale") != 0.0:
        others += [{"offset": options["offset"] + 1}]
        if case.dims > 2:
            others += [{"traditional": not options.get("traditional", False)}]
            others += [{n: 1.01 * options[n]} for n in ("base", "freqs") if n in options]
    for side in found:
        judge(side, options)
        for other in others:
            with pytest.raises(AssertionError):
                judge(side, options | other)
        if side.weight is not None:
            with pytest.raises(AssertionError):
                judge(replace(side, weight=1.01 * side.weight), options)
        if side.factor is not None:
            with pytest.raises(AssertionError):
                judge(replace(side, factor=1.01 * side.factor), options)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_reference_is_mx_fast_rope(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32 on the CPU: there sines of other types are rounded, and Metal's are fast ones."""
    monkeypatch.setenv("MLXFUSE_KERNELS", "reference")
    q, k, options = replace(case, dtype=mx.float32).arguments()
    with mx.stream(mx.cpu):
        found = sides(q, k, options)
        mx.eval([side.got for side in found])
    for side in found:
        want, slack = exact(side, options)
        # MLX takes the power of the base, and the sum of squares, in float32.
        limit = 8 * slack + 16 * EPS32 * np.abs(want).max()
        assert np.all(np.abs(to_float64(side.got) - want) <= limit)


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}
LONG = {"rope_type": "longrope", "original_max_position_embeddings": 4096}
LONG |= {"short_factor": [1.0] * 24, "long_factor": np.linspace(1, 9, 24).tolist()}
PARTIAL = {"rope_type": "proportional", "partial_rotary_factor": 0.25}


@pytest.mark.parametrize(
    ("config", "names"),
    [
        (None, {"base": "base", "scale": "scale"}),
        ({"rope_type": "linear", "factor": 8.0}, {"base": "base", "scale": "scale"}),
        ({"rope_type": "llama3", "factor": 8.0}, {"freqs": "_freqs"}),
        (YARN, {"freqs": "_freqs", "mscale": "mscale"}),
        (LONG, {"freqs": "_freqs", "mscale": "_scale"}),
        (PARTIAL, {"freqs": "_freqs"}),
    ],
    ids=lambda v: v.get("rope_type") if isinstance(v, dict) else None,
)
@pytest.mark.parametrize("dtype", [mx.float16, mx.float32])
def test_the_classes_of_mlx_lm(
    config: dict[str, Any] | None,
    names: dict[str, str],
    dtype: mx.Dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What their attributes are called here; 48 of 64 components turn."""
    monkeypatch.setenv("MLXFUSE_KERNELS", "reference")
    layer = initialize_rope(48, 10000.0, False, config, 131072)
    given = {ours: getattr(layer, theirs) for ours, theirs in names.items()}
    if "mscale" in given:
        assert given["mscale"] > 1.1
    case = Case(64, 48, dtype, at=5, more=tuple(given.items()))
    q, k, options = case.arguments()
    for side in sides(q, k, options):
        x = side.x.reshape(1, 3, side.heads, 64).transpose(0, 2, 1, 3)
        assert mx.array_equal(side.got, layer(x, offset=5))


def test_one_dispatch_for_any_length_and_offset() -> None:
    q, k, options = Case(64, 64, mx.float16, at=5, length=1, normed=True).arguments()

    mx.eval(q, k, options)

    assert dispatches(lambda: norm_rope(q, k, **options)) == {"norm_rope": 1}
    launches = [
        rope(64, 64, mx.float16, length=n, offset=mx.array(at)).launch
        for n, at in ((1, 0), (1, 4000), (700, 3))
    ]
    assert len({(a.program, a.template, a.threadgroup) for a in launches}) == 1
    # 8 heads, 4 for each SIMD-group.
    assert [a.grid for a in launches] == [(64, 1, 1), (64, 1, 1), (64, 700, 1)]


@pytest.mark.parametrize(
    "variant",
    [
        rope(128, 128, mx.float16, length=256),
        rope(96, 64, mx.float32, length=128, normed=False, traditional=True),
    ],
    ids=str,
)
def test_traffic(variant) -> None:
    assert norm_ratio(variant) <= 1.001


def test_what_the_kernel_does_not_do(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, options = Case(64, 64, mx.float16, at=5, normed=True).arguments()
    how = RopeOptions(**{n: v for n, v in options.items() if n != "offset"})
    call = _Call(q, k, mx.array(5), how)
    assert KERNEL.refuse(call) is None
    weight = options["q_weight"].astype(mx.float32)
    for change, reason in (
        ({"q": q[:, :0], "k": k[:, :0]}, "q or k has no rows"),
        ({"q": q.astype(mx.int32)}, "q is float16, bfloat16 or float32, not mlx.core.int32"),
        (
            {"options": replace(how, q_weight=weight)},
            "q is mlx.core.float16, k, v or a weight mlx.core.float32",
        ),
        ({"options": replace(how, heads=80)}, "heads of fewer than 8 or more than 512 values"),
    ):
        assert KERNEL.refuse(replace(call, **change)) == reason
    monkeypatch.setenv("MLXFUSE_KERNELS", "emulated")
    assert norm_rope(q, k, **options | {"q_weight": weight})[0].dtype == mx.float32


def bad(change: dict[str, Any]) -> Callable[[], Any]:
    q, k, options = Case(64, 64, mx.float16, at=5).arguments()
    options |= {"q": q, "k": k} | change
    return lambda: norm_rope(**options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 3}, r"q: expected \[B, L, 3 \* D\], found \(1, 3, 320\)"),
        ({"kv_heads": 3}, r"k: expected \(1, 3, 192\), found \(1, 3, 128\)"),
        ({"dims": 66}, "dims: expected an even number up to 64, found 66"),
        ({"dims": 31}, "dims: expected an even number up to 64, found 31"),
        ({"offset": mx.array([1, 2])}, r"offset: expected one or \(1,\), found \(2,\)"),
        ({"base": None}, "either base or freqs"),
        ({"freqs": mx.ones((32,))}, "either base or freqs"),
        ({"base": None, "freqs": mx.ones((8,))}, r"freqs: expected \(32,\), found \(8,\)"),
        ({"q_weight": mx.ones((64,))}, "both q_weight and k_weight, or neither"),
        ({"k": None}, r"k: expected \(1, 3, 128\), found \(1, 3, 0\)"),
        (
            {"k": None, "kv_heads": 0, "q_weight": mx.ones((64,)), "k_weight": mx.ones((64,))},
            "both q_weight and k_weight, or neither",
        ),
        (
            {"q_weight": mx.ones((64,)), "k_weight": mx.ones((32,))},
            r"k_weight: expected \(64,\), found \(32,\)",
        ),
        (
            {"q_weight": mx.ones((64,)), "k_weight": mx.ones((64,)), "wide": True},
            r"q_weight: expected \(320,\), found \(64,\)",
        ),
        (
            {"q_weight": mx.ones((64,)), "k_weight": mx.ones((64,)), "q_scale": 2.0},
            "either weights or q_scale",
        ),
    ],
)
def test_arguments_that_do_not_fit_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bad(change)()


def test_a_lane_past_the_head_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Control: without the test for it, 80 values are stored by 96 lanes."""
    whole = _kernel.header
    test = _squeeze("if (slots.inside(s)) {\nout").strip()
    assert test in whole(("norm_rope.metal:NoNorm",))
    monkeypatch.setattr(_kernel, "header", lambda p: whole(p).replace(test, "{\nout"))
    monkeypatch.setenv("MLXFUSE_KERNELS", "emulated")
    _kernel._compiled.cache_clear()
    q, k, options = Case(80, 80, mx.float16, at=5).arguments()
    with msl.installed(build="checked"), pytest.raises(msl.MslRunError) as caught:
        norm_rope(q, k, **options)
    _kernel._compiled.cache_clear()
    assert caught.value.kind in ("data-race", "out-of-bounds")


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32])
def test_values_are_normed_and_not_turned(dtype: mx.Dtype, kernels: str) -> None:
    """To the bit what MLX's norm without a weight gives, or by one step; q and k stay."""
    for columns, heads, kv_heads in ((80, 5, 2), (256, 4, 5)):
        case = Case(columns, columns // 2, dtype, at=7, heads=heads, kv_heads=kv_heads, normed=True)
        q, k, options = case.arguments()
        assert k is not None
        offset = options.pop("offset")
        how = RopeOptions(**options)
        v = 3 * k[..., ::-1]
        *both, got = norm_rope_of(q, k, offset, how, v)
        want = mx.fast.rms_norm(v.reshape(1, 3, kv_heads, columns), None, how.eps)
        step = {mx.float16: 2.0**-10, mx.bfloat16: 2.0**-7, mx.float32: 2.0**-20}[dtype]
        assert mx.allclose(got, want.transpose(0, 2, 1, 3), rtol=step, atol=0)
        for one, other in zip(both, norm_rope_of(q, k, offset, how), strict=True):
            assert mx.array_equal(one, other)
        # Keys that are values too; control: they are not the rotated ones.
        *_, keys, same = norm_rope_of(q, k, offset, how, k)
        want = mx.fast.rms_norm(k.reshape(1, 3, kv_heads, columns), None, how.eps)
        assert mx.allclose(same, want.transpose(0, 2, 1, 3), rtol=step, atol=0)
        assert not mx.allclose(same, keys, atol=1e-2)
    with pytest.raises(ValueError, match="v: expected"):
        norm_rope_of(q, k, offset, how, v[:, :2])
