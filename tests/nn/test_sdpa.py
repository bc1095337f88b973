"""Attention with capped scores: by MLX's operations, and over each kind of mlx-lm's caches."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import BatchKVCache, BatchRotatingKVCache, KVCache, RotatingKVCache

from mlxfuse.kernels import launches
from mlxfuse.nn import sdpa as module
from mlxfuse.nn.sdpa import capped_sdpa, sdpa
from tests import msl

BATCH, HEADS, KV_HEADS, DIM, CAP = 2, 4, 2, 32, 1.5
HOW: Any = {"scale": DIM**-0.5, "softcap": CAP}


def tokens(length: int, seed: int) -> tuple[mx.array, mx.array, mx.array]:
    rng = np.random.default_rng(seed)
    shapes = ((BATCH, n, length, DIM) for n in (HEADS, KV_HEADS, KV_HEADS))
    queries, keys, values = (mx.array(rng.standard_normal(s, np.float32)) for s in shapes)
    return 3 * queries, keys, values


@pytest.mark.parametrize("form", ["causal", "rows", "keys", "added", None])
def test_some_queries_after_others(form: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    queries, keys, values = tokens(13, 0)
    queries = queries[:, :, 3:]
    mask: Any = form
    if form in ("rows", "added"):
        mask = mx.array(np.tri(10, 13, 3, dtype=bool))
        mask = mx.where(mask, 0.0, -mx.inf) if form == "added" else mask
    elif form == "keys":
        mask = mx.arange(13) > 2
    want = sdpa(queries, keys, values, mask=mask, **HOW)
    built = []
    inner = module._of_capped
    monkeypatch.setattr(module, "_of_capped", lambda *a: built.append(a[1].shape[2]) or inner(*a))
    monkeypatch.setattr(module, "SCRATCH", 4 * BATCH * HEADS * 13 * 4)
    got = sdpa(queries, keys, values, mask=mask, **HOW)
    assert mx.allclose(got, want, atol=1e-6)
    assert built == ([7, 11, 13] if form == "causal" else [13] * 3)
    # Control: the cap is felt.
    plain = mx.fast.scaled_dot_product_attention(
        queries, keys, values, scale=HOW["scale"], mask=mask
    )
    assert not mx.allclose(got, plain, atol=1e-2)


CACHES = {
    "whole": KVCache,
    "rotating": lambda: RotatingKVCache(max_size=6),
    "batch": lambda: BatchKVCache([2, 0]),
    "batch rotating": lambda: BatchRotatingKVCache(6, [2, 0]),
}


@pytest.mark.parametrize("name", CACHES)
def test_over_mlx_lms_caches(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt in two pieces, then tokens until a window has been left."""
    monkeypatch.setenv("MLXFUSE_KERNELS", "emulated")
    cache = CACHES[name]()
    before = launches["compressed_sdpa"]
    with msl.installed(build="fast", lint=False):
        for step, length in enumerate((5, 2, 1, 1, 1)):
            queries, keys, values = tokens(length, step)
            mask = cache.make_mask(length, window_size=None, return_array=True)
            keys, values = cache.update_and_fetch(keys, values)
            got = capped_sdpa(queries, keys, values, cache, mask=mask, **HOW)
            want = sdpa(queries, keys, values, mask=mask, **HOW)
            seen = slice(
                2 if "batch" in name and not step else 0, None
            )  # what is padding sees none
            assert mx.allclose(got[:, :, seen], want[:, :, seen], atol=1e-5), step
    assert launches["compressed_sdpa"] - before == 5
    # Control: of the arrays that a cache holds, what lies beyond its tokens is not seen.
    cache.keys[..., -1, :] = (
        mx.nan if cache.keys.shape[2] > keys.shape[2] else cache.keys[..., -1, :]
    )
    with msl.installed(build="fast", lint=False):
        assert mx.array_equal(capped_sdpa(queries, keys, values, cache, mask=mask, **HOW), got)


def test_more_queries_than_the_kernel_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLXFUSE_KERNELS", "emulated")
    queries, keys, values = tokens(9, 0)
    before = launches["compressed_sdpa"]
    got = capped_sdpa(queries, keys, values, None, mask="causal", **HOW)
    assert mx.array_equal(got, sdpa(queries, keys, values, mask="causal", **HOW))
    assert launches["compressed_sdpa"] == before
