"""mlx-lm's own quantised caches in patched models: ``mlx_lm.generate --kv-bits``."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.generate import generate_step
from mlx_lm.models.base import create_attention_mask
from mlx_lm.models.cache import QuantizedKVCache

from mlxfuse.fusion import patch_model
from mlxfuse.kernels import fallbacks, launches
from mlxfuse.kernels.kv.sdpa_call import Scores
from mlxfuse.nn.kv import quantized
from mlxfuse.nn.kv.cache import CompressedKVCache
from mlxfuse.nn.kv.quantized import attend
from mlxfuse.nn.sdpa import sdpa
from tests import msl
from tests.bench import bench_kv_memory
from tests.fusion.configs import build

HEADS, KV_HEADS, DIM = 6, 2, 64
PROMPT = mx.array([7 * i % 61 for i in range(45)])


def model() -> Any:
    heads = {"num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": DIM}
    return build("llama", num_hidden_layers=2, tie_word_embeddings=False, **heads)


def generated(of: Any, bits: int, group: int, start: int) -> list[int]:
    """Tokens, by mlx-lm's loop: a prompt of three pieces, then one by one."""
    steps = generate_step(
        PROMPT,
        of,
        max_tokens=10,
        prefill_step_size=20,
        kv_bits=bits,
        kv_group_size=group,
        quantized_kv_start=start,
    )
    return [int(token) for token, _ in steps]


@pytest.mark.parametrize(("bits", "group", "start"), [(8, 64, 0), (4, 32, 0), (3, 64, 48)])
def test_mlx_lm_generates_the_same_tokens(
    bits: int, group: int, start: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    want = generated(model(), bits, group, start)
    assert want != generated(model(), 2, 32, 0)  # control: bits are seen in the tokens
    patched = model()
    patch_model(patched, fuse="all")
    assert generated(patched, bits, group, start) == want
    monkeypatch.setenv("MLXFUSE_KERNELS", "emulated")
    launches.clear()
    fallbacks.clear()
    with msl.installed(build="fast", lint=False):
        assert generated(patched, bits, group, start) == want
    # Each token after the prompt, in both layers; one waits while the cache is still plain.
    assert launches["compressed_sdpa"] >= 2 * (9 if start == 0 else 6)
    assert not [op for op, _ in fallbacks if op == "compressed_sdpa"]


@pytest.mark.parametrize("form", ["causal", "rows", "none"])
@pytest.mark.parametrize("length", [3, 20])
def test_attend_is_attention_over_what_is_held(
    length: int, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some heads after others, where there are many queries."""
    monkeypatch.setattr(CompressedKVCache, "SCRATCH", 1)
    rng = np.random.default_rng(length)
    cache, held = QuantizedKVCache(32, 6), 30

    def drawn(heads: int, tokens: int) -> mx.array:
        return mx.array(rng.standard_normal((2, heads, tokens, DIM), np.float32))

    cache.update_and_fetch(drawn(KV_HEADS, held), drawn(KV_HEADS, held))
    mask: Any = {"causal": "causal", "none": None}.get(form, form)
    if form == "rows":
        mask = create_attention_mask(mx.zeros((2, length, 1)), cache, 9, return_array=True)
    queries, keys, values = drawn(HEADS, length), drawn(KV_HEADS, length), drawn(KV_HEADS, length)
    sinks = mx.array(rng.standard_normal(HEADS, np.float32))
    scores = Scores.of(mask, 0.3, 2.0, sinks)
    turns = []
    inner = quantized.heads_in_turn

    def counted(queries: mx.array, heads: int, each: int, *rest: Any) -> mx.array:
        turns.append(each)
        return inner(queries, heads, each, *rest)

    monkeypatch.setattr(quantized, "heads_in_turn", counted)
    got = attend(queries, keys, values, cache, scores)
    assert turns == [1]
    assert cache.offset == held + length
    k, v = (
        mx.dequantize(*x, group_size=32, bits=6)[:, :, : cache.offset]
        for x in (cache.keys, cache.values)
    )
    want = sdpa(queries, k, v, scale=0.3, mask=mask, softcap=2.0, sinks=sinks)
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-5)


def test_a_prompt_takes_less_memory_than_mlx_lms(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one layer: mlx-lm writes down scores [heads, prompt, tokens], its issue 1587."""
    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", bench_kv_memory.by_tiles)
    monkeypatch.setattr(bench_kv_memory, "TILE", 16)
    one = {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": DIM}
    stock, patched = (build("llama", num_hidden_layers=1, **one) for _ in range(2))
    patch_model(patched, fuse="all")
    x = mx.random.normal((1, 512, stock.args.hidden_size))

    def peak(of: Any) -> int:
        cache = bench_kv_memory.fill(QuantizedKVCache(64, 8), 3584, 512, 1, DIM)
        mx.eval(x, of.parameters())
        return bench_kv_memory.peak_of(lambda: of.layers[0].self_attn(x, "causal", cache))

    assert peak(patched) < 0.75 * peak(stock)
