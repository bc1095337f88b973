"""Attention over keys and values in oneDNN's forms, against float64 over (code - zero) * scale."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlxfuse.kernels import KVCodes, pack_codes
from mlxfuse.kernels.runtime import kernel as _kernel
from tests import msl

from ..weights import to_float64
from .problems import THRESHOLD, normal

B, HEADS, KV, S, D = 2, 4, 2, 37, 64
# Shape of the scales, by what they belong to.
SHAPES = {
    "tensor": (1, 1, 1, 1),
    "batch": (B, 1, 1, 1),
    "head": (1, KV, 1, 1),
    "batch and head": (B, KV, 1, 1),
    "token": (B, KV, S, 1),
    "token of all heads": (B, 1, S, 1),
    "group": (B, KV, S, D // 32),
    "group of all tokens": (1, KV, 1, D // 32),
    "channel": (1, KV, 1, D),
}


def codes_of(
    shape: str, signed: bool, points: bool, bits: int, dtype: mx.Dtype, seed: int
) -> tuple[KVCodes, np.ndarray]:
    """Random codes, and what they stand for."""
    rng = np.random.default_rng(seed)
    least, end = (-(2 ** (bits - 1)), 2 ** (bits - 1)) if signed else (0, 2**bits)
    codes = rng.integers(least, end, (B, KV, S, D)).astype(np.int8 if signed else np.uint8)
    scales = mx.array(rng.uniform(0.5, 2, SHAPES[shape]) / 2 ** (bits - 1)).astype(dtype)
    zero = rng.integers(least, end, scales.shape) if points else np.zeros(scales.shape)

    def whole(a: np.ndarray) -> np.ndarray:
        return np.repeat(a, D // a.shape[-1], axis=-1)

    values = (codes - whole(zero.astype(np.float64))) * whole(to_float64(scales))
    return KVCodes(
        mx.array(codes), scales, mx.array(zero.astype(np.int32)) if points else None, bits
    ), values


def check(q: mx.array, k: Any, v: Any, keys: np.ndarray, values: np.ndarray) -> None:
    before = _kernel.launches["compressed_sdpa"]
    got = pack_codes(k, v).attend(q, scale=D**-0.5)
    assert _kernel.launches["compressed_sdpa"] - before == 1
    assert got.dtype == q.dtype
    keys, values = (np.repeat(x, HEADS // KV, axis=1) for x in (keys, values))
    s = to_float64(q) @ keys.swapaxes(-1, -2) * D**-0.5
    p = np.exp(s - s.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    bound = THRESHOLD[q.dtype] * (p @ np.abs(values))
    assert np.all(np.abs(to_float64(got) - p @ values) <= bound)


@pytest.mark.parametrize("k_shape", SHAPES)
def test_forms_of_onednn(k_shape: str, kernels: str) -> None:
    i = list(SHAPES).index(k_shape)
    v_shape = list(SHAPES)[-1 - i]
    # Few programs: the form decides between two kinds of K and of V, and between three groups.
    dtype = (mx.float16, mx.float32)[i % 2]
    q = normal(np.random.default_rng(9), dtype, B, HEADS, 1, D)
    for signed, points in ((True, False), (False, True), (True, True)):
        k_bits = 4 if k_shape == "channel" and points else 8
        k, keys = codes_of(k_shape, signed, points, k_bits, dtype, 1)
        v, values = codes_of(v_shape, signed, points, 4, dtype, 2)
        with msl.using(lint=False):
            check(q, k, v, keys, values)


def test_plain_keys_beside_codes(kernels: str) -> None:
    rng = np.random.default_rng(3)
    q, k = normal(rng, mx.bfloat16, B, HEADS, 1, D), normal(rng, mx.bfloat16, B, KV, S, D)
    v, values = codes_of("token", False, True, 8, mx.bfloat16, 4)
    check(q, k, v, to_float64(k), values)
    # Control: one zero point is wrong.
    values[0, 0] += 1
    with pytest.raises(AssertionError):
        check(q, k, v, to_float64(k), values)


def test_what_has_no_exact_form_is_refused() -> None:
    codes, scales = mx.zeros((B, KV, S, D), mx.int8), mx.ones((1, KV, 1, D))
    with pytest.raises(ValueError, match="nearest valid group is 32 elements"):
        KVCodes(codes, mx.ones((B, KV, S, D)))
    with pytest.raises(ValueError, match=r"zero points of channels .* nearest valid form"):
        KVCodes(codes, scales, mx.zeros((1, KV, 1, D), mx.int32))
    with pytest.raises(ValueError, match=r"scales .* do not broadcast"):
        KVCodes(codes, mx.ones((3, 1, 1, 1)))
    with pytest.raises(ValueError, match="of other shape than scales"):
        KVCodes(codes, mx.ones((1, 1, 1, 1)), mx.zeros((1, 1, S, 1), mx.int32))
    with pytest.raises(ValueError, match=r"expected int8 or uint8"):
        KVCodes(codes.astype(mx.int32), scales)
    with pytest.raises(ValueError, match="3 scales for heads of 64"):
        KVCodes(codes, mx.ones((1, 1, 1, 3)))
    with pytest.raises(ValueError, match=r"group of 16 .* nearest valid group is 32"):
        pack_codes(KVCodes(codes, mx.ones((B, KV, S, 4))), mx.zeros((B, KV, S, D)))


def test_packed_once_and_attended_to_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """By several queries of any number, with the options of attention; without a kernel here."""
    monkeypatch.setenv("MLXFUSE_KERNELS", "reference")
    k, keys = codes_of("token", True, False, 8, mx.float32, 1)
    v, values = codes_of("group", False, True, 4, mx.float32, 2)
    packed = pack_codes(k, v)
    assert (packed.length, packed.rows.shape[2]) == (S, 40)
    rng = np.random.default_rng(5)
    for queries in (1, 3, 12):
        q = normal(rng, mx.float32, B, HEADS, queries, D)
        mask = mx.array(rng.random((queries, S)) < 0.5)
        got = packed.attend(q, scale=0.1, mask=mask, causal=False)
        own = [np.repeat(x, HEADS // KV, axis=1) for x in (keys, values)]
        s = np.where(np.array(mask), to_float64(q) @ own[0].swapaxes(-1, -2) * 0.1, -np.inf)
        p = np.exp(s - s.max(-1, keepdims=True))
        want = p / p.sum(-1, keepdims=True) @ own[1]
        np.testing.assert_allclose(to_float64(got), want, rtol=0, atol=1e-4)
