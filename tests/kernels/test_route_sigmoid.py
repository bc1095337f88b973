"""Experts that are chosen by sigmoids with a bias, against float64 and MLX-LM's own code."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.glm4_moe import group_expert_select

from mlxfuse.kernels.route_sigmoid import KERNEL, SigmoidOptions, route_sigmoid
from mlxfuse.kernels.runtime import kernel as _kernel

from .weights import to_float64

CASES = [
    ((1, 1, 128), mx.float16, mx.float32, SigmoidOptions(8, scale=2.5)),
    ((3, 64), mx.bfloat16, mx.bfloat16, SigmoidOptions(4, 8, 3, eps=1e-20)),
    ((5, 48), mx.float32, mx.float32, SigmoidOptions(6, 3, 2, whole=True, scale=0.5)),
    ((2, 256), mx.float32, mx.float16, SigmoidOptions(8, 8, 4)),
    ((2, 5), mx.float32, mx.float32, SigmoidOptions(1, whole=True)),
]


def given(shape: tuple[int, ...], dtype: mx.Dtype, kind: mx.Dtype) -> tuple[mx.array, mx.array]:
    """Random logits and biases, some of them below what the sigmoids can make up for."""
    rng = np.random.default_rng(shape[-1])
    logits = mx.array(rng.permuted(np.linspace(-4, 4, int(np.prod(shape)))).reshape(shape))
    return logits.astype(dtype), mx.array(rng.normal(-0.4, 0.4, shape[-1])).astype(kind)


def exact(logits: mx.array, bias: mx.array, how: SigmoidOptions) -> tuple[np.ndarray, np.ndarray]:
    weights = 1 / (1 + np.exp(-to_float64(logits)))
    values = (weights + to_float64(bias)).reshape(-1, how.groups, weights.shape[-1] // how.groups)
    if how.kept < how.groups:
        best = np.sort(values, -1)[..., -2:].sum(-1)
        dropped = np.argsort(best, -1, kind="stable")[:, : how.groups - how.kept]
        np.put_along_axis(values, dropped[..., None], 0, -2)
    ids = np.argsort(-values.reshape(weights.shape), -1, kind="stable")[..., : how.count]
    chosen = np.take_along_axis(weights, ids, -1)
    if not how.whole:
        chosen = chosen / (chosen.sum(-1, keepdims=True) + how.eps)
    return ids, chosen * how.scale


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_experts_and_their_weights(case: tuple, kernels: str) -> None:
    shape, dtype, kind, how = case
    logits, bias = given(shape, dtype, kind)
    before = _kernel.launches["route"]
    got = route_sigmoid(logits, bias, how)
    assert _kernel.launches["route"] - before == 1
    assert [a.dtype for a in got] == [mx.uint32, mx.float32]
    ids, weights = exact(logits, bias, how)
    for found in (got, KERNEL.reference(logits, bias, how)):
        np.testing.assert_array_equal(np.array(found[0]), ids)
        np.testing.assert_allclose(np.array(found[1]), weights, rtol=2e-6)
    # Controls: what the bias and the groups are for.
    assert not np.array_equal(exact(logits, 0 * bias, how)[0], ids)
    if how.groups > 1:
        assert not np.array_equal(exact(logits, bias, replace(how, kept=how.groups))[0], ids)


def test_it_is_what_mlx_lm_chooses() -> None:
    logits, bias = given((7, 48), mx.float32, mx.float32)
    how = SigmoidOptions(6, 6, 2, scale=2.5)
    ids, scores = KERNEL.reference(logits, bias, how)
    theirs = group_expert_select(logits, bias, 6, 6, 2, 2.5, True)
    order = [np.argsort(np.array(a), -1) for a in (ids, theirs[0])]
    for a, b in zip((ids, scores), theirs, strict=True):
        left, right = (
            np.take_along_axis(np.array(x), o, -1) for x, o in zip((a, b), order, strict=True)
        )
        np.testing.assert_allclose(left, right, rtol=1e-6)


def test_equal_values_and_what_is_no_number(kernels: str) -> None:
    logits, bias = mx.zeros((2, 12)), mx.zeros(12)
    ids, scores = route_sigmoid(logits, bias, SigmoidOptions(3, 4, 2))
    # The first two groups of three are dropped, and zeros go after what is left.
    assert ids.tolist() == [[6, 7, 8]] * 2
    np.testing.assert_allclose(np.array(scores), 1 / 3, rtol=1e-6)
    logits[0, 5] = float("nan")
    ids, _ = route_sigmoid(logits, bias, SigmoidOptions(3))
    assert ids[1].tolist() == [0, 1, 2]
    assert ids.max().item() < 12
    assert len(set(ids[0].tolist())) == 3


def test_what_no_kernel_does_is_refused() -> None:
    bias = mx.zeros(8)
    with pytest.raises(ValueError, match="at least 9 experts"):
        route_sigmoid(mx.zeros((2, 8)), bias, SigmoidOptions(9))
    with pytest.raises(ValueError, match="2 of 3 groups of 8 experts"):
        route_sigmoid(mx.zeros((2, 8)), bias, SigmoidOptions(2, 3, 2))
    refuse = KERNEL.refuse
    assert refuse(mx.zeros((0, 8)), bias, SigmoidOptions(2)) == "there are no rows"
    assert refuse(mx.zeros((1, 8)), bias, SigmoidOptions(2, 8, 2)) == "groups of one expert"
    assert "33 of" not in (refuse(mx.zeros((1, 64)), mx.zeros(64), SigmoidOptions(33)) or "33 of")
