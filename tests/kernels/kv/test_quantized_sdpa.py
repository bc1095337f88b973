"""Attention over arrays of `mx.quantize`, as in mlx-lm's quantised caches, against float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlxfuse.kernels.kv.compressed_sdpa import KERNEL, quantized_sdpa
from mlxfuse.kernels.kv.scheme import KVScheme, KVSide, pack
from mlxfuse.kernels.kv.sdpa_call import Scores
from mlxfuse.kernels.runtime import self_test
from tests import msl

from ..weights import to_float64
from .problems import Problem, normal, oracle

Quantised = tuple[mx.array, mx.array, mx.array]

CASES: dict[str, dict[str, Any]] = {
    "2 bits": {"bits": 2, "group": 32, "dim": 64, "heads": 4},
    "3 bits": {"bits": 3, "group": 64, "dim": 128, "dtype": mx.float16, "causal": False},
    "4 bits": {"bits": 4, "group": 32, "dim": 96, "dtype": mx.bfloat16, "queries": 3},
    "5 bits": {"bits": 5, "group": 32, "dim": 32, "heads": 8, "queries": 2, "dtype": mx.float16},
    "6 bits": {"bits": 6, "group": 64, "dim": 64, "heads": 7, "sinks": True},
    "8 bits": {"bits": 8, "group": 128, "dim": 128, "dtype": mx.bfloat16, "softcap": 2.0},
    "split": {"bits": 8, "group": 64, "capacity": 613, "length": 431, "dtype": mx.float16},
    "staged and split": {"bits": 6, "heads": 6, "capacity": 301, "length": 290, "queries": 3},
    "mask of a batch": {"bits": 3, "batch": 2, "queries": 2, "mask": True},
    "window": {"bits": 5, "dim": 256, "window": 9, "queries": 3},
}


def decoded(held: Quantised, bits: int) -> np.ndarray:
    """Scale times code plus bias in float64; codes lie one behind the other."""
    words, scales, biases = held
    raw = np.array(words).view(np.uint8)
    each = np.unpackbits(raw, axis=-1, bitorder="little")
    each = each.reshape(*raw.shape[:-1], -1, bits).astype(np.float64)
    codes = (each * 2.0 ** np.arange(bits)).sum(-1)
    group = codes.shape[-1] // scales.shape[-1]
    scale, bias = (np.repeat(to_float64(x), group, axis=-1) for x in (scales, biases))
    return scale * codes + bias


def made(
    bits: int,
    group: int = 64,
    dim: int = 64,
    heads: int = 2,
    queries: int = 1,
    batch: int = 1,
    capacity: int = 41,
    length: int = 37,
    dtype: mx.Dtype = mx.float32,
    mask: bool = False,
    sinks: bool = False,
    **options: Any,
) -> tuple[Problem, Quantised, Quantised]:
    """The problem over the same values, plain, for the oracle; and a cache's arrays, in which
    what is not in use is no number.
    """
    rng = np.random.default_rng(bits)
    q = normal(rng, dtype, batch, 2 * heads, queries, dim)
    used = mx.arange(capacity)[:, None] < length
    held = []
    for _ in range(2):
        x = normal(rng, dtype, batch, 2, capacity, dim)
        words, *numbers = mx.quantize(x, group_size=group, bits=bits)
        held.append((words, *[mx.where(used, n, mx.nan).astype(dtype) for n in numbers]))
    values = [decoded(x, bits)[:, :, :length].astype(np.float32) for x in held]
    options |= {"scale": 2 * dim**-0.5}
    if mask:
        options |= {"mask": mx.array(rng.random((batch, 1, queries, length)) < 0.7)}
        options["causal"] = False
    if sinks:
        options["sinks"] = normal(rng, mx.float32, 2 * heads)
    scheme = KVScheme(KVSide(dim, 16), KVSide(dim, 16), mx.float32)
    tail = mx.array(np.concatenate(values, axis=-1))
    return Problem(q, scheme, None, 0, tail, length, options), *held


def attended(problem: Problem, k: Quantised, v: Quantised, bits: int, group: int) -> mx.array:
    return quantized_sdpa(
        *(problem.q, k, v, problem.tail_length),
        group_size=group,
        bits=bits,
        scores=problem.given["scores"],
    )


@pytest.mark.parametrize("name", CASES)
def test_values(name: str, kernels: str) -> None:
    case = {"group": 64, **CASES[name]}
    problem, k, v = made(**case)
    with msl.using(lint=name in ("2 bits", "staged and split")):
        got = attended(problem, k, v, case["bits"], case["group"])
    want, bound = oracle(problem)
    assert got.dtype == problem.q.dtype
    assert np.all(np.abs(to_float64(got) - want) <= bound)
    # Control: one token's value is another.
    tail = np.array(problem.tail)
    tail[0, 0, 20:] += 1
    other = oracle(replace(problem, tail=mx.array(tail)))[0]
    assert np.any(np.abs(to_float64(got) - other) > bound)


def test_the_reference_and_the_self_test(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("3 bits", "mask of a batch", "staged and split"):
        case = {"group": 64, **CASES[name]}
        problem, k, v = made(**case)
        bits, group = case["bits"], case["group"]
        monkeypatch.setenv("MLXFUSE_KERNELS", "reference")
        want, bound = oracle(problem)
        got = attended(problem, k, v, bits, group)
        assert np.all(np.abs(to_float64(got) - want) <= bound)
    ((kernel, arguments),) = self_test.calls(lambda: attended(problem, k, v, bits, group))
    assert kernel is KERNEL
    with msl.installed(build="fast", lint=False):
        assert self_test.compare(kernel, kernel.small(*arguments), emulated=True) == ""


def test_what_does_not_fit_is_refused() -> None:
    problem, k, v = made(4)
    q, how = problem.q, {"group_size": 64, "bits": 4, "scores": Scores(1.0)}
    with pytest.raises(ValueError, match=r"keys: expected .*uint32 \(1, 2, 41, 8\), found"):
        quantized_sdpa(q, (k[0][..., :7], *k[1:]), v, 37, **how)
    with pytest.raises(ValueError, match=r"value_biases: expected .*float32 \(1, 2, 41, 1\)"):
        quantized_sdpa(q, k, (*v[:2], v[2][:, :, :40]), 37, **how)
    with pytest.raises(ValueError, match="key_scales: expected"):
        quantized_sdpa(q, (k[0], k[1][0], k[2]), v, 37, **how)
    side = KVSide(64, 3)
    with pytest.raises(ValueError, match="packed rows have codes of 4 or 8 bits, not of 3"):
        pack(KVScheme(side, side, mx.float32), *(mx.zeros((1, 1, 4, 64)),) * 2)
