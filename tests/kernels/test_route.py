"""The experts that are chosen, and their weights, against float64."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlxfuse.kernels.route import KERNEL, route
from mlxfuse.kernels.runtime import kernel as _kernel
from tests import msl

from .matmul_cases import EPS
from .weights import to_float64

CASES = [
    ((1, 1, 128), 8, mx.float16, False),
    ((3, 60), 4, mx.bfloat16, True),
    ((2, 3), 3, mx.float32, False),
    ((5, 257), 32, mx.float32, True),
    ((1, 1), 1, mx.float16, True),
]


def exact(logits: mx.array, count: int, whole: bool) -> tuple[np.ndarray, np.ndarray]:
    v = to_float64(logits)
    ids = np.argsort(-v, axis=-1, kind="stable")[..., :count]
    e = np.exp(v - v.max(-1, keepdims=True))
    chosen = np.take_along_axis(e, ids, axis=-1)
    return ids, chosen / (e if whole else chosen).sum(-1, keepdims=True)


@pytest.mark.parametrize(("shape", "count", "dtype", "whole"), CASES)
def test_the_largest_are_chosen(
    shape: tuple[int, ...], count: int, dtype: mx.Dtype, whole: bool, kernels: str
) -> None:
    rng = np.random.default_rng(shape[-1])
    # Steps of an eighth: every type holds them, and many are equal.
    logits = mx.array(rng.integers(-40, 40, shape) / 8).astype(dtype)
    before = _kernel.launches["route"]
    ids, scores = route(logits, count, whole=whole)
    assert _kernel.launches["route"] - before == 1
    assert (ids.dtype, scores.dtype) == (mx.uint32, dtype)
    want, weights = exact(logits, count, whole)
    np.testing.assert_array_equal(np.array(ids), want)
    bound = (EPS[dtype] + 2e-6) * weights
    assert np.all(np.abs(to_float64(scores) - weights) <= bound)
    same, rounded = KERNEL.reference(logits, count, whole, None)
    assert mx.array_equal(same, ids)
    assert np.all(np.abs(to_float64(rounded) - weights) <= bound)
    if count > 1 or whole:  # control: the other softmax
        other = exact(logits, count, not whole)[1]
        assert (count == shape[-1]) == bool(np.all(np.abs(other - weights) <= bound))


@pytest.mark.parametrize("dtype", [mx.float16, mx.float32])
def test_the_gate_of_a_shared_expert(dtype: mx.Dtype, kernels: str) -> None:
    rng = np.random.default_rng(0)
    logits = mx.array(rng.standard_normal((2, 5, 60))).astype(dtype)
    gate = mx.array(rng.normal(0, 8, (2, 5, 1))).astype(dtype)
    ids, scores, shared = route(logits, 4, whole=True, gate=gate)
    alone = route(logits, 4, whole=True)
    assert mx.array_equal(ids, alone[0])
    assert mx.array_equal(scores, alone[1])
    assert (shared.shape, shared.dtype) == (gate.shape, dtype)
    want = 1 / (1 + np.exp(-to_float64(gate)))
    for got in (shared, KERNEL.reference(logits, 4, True, gate)[2]):
        # Float16's smallest numbers are flushed to zero.
        assert np.all(np.abs(to_float64(got) - want) <= (EPS[dtype] + 2e-6) * want + 6.2e-5)


def test_what_is_no_number_chooses_experts_that_exist(kernels: str) -> None:
    logits = mx.array([[1.0, float("nan"), 3.0, -float("inf"), float("nan")] * 9] * 2)
    ids, scores = route(logits, 32, whole=False)
    assert ids.max().item() < 45
    assert all(len(set(row)) == 32 for row in ids.tolist())
    assert mx.all(mx.isnan(scores))
    masked = mx.where(mx.arange(45) == 7, 0.0, -mx.inf)[None]
    ids, scores = route(masked, 2, whole=False)
    assert (ids.tolist(), scores.tolist()) == ([[7, 0]], [[1.0, 0.0]])


def test_what_no_kernel_does_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="at least 5 experts"):
        route(mx.zeros((2, 4)), 5, whole=True)
    with pytest.raises(ValueError, match=r"gate: expected \(2, 1\), found \(2,\)"):
        route(mx.zeros((2, 4)), 3, whole=True, gate=mx.zeros(2))
    halves = mx.zeros((2, 1), mx.float16)
    assert "float16" in (KERNEL.refuse(mx.zeros((2, 4)), 3, True, halves) or "")
    assert KERNEL.refuse(mx.zeros((1, 1025)), 2, True, None)
    assert KERNEL.refuse(mx.zeros((1, 64)), 33, True, None)
    assert KERNEL.refuse(mx.zeros((0, 64)), 3, True, None) == "there are no rows"
    monkeypatch.setenv("MLXFUSE_KERNELS", "emulated")
    with msl.installed(build="fast"):
        ids, _ = route(mx.arange(1025.0), 2, whole=True)  # by the reference
    assert ids.tolist() == [1024, 1023]


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float32])
def test_the_factors_of_experts(dtype: mx.Dtype, kernels: str) -> None:
    rng = np.random.default_rng(0)
    logits = mx.array(rng.standard_normal((3, 60))).astype(dtype)
    factors = mx.array(rng.uniform(0.5, 2, 60)).astype(dtype)
    plain_ids, plain = route(logits, 5, whole=False)
    ids, scores = route(logits, 5, whole=False, factors=factors)
    assert mx.array_equal(ids, plain_ids)
    want, weights = exact(logits, 5, False)
    weights = weights * to_float64(factors)[want]
    assert np.all(np.abs(to_float64(scores) - weights) <= (EPS[dtype] + 2e-6) * weights)
    reference = KERNEL.reference(logits, 5, False, None, factors)[1]
    assert np.all(np.abs(to_float64(reference) - weights) <= (EPS[dtype] + 2e-6) * weights)
    assert not mx.allclose(scores, plain, rtol=1e-2)
    with pytest.raises(ValueError, match=r"factors: expected \(60,\), found \(59,\)"):
        route(logits, 5, whole=False, factors=factors[:59])
