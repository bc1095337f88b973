"""Capped attention over plain keys and values against float64, in one part and in several."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlxfuse.fusion.dispatches import dispatches
from mlxfuse.kernels.kv.compressed_sdpa import KERNEL, plain_sdpa, refuse_plain
from mlxfuse.kernels.kv.scheme import KVScheme, KVSide
from mlxfuse.kernels.kv.sdpa_call import WHOLE_TOKENS, Scores
from mlxfuse.kernels.runtime import kernel as _kernel
from mlxfuse.kernels.runtime import self_test
from tests import msl

from ..weights import to_float64
from .problems import Problem, normal, oracle

CASES: dict[str, dict[str, Any]] = {
    "decode": {"dim": 256, "dtype": mx.bfloat16, "causal": False},
    "prompt": {"dim": 64, "heads": 7, "queries": 5, "dtype": mx.float16},
    "split": {"dim": 32, "capacity": 516, "length": 431, "dtype": mx.float16, "causal": False},
    "split batch": {"batch": 2, "capacity": 300, "length": 290, "queries": 2, "mask": True},
    "window": {"dim": 96, "window": 9, "queries": 3, "dtype": mx.float32},
    "padding": {"batch": 2, "left_padding": mx.array([7, 0]), "dtype": mx.float32},
}


def made(
    dim: int = 64,
    heads: int = 2,
    queries: int = 1,
    batch: int = 1,
    capacity: int = 40,
    length: int = 37,
    dtype: mx.Dtype = mx.float32,
    mask: bool = False,
    **options: Any,
) -> tuple[Problem, mx.array, mx.array]:
    """The problem for the oracle, and the arrays of a cache: what is not in use is no number."""
    rng = np.random.default_rng(capacity)
    q = normal(rng, dtype, batch, 2 * heads, queries, dim)
    k, v = (normal(rng, dtype, batch, 2, capacity, dim) for _ in range(2))
    options |= {"scale": 3 * dim**-0.5, "softcap": 2.0}
    if mask:
        options |= {"mask": mx.array(rng.random((batch, 1, queries, length)) < 0.7)}
        options["causal"] = False
    used = mx.arange(capacity)[:, None] < length
    k, v = (mx.where(used, x, mx.nan).astype(dtype) for x in (k, v))
    tail = mx.concatenate([k, v], axis=-1)[:, :, :length]
    scheme = KVScheme(KVSide(dim, 16), KVSide(dim, 16), dtype)
    return Problem(q, scheme, None, 0, tail, length, options), k, v


def attended(problem: Problem, k: mx.array, v: mx.array, length: int) -> mx.array:
    return plain_sdpa(problem.q, k, v, length, **problem.given)


@pytest.mark.parametrize("name", CASES)
def test_values(name: str, kernels: str) -> None:
    problem, k, v = made(**CASES[name])
    length = problem.tail_length
    with msl.using(lint=name == "decode"):
        got = attended(problem, k, v, length)
    want, bound = oracle(problem)
    assert got.dtype == problem.q.dtype
    error = np.abs(to_float64(got) - want)
    assert np.all(error <= bound)
    # Controls: with another cap, or without the first token, the answer is another.
    changed = problem_without_first(problem)
    for other in (replace(problem, options={**problem.options, "softcap": 2.5}), changed):
        assert np.any(np.abs(to_float64(got) - oracle(other)[0]) > bound)


def problem_without_first(problem: Problem) -> Problem:
    options = dict(problem.options)
    if options.get("mask") is not None:
        options["mask"] = options["mask"][..., 1:]
    if options.get("left_padding") is not None:
        options["left_padding"] = options["left_padding"] - 1
    if options.get("window") is not None:
        options["window"] -= 1
    return replace(
        problem, tail=problem.tail[:, :, 1:], tail_length=problem.tail_length - 1, options=options
    )


def test_dispatches_and_programs() -> None:
    """One where all tokens are in one part, else two; both are what their self-tests run."""
    for capacity, count in ((WHOLE_TOKENS, 1), (WHOLE_TOKENS + 4, 2)):
        problem, k, v = made(capacity=capacity, length=200, causal=False)
        mx.eval(problem.q, k, v)
        assert dispatches(lambda p=(problem, k, v): attended(*p, 200))["compressed_sdpa"] == count
        ((_, arguments),) = self_test.calls(lambda p=(problem, k, v): attended(*p, 200))
        small = KERNEL.small(*arguments)
        assert KERNEL.launch(*small).program == KERNEL.launch(*arguments).program
        assert len(KERNEL.launch(*small).chain()) == count


def test_a_wrong_part_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = _kernel.header
    monkeypatch.setenv("MLXFUSE_KERNELS", "emulated")
    monkeypatch.setattr(
        _kernel, "header", lambda parts: whole(parts).replace("1.0f/total", "2.0f/total")
    )
    _kernel._compiled.cache_clear()
    problem, k, v = made(causal=False)
    with msl.installed(build="fast", lint=False):
        got = attended(problem, k, v, 37)
        mx.eval(got)
    _kernel._compiled.cache_clear()
    want, bound = oracle(problem)
    assert np.allclose(to_float64(got), 2 * want, atol=1e-4)
    assert np.any(np.abs(to_float64(got) - want) > bound)


def test_what_has_no_kernel() -> None:
    _, k, v = made()
    assert refuse_plain(k, v) is None
    assert refuse_plain(k, v.astype(mx.float16)) == "keys are mlx.core.float32 and values " + (
        "mlx.core.float16"
    )
    assert "multiple of 8" in (refuse_plain(k[..., :36], v) or "")
    assert "32 to 512" in (refuse_plain(k[..., :16], v[..., :16]) or "")
    with pytest.raises(ValueError, match=r"values: expected .* \(1, 2, 40, 64\), found .*39"):
        plain_sdpa(k, k, v[:, :, :39], 37, scores=Scores(1.0))
