"""Attention over compressed keys and values against float64 over the dequantised ones."""

from __future__ import annotations

import itertools
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlxfuse.kernels import _kernel
from mlxfuse.kernels import compressed_sdpa as module
from mlxfuse.kernels.compressed_sdpa import compressed_sdpa
from mlxfuse.kernels.kv_scheme import KVScheme, KVSide
from tests import msl

from .kv import THRESHOLD, Problem, normal, oracle, packed
from .pairwise import Case, pairs_of, pairwise
from .weights import to_float64

AXES: dict[str, tuple[Any, ...]] = {
    "dims": ((64, 64), (80, 80), (96, 64), (112, 112), (128, 128), (192, 128), (256, 256),
             (512, 512)),
    "heads": (1, 2, 4, 7, 8, 16),  # that share a KV head
    "queries": (1, 2, 5, 8),
    "length": (1, 5, 385, 513, 1025, 2049),
    "dtype": (mx.float16, mx.bfloat16, mx.float32),
    "k": ((8, "affine"), (8, "symmetric"), (4, "affine"), (4, "symmetric"), (16, "affine")),
    "v": ((8, "affine"), (8, "symmetric"), (4, "affine"), (4, "symmetric"), (16, "affine")),
    "group": (32, 64, 128, 0),
    "rotate": (False, True),
    "mask": ("none", "bool", "bool keys", "additive", "additive head"),
    "causal": (True, False),
    "window": (None, 3, 300),
    "more": ("none", "sinks", "softcap", "padding"),
    "plain": ("none", "tail", "sink", "fresh"),
}  # fmt: skip


def valid(case: Case) -> bool:
    """No more multiplications than the emulation does in a second."""
    dk, dv = case["dims"]
    fits = case["group"] == 0 or (dk % case["group"] == 0 and dv % case["group"] == 0)
    return fits and case["heads"] * case["queries"] * (dk + dv) * case["length"] <= 12_000_000


PAIRS = pairwise(AXES, valid)


def problem_of(case: Case, seed: int = 0) -> Problem:
    rng = np.random.default_rng(seed)
    (dk, dv), dtype, queries, length = (case[n] for n in ("dims", "dtype", "queries", "length"))
    group, turned = case["group"], case["rotate"]
    k, v = (
        KVSide(dim, bits, group, kind, turned)
        for dim, (bits, kind) in ((dk, case["k"]), (dv, case["v"]))
    )
    scheme = KVScheme(k, v, dtype)
    batch = 2 if case["length"] < 600 or case["more"] == "padding" else 1
    capacity = -(-length // 4) * 4 + 4
    rows = packed(scheme, rng, batch, 1, capacity)
    options: Case = {"scale": dk**-0.5, "causal": case["causal"], "window": case["window"]}
    heads = case["heads"]
    tail, tails = None, mx.array(0)
    if case["plain"] != "none":
        tails = mx.array([11, 13][:batch])
        tail = normal(rng, dtype, batch, 1, 16, dk + dv)
    if case["plain"] == "sink":
        options |= {"sink": normal(rng, dtype, batch, 1, 4, dk + dv), "sink_length": 4}
    if case["plain"] == "fresh":
        fresh = normal(rng, dtype, batch, 1, queries, dk), normal(rng, dtype, batch, 1, queries, dv)
        options["fresh"] = fresh
    keys = capacity + 4 + 16 + 8
    if case["mask"] == "bool":
        mask = rng.random((batch, 1, queries, keys)) < 0.7
        mask[0, 0, 0] = False
        options["mask"] = mx.array(mask)
    elif case["mask"] == "bool keys":
        options["mask"] = mx.array(rng.random(keys) < 0.7)
    elif case["mask"] == "additive":
        options["mask"] = normal(rng, dtype, 1, 1, queries, keys)
    elif case["mask"] == "additive head":
        mask = normal(rng, mx.float32, batch, heads, 1, keys)
        options["mask"] = mx.where(mask > 1, -mx.inf, mask)
    if case["more"] == "sinks":
        options["sinks"] = normal(rng, mx.float32, heads)
    elif case["more"] == "softcap":
        options["softcap"] = 1.5
    elif case["more"] == "padding":
        options["left_padding"] = mx.array([min(length - 1, 7), 0][:batch])
    q = normal(rng, dtype, batch, heads, queries, dk)
    used = mx.array([length, max(1, length - 3)]) if batch == 2 else mx.array(length)
    return Problem(q, scheme, rows, used, tail, tails, options)


def assert_close(got: mx.array, problem: Problem) -> None:
    want, size = oracle(problem)
    assert got.dtype == problem.q.dtype
    assert got.shape == want.shape
    error = np.abs(to_float64(got) - want)
    assert np.all(error <= THRESHOLD[got.dtype] * size + 1e-30), np.max(error / (size + 1e-30))


def name_of(case: Case) -> str:
    return "-".join(str(v).replace("mlx.core.", "") for v in case.values())


def check(case: Case) -> None:
    problem = problem_of(case)
    before = _kernel.launches["compressed_sdpa"]
    got = compressed_sdpa(*problem.arguments, **problem.options)
    assert _kernel.launches["compressed_sdpa"] - before == 1
    assert_close(got[0], problem)
    if case["plain"] == "fresh":
        assert mx.array_equal(got[1], mx.concatenate(problem.options["fresh"], axis=-1))


@pytest.mark.parametrize("case", PAIRS, ids=name_of)
def test_every_pair_of_values(case: Case, kernels: str) -> None:
    # The lint follows paths, which are the same in all cases; other tests have it.
    with msl.using(lint=False):
        check(case)
