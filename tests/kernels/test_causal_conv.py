"""The convolution along tokens and its state, against float64."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlxfuse.fusion.dispatches import dispatches
from mlxfuse.kernels.causal_conv import KERNEL, _Call, causal_conv
from mlxfuse.kernels.runtime import kernel as _kernel

from .matmul_cases import EPS
from .weights import to_float64

# Sequences, tokens, channels, taps, type, what is given besides.
CASES = [
    (1, 1, 300, 4, mx.float16, ()),
    (1, 1, 9, 3, mx.bfloat16, ("bias",)),
    (2, 7, 33, 4, mx.float32, ("bias", "mask", "lengths")),
    (3, 2, 5, 4, mx.bfloat16, ("mask",)),
    (2, 40, 20, 2, mx.float32, ("lengths",)),
    (1, 3, 8, 8, mx.float16, ("bias", "lengths")),
]


def call_of(
    batch: int, length: int, channels: int, taps: int, dtype: mx.Dtype, given: tuple[str, ...]
) -> _Call:
    """Random arguments; a mask keeps two thirds of the tokens, some lengths are out of range."""
    rng = np.random.default_rng([batch, length, channels])

    def draw(*shape: int) -> mx.array:
        return mx.array(rng.standard_normal(shape), mx.float32).astype(dtype)

    more = {
        "bias": draw(channels),
        "mask": mx.array(rng.random((batch, length)) < 2 / 3),
        "lengths": mx.array(rng.integers(-1, length + 3, batch)),
    }
    more |= dict.fromkeys(set(more) - set(given))
    x, state = draw(batch, length, channels), draw(batch, taps - 1, channels)
    return _Call(x, state, draw(channels, taps), **more)


def run(call: _Call) -> tuple[mx.array, mx.array]:
    return causal_conv(*(getattr(call, n) for n in ("x", "state", "weight", "bias")),
                       mask=call.mask, lengths=call.lengths)  # fmt: skip


def exact(call: _Call, *, turned: bool = False) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The results, and the sums of what is added up as positive numbers.

    Args:
        turned: a wrong filter, from its other end.
    """
    x, state, weight = (to_float64(a) for a in (call.x, call.state, call.weight))
    if call.mask is not None:
        x = x * np.array(call.mask)[..., None]
    rows, kept, length = np.concatenate([state, x], 1), call.taps - 1, x.shape[1]
    filters = weight[:, ::-1] if turned else weight
    parts = [rows[:, k : k + length] * filters[:, k] for k in range(call.taps)]
    parts += [] if call.bias is None else [np.broadcast_to(to_float64(call.bias), x.shape)]
    total, size = sum(parts), sum(np.abs(p) for p in parts)
    ends = np.full(len(x), length)
    if call.lengths is not None:
        ends = np.clip(np.array(call.lengths), 0, length)
    after = np.stack([row[end : end + kept] for row, end in zip(rows, ends, strict=True)])
    return total / (1 + np.exp(-total)), after, size


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_convolution_and_its_state(case: tuple, kernels: str) -> None:
    call = call_of(*case)
    before = _kernel.launches["causal_conv"]
    y, after = run(call)
    assert _kernel.launches["causal_conv"] - before == 1
    want, state, size = exact(call)
    assert np.array_equal(to_float64(after), state)
    eps = EPS[call.x.dtype]
    # What is below the normal numbers of float16 is rounded to its smallest.
    bound = eps * np.abs(want) + 4e-7 * size + 6e-8
    assert np.all(np.abs(to_float64(y) - want) <= bound)
    assert (y.dtype, after.dtype) == (call.x.dtype, call.x.dtype)
    plain, same = KERNEL.reference(call)
    assert mx.array_equal(same, after)
    assert np.all(np.abs(to_float64(plain) - want) <= 4 * eps * size + 6e-8)
    # Control: the bound tells a wrong filter.
    assert not np.all(np.abs(exact(call, turned=True)[0] - want) <= bound)


def test_two_halves_are_the_whole(kernels: str) -> None:
    call = call_of(2, 9, 16, 4, mx.float32, ())
    whole, after = run(call)
    state, parts = call.state, []
    for at in (slice(0, 1), slice(1, 9)):
        y, state = causal_conv(call.x[:, at], state, call.weight[..., None])
        parts.append(y)
    assert mx.array_equal(mx.concatenate(parts, 1), whole)
    assert mx.array_equal(state, after)


def test_one_dispatch_or_a_reason() -> None:
    call = call_of(1, 2, 8, 4, mx.float32, ())
    assert dispatches(lambda: list(run(call))) == {"causal_conv": 1}
    halves = call_of(1, 2, 8, 4, mx.float16, ())
    mixed = _Call(call.x, halves.state, call.weight, None, None, None)
    assert KERNEL.refuse(mixed) == "x is mlx.core.float32, its state mlx.core.float16"
    assert KERNEL.refuse(call_of(1, 1, 4, 9, mx.float32, ())) == "filters of more than 8 values"
    assert KERNEL.refuse(call_of(1, 0, 4, 2, mx.float32, ())) == "x has no tokens"
    with pytest.raises(ValueError, match=r"state: expected \(1, 3, 8\), found \(1, 2, 8\)"):
        causal_conv(call.x, call.state[:, 1:], call.weight)
    with pytest.raises(ValueError, match=r"expected \[B, L, C\] and \[C, K\] with K > 1"):
        causal_conv(call.x[0], call.state, call.weight)
