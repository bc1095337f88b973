"""Latent attention."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.models.case import QKV, YARN, Case
from tests.models.cases.moe import BIASED, CONTROLS, KEYS, dense_first
from tests.models.changes import edit

NOPE, ROPE, VALUE, LORA, Q_LORA = 32, 16, 32, 32, 64
MLA: dict[str, Any] = {
    **dict.fromkeys(QKV),
    "attn_kv_a_mqa": (LORA + ROPE, "hidden"),
    "attn_kv_a_norm": (LORA,),
    "attn_k_b": ("heads", LORA, NOPE),
    "attn_v_b": ("heads", VALUE, LORA),
    "attn_output": ("hidden", 4 * VALUE),
}
Q_LATENT: dict[str, Any] = {
    "attn_q_a": (Q_LORA, "hidden"),
    "attn_q_a_norm": (Q_LORA,),
    "attn_q_b": (4 * (NOPE + ROPE), Q_LORA),
}
MLA_KEYS = {
    **KEYS,
    "attention.head_count_kv": 1,
    "attention.key_length": LORA + ROPE,
    "attention.value_length": LORA,
    "attention.key_length_mla": NOPE + ROPE,
    "attention.value_length_mla": VALUE,
    "attention.kv_lora_rank": LORA,
    "attention.q_lora_rank": Q_LORA,
    "attention.layer_norm_rms_epsilon": 1e-6,
    "rope.dimension_count": ROPE,
}
SHIFT = edit(
    "attn_kv_a_mqa", lambda data: np.concatenate([data[:LORA], np.roll(data[LORA:], 1, 0)])
)


def mla(arch: str, keys: dict[str, object], extra: dict[str, Any]) -> Case:
    """With experts in all layers but the first."""
    return Case(
        arch,
        **BIASED
        | {
            "extra": {**BIASED["extra"], **MLA, **extra},
            "ranges": {"exp_probs_b.bias": (0.0, 0.8)},
        },
        only=dense_first,
        untied=True,
        no_rope=True,
        keys={**MLA_KEYS, **keys},
        controls={**CONTROLS, "rotary-rows-shifted": SHIFT},
    )


CASES = {
    "deepseek2": mla(
        "deepseek2",
        {
            **YARN,
            "rope.scaling.yarn_log_multiplier": 0.08,
            "expert_group_count": 4,
            "expert_group_used_count": 2,
        },
        Q_LATENT,
    ),
    # GLM-4.7-Flash's: no groups, no scaling.
    "deepseek2-flash": mla("deepseek2", {}, Q_LATENT),
    # Many heads of the indexer: with few, ties of its scores make the choice arbitrary.
    "glm-dsa": mla(
        "glm-dsa",
        {
            "attention.indexer.head_count": 16,
            "attention.indexer.key_length": 64,
            "attention.indexer.top_k": 8,
        },
        {
            **Q_LATENT,
            "indexer.k_norm": (64,),
            "indexer.k_norm.bias": (64,),
            "indexer.proj": (16, "hidden"),
            "indexer.attn_k": (64, "hidden"),
            "indexer.attn_q_b": (16 * 64, Q_LORA),
        },
    ),
}
