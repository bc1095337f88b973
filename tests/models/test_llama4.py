"""Llama 4 beyond a chunk of the context, which llama.cpp has at 8192 tokens only."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models import llama4
from mlx_lm.models.cache import make_prompt_cache

from mlxfuse.models.families import llama4_model
from tests.fusion.test_batches import alone, decoded

IDS = mx.array([[(7 * i + i * i) % 50 for i in range(21)]])


def model(cls: Any, **changes: int) -> Any:
    """A random model of five layers whose chunks have 8 tokens; queries grow every 4 tokens."""
    mx.random.seed(0)
    args = {
        "attention_bias": False,
        "attention_chunk_size": 8,
        "head_dim": 8,
        "hidden_size": 32,
        "interleave_moe_layer_step": 2,
        "intermediate_size": 32,
        "intermediate_size_mlp": 48,
        "max_position_embeddings": 64,
        "model_type": "llama4",
        "num_attention_heads": 4,
        "num_experts_per_tok": 1,
        "num_hidden_layers": 5,
        "num_key_value_heads": 2,
        "num_local_experts": 4,
        "rms_norm_eps": 1e-6,
        "rope_scaling": None,
        "rope_theta": 1e4,
        "use_qk_norm": True,
        "vocab_size": 50,
        "floor_scale": 4,
        "attn_scale": 2.0,
    }
    made = cls.Model(cls.ModelArgs.from_dict({"model_type": "", "text_config": args | changes}))
    # Weights of a gain at which attention is not uniform.
    parameters = [(n, 3 * v if v.ndim > 1 else v) for n, v in _flat(made)]
    made.load_weights(parameters)
    return made.eval()


def _flat(made: Any) -> list[tuple[str, mx.array]]:
    found: list[tuple[str, mx.array]] = tree_flatten(made.parameters())
    return found


def rows(made: Any, *lengths: int) -> np.ndarray:
    """Logits of `IDS`, so many tokens at a time."""
    cache, start, found = make_prompt_cache(made), 0, []
    for length in lengths:
        found.append(made(IDS[:, start : start + length], cache=cache)[0])
        start += length
    return np.array(mx.concatenate(found))


def apart(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.abs(got - want).max() / np.abs(want).max())


def test_chunks_and_growing_queries_are_mlx_lms() -> None:
    ours, stock = model(llama4_model), model(llama4)
    ours.load_weights(_flat(stock))
    want = np.array(stock(IDS)[0])
    for lengths in ((21,), (6, 7, 8), (10, *[1] * 11)):
        assert apart(rows(ours, *lengths), want) < 1e-5
    assert apart(np.array(ours(IDS)[0]), want) < 1e-5
    for changed in ({"attention_chunk_size": 9}, {"floor_scale": 5}):
        other = model(llama4_model, **changed)
        other.load_weights(_flat(stock))
        assert apart(rows(other, 21), want) > 1e-3


@pytest.mark.parametrize("lengths", [(17, 9), (5, 12)])
def test_a_batch_beyond_a_chunk_is_its_sequences(lengths: tuple[int, int]) -> None:
    ours, random = model(llama4_model), np.random.RandomState(1)
    prompts = [random.randint(0, 50, n + 3) for n in lengths]
    for got, prompt in zip(decoded(ours, prompts), prompts, strict=True):
        assert apart(got, alone(ours, prompt)) < 1e-5
