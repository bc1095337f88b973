"""Nothing of a call outlives it but what is asked for: every array is measured by its buffer."""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.models.cache import KVCache, RotatingKVCache, load_prompt_cache, save_prompt_cache

from mlxfuse.fusion import patch_model
from mlxfuse.kernels.kv.sdpa_call import Scores
from mlxfuse.kernels.matmul import quantized_matmul
from mlxfuse.kernels.matmul.product import MAX_BATCHED_ROWS
from mlxfuse.kernels.runtime import backend as _backend
from mlxfuse.loader import load
from mlxfuse.nn.kv.batch_cache import BatchCompressedKVCache
from mlxfuse.nn.kv.cache import CompressedKVCache
from mlxfuse.nn.projection import KernelProjection
from mlxfuse.nn.rotation import Rotation
from tests.fusion import zoo
from tests.models import tiny

pytestmark = pytest.mark.usefixtures("fresh_buffers")


def arrays(value: Any) -> Iterator[mx.array]:
    if isinstance(value, mx.array):
        yield value
    elif isinstance(value, list | tuple):
        for each in value:
            yield from arrays(each)


def buffers(*caches: Any) -> int:
    """Bytes of the buffers that they keep alive."""
    found = list(arrays([c.state for c in caches]))
    mx.eval(found)
    return sum(mx.get_array_buffer_size(a) for a in found)


def random(tokens: int, batch: int = 1) -> tuple[mx.array, mx.array]:
    kv = mx.random.normal((batch, 2, tokens, 96))
    return kv[..., :64], kv[..., 64:]


def prefilled(tokens: int = 3000) -> CompressedKVCache:
    cache = CompressedKVCache()
    cache.attend(mx.random.normal((1, 4, tokens, 64)), *random(tokens), Scores.of("causal", 0.1))
    return cache


def test_a_compressed_cache_holds_what_it_says(tmp_path: Path) -> None:
    cache = prefilled()
    assert cache.sink.nbytes < 4096
    assert buffers(cache) <= 1.1 * cache.nbytes
    # One token at a time, a copy, a trimmed one, a stored one, and one made of mlx-lm's.
    for _ in range(70):
        cache.update_and_fetch(*random(1))
    made = copy.deepcopy(cache)
    cache.trim(40)
    save_prompt_cache(str(tmp_path / "c.safetensors"), [cache])
    (stored,) = load_prompt_cache(str(tmp_path / "c.safetensors"))
    plain, rotating = KVCache(), RotatingKVCache(max_size=256, keep=4)
    for each in (plain, rotating):
        each.update_and_fetch(*random(2000))
    others = [CompressedKVCache.from_cache(each) for each in (plain, rotating)]
    for each in (cache, made, stored, *others):
        assert each.sink is not None
        assert buffers(each) <= 1.1 * each.nbytes
    # Control: a view of four tokens keeps all of them.
    cache.sink = random(3000)[0][:, :, :4]
    assert buffers(cache) > 1.1 * cache.nbytes


def test_a_batch_of_compressed_caches_holds_what_it_says() -> None:
    batch = BatchCompressedKVCache([CompressedKVCache() for _ in range(3)])
    batch.prepare(lengths=[900, 300, 3], right_padding=[0, 600, 897])
    mask = batch.make_mask(900)
    batch.attend(mx.random.normal((3, 4, 900, 64)), *random(900, 3), Scores.of(mask, 0.1))
    batch.finalize()
    merged = CompressedKVCache.merge([prefilled(), prefilled(2)])
    merged.extend(batch)
    for _ in range(3):
        mask = merged.make_mask(1)
        merged.attend(mx.random.normal((5, 4, 1, 64)), *random(1, 5), Scores.of(mask, 0.1))
    left = merged.extract(0)
    merged.filter([1, 2])
    for each in (*merged.caches, left):
        assert buffers(each) <= 1.1 * each.nbytes


@pytest.mark.parametrize("form", ["float32", "affine4"])
def test_fused_weights_are_held_once(form: str) -> None:
    """The linears' arrays are views of the joined ones."""
    model = zoo.build("qwen2", form)
    mx.eval(model.parameters())
    gc.collect()
    before = mx.get_active_memory()
    patch_model(model, fuse="all")
    gc.collect()
    assert mx.get_active_memory() - before < 8192


def stand_in(**_: Any) -> Any:
    """In the place of `mx.fast.metal_kernel`: zeros that depend on the inputs."""

    def launch(inputs: Any, output_shapes: Any, output_dtypes: Any, **_: Any) -> list[mx.array]:
        zeros = [mx.zeros(s, d) for s, d in zip(output_shapes, output_dtypes, strict=True)]
        return list(mx.depends(zeros, inputs))

    return launch


@pytest.mark.parametrize("variant", ["dequantize", "tiles64"])
def test_nothing_of_a_prompt_is_alive(
    variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On Metal, after prompts of several lengths, also where `tune` chose tiles."""
    model, _ = load(tiny.write(tmp_path / "m.gguf", tiny.build("llama-q4", 0)), fuse="all")
    monkeypatch.setattr(mx.fast, "metal_kernel", stand_in)
    monkeypatch.setattr(_backend, "_no_device", lambda: None)
    monkeypatch.setattr(
        quantized_matmul,
        "tuned",
        lambda call: replace(call, variant=variant) if call.rows > MAX_BATCHED_ROWS else call,
    )
    monkeypatch.setenv("MLXFUSE_KERNELS", "metal")

    def ran(*lengths: int) -> tuple[int, int]:
        for length in lengths:
            mx.eval(model(mx.zeros((1, length), mx.int32)))
        gc.collect()
        entries = [
            len(piece._prepared)
            for module in model.modules()
            for piece in vars(vars(module).get("_fused", object)).values()
            if isinstance(piece, KernelProjection | Rotation)
        ]
        return mx.get_active_memory(), max(entries)

    ran(9, 40)
    before, entries = ran(20, 90)
    after = ran(32, 33, 50, 60, 300)
    # Small arrays of sizes, one for each shape, stay.
    assert after[0] - before < 4096
    assert after[1] == entries + 1
