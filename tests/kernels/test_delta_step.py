"""One token of a gated delta net, against float64 and against MLX-LM's own code."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.gated_delta import gated_delta_update, normalize_qk

from mlxfuse.fusion.dispatches import dispatches
from mlxfuse.kernels.delta_step import KERNEL, _Call, delta_step

from .steps import check_step, far
from .weights import to_float64

# Sequences, heads of keys and of values, their sizes, type, order of the heads.
CASES = [
    (1, 2, 4, 128, 128, mx.float16, False),
    (2, 2, 6, 32, 40, mx.float32, True),
    (1, 1, 1, 16, 3, mx.bfloat16, False),
    (3, 2, 2, 72, 16, mx.float32, False),
    (1, 2, 4, 256, 33, mx.bfloat16, True),
]


def call_of(
    batch: int, key_heads: int, heads: int, key_size: int, size: int, dtype: mx.Dtype, tiled: bool
) -> _Call:
    """Random arguments, of which the gates are both open and shut."""
    rng = np.random.default_rng([heads, key_size, size])

    def draw(*shape: int, scale: float = 1.0, dtype: mx.Dtype = dtype) -> mx.array:
        return mx.array(rng.normal(0, scale, shape), mx.float32).astype(dtype)

    return _Call(
        draw(batch, 1, 2 * key_heads * key_size + heads * size),
        draw(batch, 1, heads * size, scale=3),
        draw(batch, 1, heads, scale=4),
        draw(batch, 1, heads, scale=4),
        draw(heads, dtype=mx.float32),
        draw(heads, dtype=mx.float32 if tiled else dtype),
        draw(size),
        draw(batch, heads, size, key_size, dtype=mx.float32),
        1e-6,
        tiled,
    )


def run(call: _Call) -> tuple[mx.array, mx.array]:
    gates, parameters = (call.z, call.a, call.b), (call.a_log, call.dt_bias, call.weight)
    return delta_step(call.qkv, gates, parameters, call.state, eps=call.eps, tiled=call.tiled)


def exact(call: _Call) -> tuple[np.ndarray, np.ndarray]:
    """Head by head."""
    key_heads, heads, key_size, size = call.sizes
    arrays = {name: to_float64(a) for name, a in call.arrays.items()}
    states = arrays["state"].copy()
    result = np.zeros((len(states), 1, heads * size))
    for at, row in enumerate(arrays["qkv"][:, 0]):
        q, k, v = np.split(row, [key_heads * key_size, 2 * key_heads * key_size])
        for head in range(heads):
            key_head, turn = divmod(head, heads // key_heads)
            one, two = (x.reshape(key_heads, -1)[key_head] for x in (q, k))
            one, two = (x / np.sqrt((x * x).sum() + 1e-6) for x in (one, two))
            step = np.logaddexp(0, arrays["a"][at, 0, head] + arrays["dt_bias"][head])
            old = states[at, head] * np.exp(-np.exp(arrays["a_log"][head]) * step)
            delta = v.reshape(heads, -1)[head] - old @ two
            delta = delta / (1 + np.exp(-arrays["b"][at, 0, head]))
            states[at, head] = old + np.outer(delta, two)
            read = states[at, head] @ one / np.sqrt(key_size)
            read = read / np.sqrt((read * read).mean() + call.eps) * arrays["weight"]
            place = slice(size * (turn * key_heads + key_head), None) if call.tiled else None
            place = place or slice(size * head, None)
            z = arrays["z"][at, 0, place][:size]
            result[at, 0, place][:size] = read * z / (1 + np.exp(-z))
    return result, states


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_step(case: tuple, kernels: str) -> None:
    call = call_of(*case)
    got = check_step(KERNEL, call, run, exact)
    # Control: the order of the heads.
    if call.tiled:
        assert far(got[0], exact(replace(call, tiled=False))[0]) > 1e-1


def test_it_is_what_mlx_lm_computes() -> None:
    call = call_of(2, 2, 4, 32, 8, mx.float32, False)
    key_heads, heads, key_size, size = call.sizes
    keys = key_heads * key_size
    q, k, v = mx.split(call.qkv, [keys, 2 * keys], -1)
    q, k = (x.reshape(2, 1, key_heads, key_size) for x in (q, k))
    q, k = normalize_qk(q, k, inv_scale=key_size**-0.5, eps=1e-6)
    y, state = gated_delta_update(
        *(q, k, v.reshape(2, 1, heads, size), call.a, call.b),
        *(call.a_log, call.dt_bias, call.state),
    )
    y = mx.fast.rms_norm(y, call.weight, call.eps).reshape(call.z.shape)
    want = y * call.z * mx.sigmoid(call.z), state
    for got, one in zip(KERNEL.reference(call), want, strict=True):
        assert far(got, to_float64(one)) <= 1e-6


def test_one_dispatch_or_a_reason() -> None:
    call = call_of(1, 1, 2, 32, 8, mx.float16, False)
    mx.eval(call.arrays)
    assert dispatches(lambda: list(run(call))) == {"delta_step": 1}
    half = replace(call, state=call.state.astype(mx.float16))
    assert KERNEL.refuse(half) == "state is mlx.core.float16, where qkv is mlx.core.float16"
    wide = replace(call, z=call.z.astype(mx.float32))
    assert KERNEL.refuse(wide) == "z is mlx.core.float32, where qkv is mlx.core.float16"
    assert "heads of more than 256" in (
        KERNEL.refuse(call_of(1, 1, 1, 257, 3, mx.float32, False)) or ""
    )
    with pytest.raises(ValueError, match=r"a: expected \(1, 1, 2\), found \(1, 1, 1\)"):
        run(replace(call, a=call.a[..., :1]))
    with pytest.raises(ValueError, match=r"found 16 columns"):
        run(replace(call, qkv=call.qkv[..., :16]))
    with pytest.raises(ValueError, match=r"expected \[B, 1, N\] and"):
        run(replace(call, qkv=call.qkv[:, 0]))
