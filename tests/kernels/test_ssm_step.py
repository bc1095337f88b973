"""One token of Mamba-2's recurrence, against float64 and against MLX-LM's own code."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.ssm import ssm_update

from mlxfuse.fusion.dispatches import dispatches
from mlxfuse.kernels.ssm_step import KERNEL, _Call, ssm_step

from .steps import check_step, far
from .weights import to_float64

# Sequences, heads, groups of them, sizes of a head and of a row of its state, type.
CASES = [
    (1, 4, 2, 64, 128, mx.float16),
    (2, 6, 1, 40, 32, mx.float32),
    (1, 1, 1, 3, 16, mx.bfloat16),
    (3, 2, 2, 9, 72, mx.float32),
    (1, 2, 1, 5, 256, mx.bfloat16),
]


def call_of(batch: int, heads: int, groups: int, size: int, columns: int, dtype: mx.Dtype) -> _Call:
    """Random arguments; some steps lie outside of their limits."""
    rng = np.random.default_rng([heads, size, columns])

    def draw(*shape: int, scale: float = 1.0, dtype: mx.Dtype = dtype) -> mx.array:
        return mx.array(rng.normal(0, scale, shape), mx.float32).astype(dtype)

    return _Call(
        draw(batch, 1, heads * size + 2 * groups * columns),
        draw(batch, 1, heads, scale=4),
        draw(heads, dtype=mx.float32),
        draw(heads),
        draw(heads, dtype=mx.float32 if groups > 1 else dtype),
        draw(batch, heads, size, columns, dtype=mx.float32),
        (0.01, 3.0),
    )


def run(call: _Call) -> tuple[mx.array, mx.array]:
    parameters = call.a_log, call.dt_bias, call.skip
    return ssm_step(call.xbc, call.dt, parameters, call.state, call.limits)


def exact(call: _Call) -> tuple[np.ndarray, np.ndarray]:
    """Head by head."""
    heads, groups, columns, size = call.sizes
    arrays = {name: to_float64(a) for name, a in call.arrays.items()}
    states = arrays["state"].copy()
    result = np.zeros((len(states), 1, heads * size))
    for at, row in enumerate(arrays["xbc"][:, 0]):
        x, b, c = np.split(row, [heads * size, heads * size + groups * columns])
        for head in range(heads):
            mine, group = x.reshape(heads, size)[head], head // (heads // groups)
            step = np.logaddexp(0, arrays["dt"][at, 0, head] + arrays["dt_bias"][head])
            step = np.clip(step, *call.limits)
            states[at, head] *= np.exp(-np.exp(arrays["a_log"][head]) * step)
            states[at, head] += np.outer(step * mine, b.reshape(groups, -1)[group])
            read = states[at, head] @ c.reshape(groups, -1)[group]
            result[at, 0, head * size :][:size] = read + mine * arrays["skip"][head]
    return result, states


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_step(case: tuple, kernels: str) -> None:
    call = call_of(*case)
    got = check_step(KERNEL, call, run, exact)
    # Control: the limits of the step.
    assert far(got[1], exact(replace(call, limits=(0.5, 0.6)))[1]) > 1e-3


def test_it_is_what_mlx_lm_computes() -> None:
    call = call_of(2, 4, 2, 8, 32, mx.float32)
    heads, groups, columns, size = call.sizes
    x, b, c = mx.split(call.xbc, [heads * size, heads * size + groups * columns], -1)
    y, state = ssm_update(
        x.reshape(2, 1, heads, size),
        call.a_log,
        *(v.reshape(2, 1, groups, columns) for v in (b, c)),
        *(call.skip, call.dt, call.dt_bias, call.state, call.limits),
    )
    for got, want in zip(KERNEL.reference(call), (y.flatten(2), state), strict=True):
        assert far(got, to_float64(want)) <= 1e-6


def test_one_dispatch_or_a_reason() -> None:
    call = call_of(1, 2, 1, 8, 32, mx.float16)
    mx.eval(call.arrays)
    assert dispatches(lambda: list(run(call))) == {"ssm_step": 1}
    half = replace(call, state=call.state.astype(mx.float16))
    assert KERNEL.refuse(half) == "state is mlx.core.float16, where xbc is mlx.core.float16"
    wide = replace(call, dt=call.dt.astype(mx.float32))
    assert KERNEL.refuse(wide) == "dt is mlx.core.float32, where xbc is mlx.core.float16"
    assert "rows of more than 256" in (KERNEL.refuse(call_of(1, 1, 1, 3, 257, mx.float32)) or "")
    with pytest.raises(ValueError, match=r"dt: expected \(1, 1, 2\), found \(1, 1, 1\)"):
        run(replace(call, dt=call.dt[..., :1]))
    with pytest.raises(ValueError, match=r"found 16 columns"):
        run(replace(call, xbc=call.xbc[..., :16]))
    with pytest.raises(ValueError, match=r"expected \[B, 1, N\] and"):
        run(replace(call, xbc=call.xbc[:, 0]))
