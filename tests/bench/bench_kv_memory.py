"""Peak memory of key-value caches: plain, mlx-lm's quantised one and the compressed one.

    python -m tests.bench.bench_kv_memory [--tokens 16384] [--step 2048] [--layers 1]

A narrow llama of 24 layers, float16, has a prompt of ``--tokens`` in its caches but for the last
``--step``, which are processed as mlx-lm does; memory is greatest then. All caches are filled;
``--layers`` compute: layers take memory one after the other, so one has the peak of 24, which
would take mlx-lm's quantised products an hour in float16 on a CPU. ``cache`` is what the caches
hold at the end, ``peak`` what MLX held at most beside the weights. Random weights: memory does
not depend on them.

Who writes down scores [heads, step, tokens]? mlx-lm's quantised attention does, everywhere: they
are an array between two of MLX's operations, and a mask of that shape is another
(github.com/ml-explore/mlx-lm, issue 1587); in a patched model it does not. MLX's own
attention does on the CPU (``MLX's CPU attention``), and not on Metal for heads of this size; ``by
tiles`` is the same attention computed for `TILE` queries at a time, which holds as little.

Then one layer of 8 KV heads reads 64 tokens more after 16k and 64k, decompressing all heads at
once or as `CompressedKVCache.SCRATCH` has it. The CPU decompresses by MLX's operations, in
float32: on Metal it takes less.

Then 1,000 tokens are appended one by one, pipelined as mlx-lm's generation is, to caches of
``--filled`` tokens, with one small read of everything in the place of attention. ``growth`` is
the peak above the start; ``copies`` is what of it the tokens did not need, in sizes of the cache.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any
from unittest import mock

import mlx.core as mx
from mlx_lm.models import llama
from mlx_lm.models.base import create_attention_mask
from mlx_lm.models.cache import KVCache, QuantizedKVCache

from mlxfuse.fusion import patch_model
from mlxfuse.kernels.kv.sdpa_call import Scores
from mlxfuse.nn.kv import cache as module
from mlxfuse.nn.kv.cache import CompressedKVCache

LAYERS, HIDDEN, HEADS, HEAD = 24, 64, 1, 64
TILE = 64


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
    made.eval()  # a model that is trained runs its own code
    mx.eval(made.parameters())
    return made


def by_tiles(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    *,
    scale: float,
    mask: str | None = None,
    sinks: None = None,
) -> mx.array:
    """Causal attention, `TILE` queries at a time, each written into the output."""
    assert mask == "causal"
    batch, heads, length, size = q.shape
    grouped = (q * scale).reshape(batch, k.shape[1], -1, length, size)
    out = mx.zeros((*grouped.shape[:-1], v.shape[-1]), q.dtype)
    key = mx.arange(k.shape[2])
    for first in range(0, length, TILE):
        rows = slice(first, min(first + TILE, length))
        scores = grouped[..., rows, :] @ k[:, :, None].swapaxes(-1, -2)
        last = k.shape[2] - length + mx.arange(rows.start, rows.stop)[:, None]
        scores = mx.where(key <= last, scores, -mx.inf)
        out[..., rows, :] = mx.softmax(scores, axis=-1, precise=True) @ v[:, :, None]
        mx.eval(out)  # else MLX would begin all tiles at once
    return out.reshape(batch, heads, length, -1)


def peak_of(work: Callable[[], Any]) -> int:
    """Bytes above those held before."""
    mx.synchronize()
    mx.clear_cache()
    start = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(work())
    mx.synchronize()
    return mx.get_peak_memory() - start


def fill(cache: Any, tokens: int, step: int, heads: int = HEADS, size: int = HEAD) -> Any:
    """The cache with random tokens, ``step`` at a time."""
    for done in range(0, tokens, step):
        shape = (1, heads, min(step, tokens - done), size)
        new = mx.random.normal(shape).astype(mx.float16)
        cache.update_and_fetch(new, new)
        mx.eval(cache.state)
    return cache


def prompt(
    of: Any, make: Callable[[], Any], tokens: int, step: int, layers: int = LAYERS
) -> tuple[int, int]:
    """(bytes of the caches at the end, peak bytes) of the last ``step`` tokens of a prompt."""
    h = mx.random.normal((1, step, HIDDEN), key=mx.random.key(0)).astype(mx.float16)
    mx.eval(h)
    caches: list[Any] = []

    def last_step() -> Any:
        x, held = h, list(zip(of.model.layers, caches, strict=True))
        for layer, cache in held[LAYERS - layers :]:
            x = layer(x, create_attention_mask(x, cache), cache)
        return x, [c.state for c in caches]

    def whole() -> Any:
        for i in range(LAYERS):
            computes = i >= LAYERS - layers
            caches.append(fill(make(), tokens - step * computes, step))
        return last_step()

    peak = peak_of(whole)
    return sum(c.nbytes for c in caches), peak


def one_layer(make: Callable[[], Any], tokens: int, scratch: int) -> int:
    """Peak bytes of attention of 64 tokens after others, beside the cache; 8 KV heads of 128."""
    cache = fill(make(), tokens, 4096, 8, 128)
    x = mx.random.normal((1, 8, 64, 128)).astype(mx.float16)
    mx.eval(x)

    def work() -> Any:
        if isinstance(cache, CompressedKVCache):
            return cache.attend(x, x, x, Scores.of("causal", 0.1))
        return mx.fast.scaled_dot_product_attention(
            x, *cache.update_and_fetch(x, x), scale=0.1, mask="causal"
        )

    with (
        mock.patch.object(CompressedKVCache, "SCRATCH", scratch),
        mock.patch.object(mx.fast, "scaled_dot_product_attention", by_tiles),
    ):
        return peak_of(work)


def glance(*arrays: mx.array) -> mx.array:
    """0, found by reading something of each array."""
    total = sum((a[:, :, ::8, :4].sum().astype(mx.float32) for a in arrays), mx.array(0.0))
    return (total * 0).astype(mx.float16)


def append(cache: Any, x: mx.array) -> mx.array:
    """One layer's step: x [1, heads, 1, head size] -> the same shape."""
    if isinstance(cache, CompressedKVCache):
        return cache.attend(x, x, x, Scores.of(None, 1.0))
    return x + glance(*cache.update_and_fetch(x, x))


def _glancing(
    kept: object, q: mx.array, scheme: object, rows: mx.array, length: int, *rest: Any, **more: Any
):
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
    with mock.patch.object(module, "kept_sdpa", _glancing):
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
    parser.add_argument("--step", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--filled", type=int, default=4096)
    arguments = parser.parse_args()
    tokens, step = arguments.tokens, arguments.step
    plain, fused = model(), model()
    patch_model(fused, fuse="all")
    print(f"{tokens:,} tokens, {step:,} at a time; scores {2 * HEADS * step * tokens / 1e6:.1f} MB")
    sdpa = "scaled_dot_product_attention"
    metal, cpu = lambda: mock.patch.object(mx.fast, sdpa, by_tiles), nullcontext
    for name, of, make, ways in (
        ("plain", plain, KVCache, {"by tiles": metal, "MLX's CPU attention": cpu}),
        ("k8v4", fused, CompressedKVCache, {"by tiles": metal, "MLX's CPU attention": cpu}),
        ("k8v4, not patched", plain, CompressedKVCache, {"by tiles": metal}),
        ("mlx-lm, 8 bits", plain, QuantizedKVCache, {"": cpu}),
        (
            "the same, patched",
            fused,
            QuantizedKVCache,
            {"by tiles": metal, "MLX's CPU attention": cpu},
        ),
    ):
        for how, attention in ways.items():
            with attention():
                held, peak = prompt(of, make, tokens, step, arguments.layers)
            sizes = f"cache {held / 1e6:7.1f} MB   peak {peak / 1e6:7.1f} MB"
            print(f"{name:<20} {sizes}   {how}", flush=True)
    print("\n64 tokens more in one layer of 8 KV heads of 128: peak beside the cache")
    for many in (16384, 65536):
        for name, make, scratch in (
            ("plain", KVCache, 0),
            ("k8v4", CompressedKVCache, CompressedKVCache.SCRATCH),
            ("k8v4, all heads", CompressedKVCache, 1 << 40),
        ):
            peak = one_layer(make, many, scratch)
            print(f"{name:<20} {many:>6,} tokens  {peak / 1e6:7.1f} MB", flush=True)
    print(f"\n1,000 tokens more than {arguments.filled:,}, one by one")
    for name, make in (("plain", KVCache), ("k8v4", CompressedKVCache)):
        growth, copies = decode(make, arguments.filled)
        print(f"{name:<20} growth {growth / 1e6:7.1f} MB   copies {copies:.2f}", flush=True)


if __name__ == "__main__":
    main()
