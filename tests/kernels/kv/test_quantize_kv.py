"""Packed rows: by the kernel as by the reference, bit for bit; what they stand for; and back."""

from __future__ import annotations

import itertools
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlxfuse.kernels.kv.dequantize_kv import dequantize_kv
from mlxfuse.kernels.kv.quantize_kv import quantize_kv
from mlxfuse.kernels.kv.scheme import KVScheme, KVSide, pack, unpack
from tests import msl

from ..pairwise import Case, covering
from ..weights import to_float64
from .problems import decode, normal, rotate

AXES: dict[str, tuple[Any, ...]] = {
    "k": (64, 80, 96, 112, 128, 192, 256, 512),
    "v": (64, 80, 96, 112, 128, 256, 512),
    "k_codes": ((8, "affine"), (8, "symmetric"), (4, "affine"), (4, "symmetric"), (16, "affine")),
    "v_codes": ((8, "affine"), (8, "symmetric"), (4, "affine"), (4, "symmetric"), (16, "affine")),
    "k_group": (32, 64, 128, 0),
    "v_group": (32, 64, 128, 0),
    "rotate": (False, True),
    "dtype": (mx.float16, mx.bfloat16, mx.float32),
}


def allowed(case: Case) -> bool:
    return all(
        not case.get(f"{n}_group") or case.get(n, 128) % case[f"{n}_group"] == 0 for n in "kv"
    )


PAIRS = covering(AXES, allowed, lambda case: case["k"] + case["v"])


def scheme_of(case: Case) -> KVScheme:
    k, v = (KVSide(case[n], case[f"{n}_codes"][0], case[f"{n}_group"], case[f"{n}_codes"][1],
                   case["rotate"]) for n in "kv")  # fmt: skip
    return KVScheme(k, v, case["dtype"])


def tokens(scheme: KVScheme, count: int = 9) -> tuple[mx.array, mx.array]:
    """With a group of zeros, a group of one value, and values far from 0."""
    rng = np.random.default_rng(0)
    k, v = (normal(rng, mx.float32, 2, 3, count, side.dim) for side in (scheme.k, scheme.v))
    k[0, 0, 0], v[0, 0, 1] = 0, 0.3
    k[0, 1] = 50 + 3 * k[0, 1]
    return k.astype(scheme.dtype), v.astype(scheme.dtype)


def check_values(x: mx.array, side: KVSide, block: int, got: np.ndarray, dtype: mx.Dtype) -> None:
    """``got`` is within half a step of x, and what rounding scale and bias may add."""
    want = rotate(to_float64(x), block)
    got = rotate(got, block)
    eps = {mx.float16: 2.0**-11, mx.bfloat16: 2.0**-8, mx.float32: 2.0**-24}[dtype]
    if not side.quantized:
        assert np.all(np.abs(got - want) <= eps * np.abs(want) + 2.0**-22 * np.abs(want).max())
        return
    groups = want.reshape(*want.shape[:-1], side.groups, side.group)
    largest = np.abs(groups).max(-1, keepdims=True)
    steps = 2**side.bits - 1
    span = groups.max(-1, keepdims=True) - groups.min(-1, keepdims=True)
    if side.kind == "symmetric":
        steps, span = 2 ** (side.bits - 1) - 1, largest
    # The last code may fall short by the rounding of the scale, all by that of the bias.
    bound = (0.5 / steps + eps) * span + 2 * eps * largest + 2.0**-20 * largest
    assert np.all(np.abs(got.reshape(groups.shape) - groups) <= bound)
    # Control: it would not hold for one bit less.
    assert np.any(np.abs(got.reshape(groups.shape) - groups) > (0.24 / steps) * span)


@pytest.mark.parametrize("case", PAIRS, ids=lambda c: "-".join(map(str, c.values())))
def test_rows_stand_for_their_tokens(case: Case) -> None:
    scheme = scheme_of(case)
    k, v = tokens(scheme)
    rows = pack(scheme, k, v)
    assert rows.shape == (2, 3, 9, scheme.row_words)
    exact = decode(scheme, rows)
    for x, side, block, values in (
        (k, scheme.k, scheme.k_block, exact[0]),
        (v, scheme.v, scheme.v_block, exact[1]),
    ):
        check_values(x, side, block, values, scheme.dtype)
    for got, values in zip(unpack(scheme, rows), exact, strict=True):
        assert np.all(np.abs(to_float64(got) - values) <= 2.0**-20 * np.abs(values).max())


@pytest.mark.parametrize("case", PAIRS[::5], ids=lambda c: "-".join(map(str, c.values())))
def test_kernels_give_what_the_references_give(case: Case, kernels: str) -> None:
    scheme = scheme_of(case)
    k, v = tokens(scheme)
    with msl.using(lint=False):
        rows = quantize_kv(k, v, scheme)
        assert mx.array_equal(rows, pack(scheme, k, v))
        for got, want in zip(dequantize_kv(rows, scheme), unpack(scheme, rows), strict=True):
            assert got.dtype == scheme.dtype
            error = mx.abs(got.astype(mx.float32) - want).max().item()
            bound = {mx.float16: 2.0**-10, mx.bfloat16: 2.0**-7, mx.float32: 2.0**-20}
            assert error <= bound[scheme.dtype] * mx.abs(want).max().item()


USUAL = KVScheme(KVSide(128, 8, 64, "affine", True), KVSide(128, 4, 64, "affine", True), mx.float16)


def test_rows_do_not_depend_on_what_else_is_appended(kernels: str) -> None:
    k, v = tokens(USUAL, 130)
    whole = quantize_kv(k, v, USUAL)
    for size in (1, 7, 64):
        parts = [
            quantize_kv(k[:, :, a : a + size], v[:, :, a : a + size], USUAL)
            for a in range(0, 21 if size == 1 else 130, size)
        ]
        joined = mx.concatenate(parts, axis=2)
        assert mx.array_equal(joined, whole[:, :, : joined.shape[2]])
    # The size of a token: codes, and a scale and a bias of 2 bytes for each group.
    assert USUAL.row_bytes == 128 + 64 + 2 * 4 + 2 * 4
    assert whole.nbytes == whole.size // USUAL.row_words * USUAL.row_bytes


@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("dim", [80, 128])
def test_sizes(dim: int, bits: int) -> None:
    for dtype, group in itertools.product(
        (mx.float16, mx.float32), (0, 32) if dim == 128 else (0,)
    ):
        side = KVSide(dim, bits, group)
        groups = dim // group if group else 1
        values = dim * (dtype.size if bits == 16 else bits / 8)
        scales = 0 if bits == 16 else 2 * groups * dtype.size
        assert KVScheme(side, side, dtype).row_bytes == 2 * (values + scales)


def test_the_reference_of_a_small_case_by_hand() -> None:
    side = KVSide(32, 4, 32)
    scheme = KVScheme(side, KVSide(32, 8, 32, "symmetric"), mx.float32)
    k = mx.arange(32, dtype=mx.float32).reshape(1, 1, 1, 32) / 2 - 3  # -3 to 12.5
    v = mx.where(mx.arange(32) == 5, -2.54, 0.02).reshape(1, 1, 1, 32)
    row = np.array(quantize_kv(k, v, scheme)).reshape(-1)
    step = 15.5 / 15
    codes = [int(np.rint(i / 2 / step)) for i in range(32)]
    assert [int(row[i // 8]) >> (4 * (i % 8)) & 15 for i in range(32)] == codes
    values = row[4:12].view(np.uint8)
    assert values[5] == 1
    assert set(values[[0, 31]]) == {129}
    np.testing.assert_allclose(row[12:].view(np.float32), [step, -3, 2.54 / 127], rtol=1e-6)


def test_what_does_not_fit_is_refused() -> None:
    k, v = tokens(USUAL)
    with pytest.raises(ValueError, match=r"expected keys \[B, Hkv, L, 128\] and values"):
        quantize_kv(k, v[..., :64], USUAL)
    with pytest.raises(ValueError, match="floating point of one type"):
        quantize_kv(k, v.astype(mx.float32), USUAL)
    points = KVScheme(KVSide(128, 8, 64, "zero_point"), USUAL.v, mx.float16)
    with pytest.raises(ValueError, match="nothing is quantised with zero points"):
        quantize_kv(k, v, points)
    with pytest.raises(ValueError, match=r"rows: expected uint32 \[B, Hkv, L, 52\]"):
        dequantize_kv(pack(USUAL, k, v)[..., 1:], USUAL)
    with pytest.raises(ValueError, match="dtype: expected float16"):
        dequantize_kv(pack(USUAL, k, v), USUAL, mx.int32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dim": 80}, "group of 64 does not divide a head of 80 .* nearest valid group is 80"),
        ({"dim": 96}, "group of 64 does not divide a head of 96 .* nearest valid group is 32"),
        ({"dim": 96, "group": 48}, "nearest valid group is 32"),
        ({"dim": 112, "group": 32}, "nearest valid group is 112"),
        ({"dim": 100}, "multiple of 8 elements is expected, found 100"),
        ({"bits": 7}, r"expected \(2, 3, 4, 5, 6, 8, 16\), found 7"),
        ({"kind": "lloyd"}, "found 'lloyd'"),
    ],
)
def test_a_side_that_cannot_be_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KVSide(**{"dim": 128, **changes})
    with pytest.raises(ValueError, match=r"not mlx\.core\.int8"):
        KVScheme(KVSide(64), KVSide(64), mx.int8)


def test_blocks_of_rotation() -> None:
    def blocks(dim: int) -> tuple[int, int]:
        side = KVSide(dim, 8, 0, "affine", True)
        scheme = KVScheme(side, side, mx.float16)
        return scheme.k_block, scheme.v_block

    assert [blocks(d) for d in (64, 80, 96, 112, 128, 192, 256, 512)] == [
        (64, 64), (16, 16), (32, 32), (16, 16), (128, 64), (64, 64), (256, 64), (512, 64),
    ]  # fmt: skip
