"""Steps of caches as graphs that are kept give what they give without; see `test_kept_graph`."""

from __future__ import annotations

from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import QuantizedKVCache

from mlxfuse.kernels.kv.sdpa_call import Scores
from mlxfuse.kernels.runtime import backend as _backend
from mlxfuse.kernels.runtime import self_test
from mlxfuse.nn.kv import kept
from mlxfuse.nn.kv.cache import CompressedKVCache
from mlxfuse.nn.kv.quantized import attend

HEADS, KV_HEADS, DIM = 4, 2, 32


class Keeping(_backend.Reference):
    """Keeps graphs as Metal does, of the references."""

    keeps = True


def outputs(make: Any, steps: list[int]) -> list[mx.array]:
    """Of two layers, whose tokens come in such pieces."""
    rng = np.random.default_rng(0)
    layers, found = [make(), make()], []
    scores = Scores.of(None, 0.2)
    for length in steps:
        for cache in layers:
            q, k, v = (
                mx.array(rng.standard_normal((1, n, length, DIM), np.float32))
                for n in (HEADS, KV_HEADS, KV_HEADS)
            )
            given = scores if length == 1 else Scores.of("causal", 0.2)
            found.append(attend(q, k, v, cache, given))
            mx.eval(found[-1])
    return found


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLXFUSE_KERNELS", "reference")
    monkeypatch.setattr(kept._Step, "known", {})


@pytest.mark.parametrize(
    "make",
    [lambda: CompressedKVCache(keep=0), lambda: QuantizedKVCache(32, 4)],
    ids=["compressed", "mlx-lm's"],
)
def test_a_kept_step_gives_what_it_gives_without(
    make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = [180, *[1] * 70]
    monkeypatch.setattr(_backend.Reference, "takes", lambda *_: True)
    want = outputs(make, steps)
    built = []
    makes = {name: getattr(kept, name) for name in ("compressed_sdpa", "quantized_sdpa")}

    def counted(name: str, *given: Any, **how: Any) -> Any:
        built.append(name)
        return makes[name](*given, **how)

    for name in makes:
        monkeypatch.setattr(kept, name, partial(counted, name))
    monkeypatch.setattr(_backend, "_default", lambda: Keeping("it is a stand-in"))
    got = outputs(make, steps)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6)
    assert 1 <= len(built) <= 2  # both layers share a graph for each capacity, in 140 steps


def test_a_kernel_is_tested_before_it_is_first_used(monkeypatch: pytest.MonkeyPatch) -> None:
    tested: list[Any] = []
    now = Keeping("")
    now.reason = None
    monkeypatch.setattr(_backend, "_default", lambda: now)
    monkeypatch.setattr(self_test, "check", lambda recorded: tested.append(list(recorded)))
    outputs(CompressedKVCache, [1, 1])
    # The first token has nothing before it, the second a sink.
    assert [len(recorded) for recorded in tested] == [1, 1]
    outputs(CompressedKVCache, [1, 1])
    assert len(tested) == 2
