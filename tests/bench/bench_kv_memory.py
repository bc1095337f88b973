"""Peak memory of key-value caches: plain, mlx-lm's quantised one and the compressed one.

    python -m tests.bench.bench_kv_memory [--tokens 16384] [--computed 2048] [--step 2048]

A narrow llama of 24 layers, float16, reads a prompt with each cache as mlx-lm does, ``--step``
tokens at a time. What comes before the last ``--computed`` tokens is put into the caches without
the attention that a CPU takes an hour for; memory is greatest in the last step. ``cache`` is what
the cache holds at the end, ``peak`` what MLX held at most beside the weights.

On the CPU, MLX's attention writes down its scores (``scores``: float16, one layer, one step) with
every cache; on Metal mlx-lm's quantised cache only makes it do so. Random weights: memory does
not depend on them.

Then 1,000 tokens are appended one by one, pipelined as mlx-lm's generation is, to caches of
``--filled`` tokens, with one small read of everything in the place of attention. ``growth`` is
the peak above the start; ``copies`` is what of it the tokens did not need, in sizes of the cache.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any
from unittest import mock

import mlx.core as mx
from mlx_lm.generate import generate_step
from mlx_lm.models import llama
from mlx_lm.models.cache import KVCache, QuantizedKVCache

from mlxfuse.fusion import patch_model
from mlxfuse.nn import cache as module
from mlxfuse.nn.cache import CompressedKVCache

LAYERS, HIDDEN, HEADS, HEAD = 24, 64, 1, 64


def model() -> Any:
    arguments = llama.ModelArgs(
        model_type="llama",
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        intermediate_size=HIDDEN,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        head_dim=HEAD,
        rms_norm_eps=1e-5,
        vocab_size=256,
    )
    made = llama.Model(arguments)
    made.set_dtype(mx.float16)
    mx.eval(made.parameters())
    return made


def prompt(
    of: Any, make: Callable[[], Any], tokens: int, computed: int, step: int
) -> tuple[int, int]:
    """(bytes of the cache at the end, peak bytes) of reading a prompt and generating a token."""
    ids = mx.random.randint(0, 256, (computed,), key=mx.random.key(0))
    kv = mx.random.normal((1, HEADS, step, HEAD)).astype(mx.float16)
    mx.eval(ids, kv)
    caches = [make() for _ in range(LAYERS)]
    mx.clear_cache()
    start = mx.get_active_memory()
    mx.reset_peak_memory()
    for done in range(0, tokens - computed, step):
        new = kv[:, :, : tokens - computed - done]
        for cache in caches:
            cache.update_and_fetch(new, new)
            mx.eval(cache.state)
    for _ in generate_step(ids, of, max_tokens=1, prompt_cache=caches, prefill_step_size=step):
        pass
    mx.synchronize()
    return sum(c.nbytes for c in caches), mx.get_peak_memory() - start


def glance(*arrays: mx.array) -> mx.array:
    """0, found by reading something of each array."""
    total = sum((a[:, :, ::8, :4].sum().astype(mx.float32) for a in arrays), mx.array(0.0))
    return (total * 0).astype(mx.float16)


def append(cache: Any, x: mx.array) -> mx.array:
    """One layer's step: x [1, heads, 1, head size] -> the same shape."""
    if isinstance(cache, CompressedKVCache):
        return cache.attend(x, x, x, scale=1.0)
    return x + glance(*cache.update_and_fetch(x, x))


def _glancing(q: mx.array, scheme: object, rows: mx.array, length: int, *rest: Any, **more: Any):
    tail, tail_length = rest
    seen = glance(rows[:, :, :length], tail[:, :, :tail_length])
    return q + seen, mx.concatenate(list(more["fresh"]), axis=-1)


def decode(make: Callable[[], Any], filled: int, tokens: int = 1000) -> tuple[int, float]:
    """(peak above the start in bytes, what of it was not needed in sizes of the cache)."""
    heads, size, layers = 8, 128, 4
    caches = [make() for _ in range(layers)]
    kv = mx.random.normal((1, heads, filled, size)).astype(mx.float16)
    for cache in caches:
        cache.update_and_fetch(kv, kv)
        mx.eval(cache.state)
    x = mx.zeros((1, heads, 1, size), mx.float16)
    mx.eval(x)
    del kv
    mx.clear_cache()
    held = sum(c.nbytes for c in caches)
    start = mx.get_active_memory()
    mx.reset_peak_memory()
    before: mx.array | None = None
    with mock.patch.object(module, "compressed_sdpa", _glancing):
        for _ in range(tokens):
            for cache in caches:
                x = append(cache, x)
            mx.async_eval(x)
            if before is not None:
                mx.eval(before)
            before = x
    mx.eval(x)
    growth = mx.get_peak_memory() - start
    needed = sum(c.nbytes for c in caches) - held
    return growth, (growth - needed) / held


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--computed", type=int, default=2048)
    parser.add_argument("--step", type=int, default=2048)
    parser.add_argument("--filled", type=int, default=4096)
    arguments = parser.parse_args()
    tokens, step = arguments.tokens, arguments.step
    plain, fused = model(), model()
    patch_model(fused, fuse="all")
    scores = 2 * HEADS * min(step, arguments.computed) * tokens
    print(f"{tokens:,} tokens, {step:,} at a time; scores {scores / 1e6:.1f} MB")
    for name, of, make in (
        ("plain", plain, KVCache),
        ("k8v4", fused, CompressedKVCache),
        ("k8v4, not patched", plain, CompressedKVCache),
        ("mlx-lm, 8 bits", plain, lambda: QuantizedKVCache(group_size=64, bits=8)),
    ):
        held, peak = prompt(of, make, tokens, arguments.computed, step)
        print(f"{name:<20} cache {held / 1e6:7.1f} MB   peak {peak / 1e6:7.1f} MB", flush=True)
    print(f"\n1,000 tokens more than {arguments.filled:,}, one by one")
    for name, make in (("plain", KVCache), ("k8v4", CompressedKVCache)):
        growth, copies = decode(make, arguments.filled)
        print(f"{name:<20} growth {growth / 1e6:7.1f} MB   copies {copies:.2f}", flush=True)


if __name__ == "__main__":
    main()
