"""Compressed caches where some layers keep keys and values: hybrids, windows, uneven heads."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import pytest
from mlx_lm.models.cache import make_prompt_cache

from mlxfuse.errors import UnsupportedError
from mlxfuse.loader import load
from mlxfuse.nn.kv.cache import CompressedKVCache
from mlxfuse.nn.kv.options import KVOptions, compressed, plain_caches
from tests.models import tiny

IDS = mx.array([[(7 * i + i * i) % 250 for i in range(150)]])


@pytest.fixture(autouse=True)
def reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLXFUSE_KERNELS", "reference")


@pytest.mark.parametrize(
    ("name", "attends"),
    [
        ("jamba", [1]),
        ("granitehybrid", [1]),
        ("nemotron_h_moe", [1]),
        ("lfm2", None),
        ("qwen3next", [1, 3]),
        ("llama4", [0, 1, 2, 3, 4]),
        ("laguna", [0, 1, 2, 3]),
        ("step35", [0, 1, 2, 3]),
        ("mellum", [0, 1, 2, 3, 4]),
    ],
)
def test_layers_with_keys_and_values_are_compressed(
    name: str, attends: list[int] | None, tmp_path: Path
) -> None:
    """And the others' states are plain; where nothing is lost the logits are the plain ones."""
    path = tiny.write(tmp_path / "m.gguf", tiny.build(name, 0))
    model, _ = load(path, kv_bits="k8v4", dtype=mx.float32)
    kinds = [isinstance(cache, CompressedKVCache) for cache in make_prompt_cache(model)]
    if attends is None:  # lfm2's one layer of three
        assert sum(kinds) == 1
    else:
        assert [i for i, kind in enumerate(kinds) if kind] == attends
    found = []
    for how in (None, KVOptions(16, 16, rotate=False), KVOptions(4, 4, rotate=False)):
        caches = plain_caches(model)
        caches = caches if how is None else compressed(caches, how)
        rows = [model(IDS[:, :100], cache=caches), model(IDS[:, 100:], cache=caches)]
        found.append(mx.concatenate(rows, axis=1))
    largest = mx.abs(found[0]).max()
    assert mx.abs(found[1] - found[0]).max() <= 1e-4 * largest
    assert mx.abs(found[2] - found[0]).max() > 1e-3 * largest  # control: four bits lose something


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("mamba", "no layer of this model keeps keys and values"),
        ("mamba2", "no layer of this model keeps keys and values"),
        ("kimi-linear", "caches a latent vector in place of keys and values"),
        ("mistral4", "caches a latent vector in place of keys and values"),
        ("deepseek32", "caches a latent vector in place of keys and values"),
        ("falcon-h1", "CacheList, which has no compressed form"),
        ("mimo2", "models with learned attention sinks"),
    ],
)
def test_what_cannot_be_compressed_is_refused(name: str, reason: str, tmp_path: Path) -> None:
    path = tiny.write(tmp_path / "m.gguf", tiny.build(name, 0))
    with pytest.raises(UnsupportedError, match=reason):
        load(path, kv_bits="k8v4")
