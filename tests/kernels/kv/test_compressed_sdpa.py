"""Attention over compressed keys and values against float64 over the dequantised ones."""

from __future__ import annotations

import functools
import itertools
import os
import random
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlxfuse.fusion.dispatches import dispatches
from mlxfuse.kernels.kv import compressed_sdpa as module
from mlxfuse.kernels.kv.compressed_sdpa import compressed_sdpa
from mlxfuse.kernels.kv.scheme import KVScheme, KVSide
from mlxfuse.kernels.runtime import kernel as _kernel
from mlxfuse.kernels.runtime.self_test import calls
from mlxfuse.kernels.runtime.source import _squeeze
from tests import msl

from ..builds import in_turn
from ..pairwise import Case, covering, pairs, possible
from ..weights import to_float64
from .problems import Problem, normal, oracle, packed, with_scores

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


def divides(case: Case) -> bool:
    return not case.get("group") or all(dim % case["group"] == 0 for dim in case["dims"])


def work(case: Case) -> int:
    """Multiplications for a KV head; the emulation does some 10 million in a second."""
    return case["heads"] * case["queries"] * sum(case["dims"]) * case["length"]


def allowed(case: Case) -> bool:
    """Whether some values can go together: a group that divides, in half a second."""
    dims = (128, 128) if case.get("group") == 128 else (64, 64)
    whole = {"heads": 1, "queries": 1, "length": 1, "dims": dims} | case
    return divides(whole) and work(whole) <= 4_500_000


PAIRS = covering(AXES, allowed, work)


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
    held = batch, 3 - batch
    capacity = -(-length // 4) * 4 + 4
    rows = packed(scheme, rng, *held, capacity)
    options: Case = {"scale": dk**-0.5, "causal": case["causal"], "window": case["window"]}
    heads = case["heads"] * held[1]
    tail, tails = None, mx.array(0)
    if case["plain"] != "none":
        tails = mx.array([11, 13][:batch])
        tail = normal(rng, dtype, *held, 16, dk + dv)
    if case["plain"] == "sink":
        options |= {"sink": normal(rng, dtype, *held, 4, dk + dv), "sink_length": 4}
    if case["plain"] == "fresh":
        fresh = normal(rng, dtype, *held, queries, dk), normal(rng, dtype, *held, queries, dv)
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
    want, bound = oracle(problem)
    assert got.dtype == problem.q.dtype
    assert got.shape == want.shape
    error = np.abs(to_float64(got) - want)
    assert np.all(error <= bound), np.max(error / np.maximum(bound, 1e-30))


def name_of(case: Case) -> str:
    return "-".join(str(v).replace("mlx.core.", "") for v in case.values())


def check(case: Case) -> None:
    problem = problem_of(case)
    before = _kernel.launches["compressed_sdpa"]
    got = compressed_sdpa(*problem.arguments, **problem.given)
    assert _kernel.launches["compressed_sdpa"] - before == 1
    assert_close(got[0], problem)
    if case["plain"] == "fresh":
        assert mx.array_equal(got[1], mx.concatenate(problem.options["fresh"], axis=-1))


@pytest.mark.parametrize(("case", "kernels"), in_turn(PAIRS, name_of), indirect=["kernels"])
def test_every_pair_of_values(case: Case, kernels: str) -> None:
    # The lint follows paths, which are the same in all cases; other tests have it.
    with msl.using(lint=False):
        check(case)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", AXES["dtype"], ids=str)
@pytest.mark.parametrize("dims", AXES["dims"], ids=str)
def test_the_full_product(dims: tuple[int, int], dtype: mx.Dtype, kernels: str) -> None:
    """Schemes, masks, lengths and groups of heads; the other values in turn: 108,000 cases.

    ``KV_SAMPLE=12:3 pytest -m slow -k full_product`` takes 12 of the 750 programs of each head
    size and type, drawn with the seed 3, at all lengths: 1,728 cases in each build.
    """
    product = ("heads", "k", "v", "mask")
    others = [n for n in AXES if n not in (*product, "dims", "dtype", "length")]
    programs = list(enumerate(itertools.product(*(AXES[n] for n in product))))
    if sample := os.environ.get("KV_SAMPLE"):
        count, _, seed = sample.partition(":")
        programs = random.Random(f"{seed} {dims} {dtype}").sample(programs, int(count))
    for i, values in programs:
        case: Case = {"dims": dims, "dtype": dtype, **dict(zip(product, values, strict=True))}
        case |= {n: AXES[n][(i + i // 7**j) % len(AXES[n])] for j, n in enumerate(others)}
        case["group"] *= divides(case)
        for length in AXES["length"]:  # one program for all
            case |= {"length": length}
            if work(case) > 40_000_000:
                case["queries"] = 1
            with msl.using(lint=False):
                check(case)


@pytest.mark.parametrize("case", PAIRS[::4], ids=name_of)
def test_the_reference(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLXFUSE_KERNELS", "reference")
    problem = problem_of(case)
    assert_close(compressed_sdpa(*problem.arguments, **problem.given)[0], problem)


def test_the_cases_have_every_pair() -> None:
    assert set().union(*map(pairs, PAIRS)) == possible(AXES, allowed)
    # All values of two factors meet, but a group and a head that it does not divide.
    apart = possible(AXES, lambda case: True) - possible(AXES, allowed)
    assert {(a, b) for (a, _), (b, _) in apart} == {("dims", "group")}


USUAL: Case = {
    "dims": (128, 128), "heads": 4, "queries": 1, "length": 385, "dtype": mx.float16,
    "k": (8, "affine"), "v": (4, "affine"), "group": 64, "rotate": True, "mask": "none",
    "causal": True, "window": None, "more": "none", "plain": "fresh",
}  # fmt: skip


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("key <= row.last", "key < row.last"),  # the last key is not seen
        ("total *= decay;", ""),
        ("fma(scale.x, v[e], scale.y)", "scale.x * v[e]"),  # the bias is left out
        ("const uint unit = At::unit(lane, j);", "const uint unit = lane ^ 2;"),
    ],
)
def test_a_wrong_kernel_is_seen(text: str, wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = _kernel.header
    old, new = (_squeeze(t).strip() for t in (text, wrong))
    changed = []

    def header(parts: tuple[str, ...]) -> str:
        found = whole(parts)
        changed.append(old in found)
        return found.replace(old, new)

    monkeypatch.setenv("MLXFUSE_KERNELS", "emulated")
    monkeypatch.setattr(_kernel, "header", header)
    _kernel._compiled.cache_clear()
    with msl.installed(build="fast", lint=False), pytest.raises(AssertionError):
        check(USUAL)
    _kernel._compiled.cache_clear()
    assert changed == [True, False]  # the dispatch of the parts, and that which merges them


def test_garbage_beyond_the_lengths_changes_nothing(kernels: str) -> None:
    for case in (USUAL, USUAL | {"more": "padding", "queries": 5, "plain": "sink"}):
        problem = problem_of(case)
        clean = compressed_sdpa(*problem.arguments, **problem.given)
        rng = np.random.default_rng(1)
        rows, tail = np.array(problem.rows), np.array(problem.tail)
        lengths = np.broadcast_to(np.array(problem.length), len(rows))
        for b, (n, m) in enumerate(zip(lengths, np.array(problem.tail_length), strict=True)):
            rows[b, :, n:] = rng.integers(0, 2**32, rows[b, :, n:].shape, np.uint32)
            tail[b, :, m:] *= 1000
            tail[b, :, -1] = np.nan
        problem.rows, problem.tail = mx.array(rows), mx.array(tail)
        dirty = compressed_sdpa(*problem.arguments, **problem.given)
        assert all(mx.array_equal(x, y) for x, y in zip(clean, dirty, strict=True))
        # Control: one more row is seen.
        problem.length = problem.length + 1
        assert not mx.array_equal(compressed_sdpa(*problem.arguments, **problem.given)[0], clean[0])


@pytest.mark.parametrize("case", [USUAL, USUAL | {"queries": 3, "window": 300, "heads": 5}])
def test_any_number_of_splits_agrees(
    case: Case, kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = problem_of(case | {"length": 1025, "dtype": mx.float32})
    results = []
    splits = []
    for tokens in (4096, 256, 40, 4):
        monkeypatch.setattr(module, "SPLIT_TOKENS", (tokens, tokens))
        splits.append(module._splits(1032, 1))
        results.append(compressed_sdpa(*problem.arguments, **problem.given)[0])
        assert_close(results[-1], problem)
    assert splits == [1, 5, 26, 256]
    assert not mx.array_equal(results[0], results[2])


def test_splits_follow_the_length_and_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def splits(threadgroups: int) -> list[int]:
        monkeypatch.setattr(module, "_threadgroups", lambda: threadgroups)
        return [module._splits(n, 8) for n in (0, 100, 1024, 8192, 65536, 1 << 20)]

    # No fewer tokens than 128 each, no more than 2,048 but for the most splits.
    assert splits(128) == [1, 1, 8, 16, 32, 256]
    assert splits(1024) == [1, 1, 8, 64, 128, 256]


def test_a_query_that_sees_nothing_gives_zeros(kernels: str) -> None:
    problem = problem_of(USUAL | {"plain": "tail", "queries": 2, "mask": "bool"})
    mask = np.ones(problem.options["mask"].shape, bool)
    mask[0, 0, 1] = False
    problem.options["mask"] = mx.array(mask)
    (got,) = compressed_sdpa(*problem.arguments, **problem.given)
    assert not mx.any(got[0, :, 1])
    assert mx.all(mx.any(got[0, :, 0] != 0, axis=-1))
    assert_close(got, problem)
    problem.length, problem.tail_length = 0, mx.array(0)
    assert not mx.any(compressed_sdpa(*problem.arguments, **problem.given)[0])
    problem.options["sinks"] = mx.zeros(problem.q.shape[1])
    assert not mx.any(compressed_sdpa(*problem.arguments, **problem.given)[0])


def test_one_wrong_code_is_seen(kernels: str) -> None:
    problem = problem_of(USUAL | {"dtype": mx.float32, "length": 5, "rotate": False})
    (got, _) = compressed_sdpa(*problem.arguments, **problem.given)
    rows = np.array(problem.rows)
    rows[0, 0, 2, 40] ^= 1 << 28  # one of V's codes of one token
    problem.rows = mx.array(rows)
    with pytest.raises(AssertionError):
        assert_close(got, problem)


def test_what_does_not_fit_is_refused() -> None:
    problem = problem_of(USUAL | {"length": 5})
    scheme, q = problem.scheme, problem.q

    def refused(message: str, **changes: Any) -> None:
        given = {"q": q, "rows": problem.rows, "length": 5, "scale": 1.0} | changes
        with pytest.raises(ValueError, match=message):
            compressed_sdpa(
                given.pop("q"), scheme, given.pop("rows"), given.pop("length"), **with_scores(given)
            )

    refused(r"q: expected \[B, Hq, L, 128\], found \(2, 4, 1, 64\)", q=q[..., :64])
    refused(r"rows: expected .*uint32 \(2, 1, 12, 52\), found .*\(2, 1, 12, 51\)",
            rows=problem.rows[..., :51])  # fmt: skip
    refused(r"capacity that is a multiple of 4, found 3", rows=problem.rows[:, :, :3])
    refused(r"attention needs rows, a tail", rows=None)
    refused(r"length: expected one number or 2, found \(3,\)", length=mx.array([1, 2, 3]))
    refused(r"mask: expected a shape that broadcasts to \(2, 4, 1, keys\)",
            mask=mx.zeros((2, 3, 1, 12)))  # fmt: skip
    refused(r"mask: expected bool or floating point", mask=mx.zeros((12,), mx.int32))
    refused(r"sinks: expected \(4,\), found \(3,\)", sinks=mx.zeros(3))
    refused(r"window: expected at least 1, found 0", window=0)
    refused(r"softcap: expected more than 0", softcap=0.0)
    refused(r"tail: expected mlx.core.float16", tail=mx.zeros((2, 1, 16, 256), mx.float32))


def test_more_queries_than_the_kernel_takes_run_as_reference(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MLXFUSE_KERNELS", "emulated")
    problem = problem_of(USUAL | {"queries": 9, "length": 385})
    _kernel.fallbacks.clear()
    assert_close(compressed_sdpa(*problem.arguments, **problem.given)[0], problem)
    assert _kernel.fallbacks == {("compressed_sdpa", "more than 8 queries"): 1}


def test_lengths_and_layers_share_a_program() -> None:
    programs = set()
    for length in (1, 5, 385, 2049):
        problem = problem_of(USUAL | {"length": length})
        ((kernel, arguments),) = calls(
            functools.partial(compressed_sdpa, *problem.arguments, **problem.given)
        )
        launch = kernel.launch(*arguments)
        programs.add((launch.program, launch.template))
        assert launch.threadgroup == (128, 1, 1)
    assert len(programs) == 1


def test_a_step_is_three_dispatches() -> None:
    problem = problem_of(USUAL)
    fresh = problem.options.pop("fresh")
    mx.eval(problem.arguments, fresh)

    def step(q: mx.array, k: mx.array, v: mx.array, tail: mx.array, n: mx.array) -> Any:
        scheme, rows, _ = problem.arguments[1:4]
        out, packed = compressed_sdpa(q, scheme, rows, 385, tail, 11, fresh=(k, v), **problem.given)
        return out, mx.slice_update(tail, packed, n, axes=[2])

    at = mx.array([11])
    mx.eval(at)
    found = dispatches(lambda: step(problem.q, *fresh, problem.tail, at))
    assert found == {"compressed_sdpa": 2, "DynamicSliceUpdate": 1}
