"""Norms of groups of values behind their gate, against float64 and MLX-LM's own classes."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.granitemoehybrid import GraniteMoeHybridRMSNormGated
from mlx_lm.models.nemotron_h import MambaRMSNormGated

from mlxfuse.fusion.dispatches import dispatches
from mlxfuse.kernels.norm.gated_norm import KERNEL, _Call, gated_norm
from mlxfuse.kernels.runtime import kernel as _kernel
from tests.kernels.rounding import nearest, normalised, ulps
from tests.kernels.weights import to_float64

MAX_ULPS = {mx.float16: 2, mx.bfloat16: 2, mx.float32: 16}
# Shape, groups.
CASES = [((1, 1, 512), 8), ((2, 3, 186), 6), ((5, 1200), 1), ((1, 2112), 2), ((3, 7), 1)]


def call_of(shape: tuple[int, ...], groups: int, dtype: mx.Dtype) -> _Call:
    rng = np.random.default_rng(shape)

    def draw(*shape: int, scale: float = 1.0) -> mx.array:
        return mx.array(rng.normal(0, scale, shape), mx.float32).astype(dtype)

    return _Call(draw(*shape), draw(*shape, scale=3), draw(shape[-1]), 1e-5, groups)


def run(call: _Call) -> mx.array:
    return gated_norm(call.x, call.gate, call.weight, call.eps, groups=call.groups)


def exact(call: _Call) -> np.ndarray:
    """float64 with the documented rounding points."""
    gate, shape = to_float64(call.gate), call.x.shape
    h = nearest(to_float64(call.x) * gate / (1 + np.exp(-gate)), call.x.dtype)
    weight = to_float64(call.weight).reshape(call.groups, -1)
    parts = h.reshape(-1, *weight.shape)
    return normalised(parts, weight, call.eps, call.x.dtype).reshape(shape)


def share_off(got: mx.array, call: _Call) -> float:
    """Of values that are too far, in units of the last place."""
    return float(np.mean(ulps(to_float64(got), exact(call), got.dtype) > MAX_ULPS[got.dtype]))


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32])
def test_against_float64(dtype: mx.Dtype, kernels: str) -> None:
    for case in CASES:
        call = call_of(*case, dtype)
        before = _kernel.launches["gated_norm"]
        got = run(call)
        assert _kernel.launches["gated_norm"] == before + 1
        for found in (got, KERNEL.reference(call)[0]):
            assert (found.shape, found.dtype) == (call.x.shape, dtype)
            # A product that is rounded the other way changes one value by more.
            assert share_off(found, call) <= 0.01
        # Controls: each argument matters, and the groups.
        for name in ("x", "gate", "weight"):
            array = getattr(call, name)
            assert share_off(got, replace(call, **{name: array[..., ::-1]})) > 0.3, name
        if call.groups > 1:
            assert share_off(got, replace(call, groups=1)) > 0.3


def test_it_is_what_the_classes_of_mlx_lm_compute() -> None:
    call = call_of((2, 3, 192), 4, mx.float32)
    own = MambaRMSNormGated(192, 1e-5, 48)
    own.weight = call.weight
    one = GraniteMoeHybridRMSNormGated(192, 1e-5)
    one.weight = call.weight
    for module, groups in ((own, 4), (one, 1)):
        (got,) = KERNEL.reference(replace(call, groups=groups))
        assert mx.allclose(got, module(call.x, call.gate), rtol=1e-5, atol=1e-6)


def test_one_dispatch_or_a_reason() -> None:
    call = call_of((1, 1, 64), 2, mx.float16)
    mx.eval(call.x, call.gate, call.weight)
    assert dispatches(lambda: run(call)) == {"gated_norm": 1}
    assert KERNEL.refuse(replace(call, x=call.x[:0])) == "x has no rows"
    wide = replace(call, weight=call.weight.astype(mx.float32))
    assert KERNEL.refuse(wide) == "x is mlx.core.float16, its weight mlx.core.float32"
    assert KERNEL.reference(wide)[0].dtype == mx.float32
    long = call_of((1, 16388), 1, mx.float16)
    assert KERNEL.refuse(long) == "groups of more than 16384 values"
    for change, message in (
        ({"groups": 5}, r"x: expected \[..., K\] with 5 equal groups, found \(1, 1, 64\)"),
        ({"gate": call.gate[..., 1:]}, r"gate: expected \(1, 1, 64\), found \(1, 1, 63\)"),
        ({"weight": call.weight[1:]}, r"weight: expected \(64,\), found \(63,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            run(replace(call, **change))
