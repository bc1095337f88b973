"""Latent attention."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.models.case import QKV, YARN, Case, Shape
from tests.models.cases.moe import BIASED, CONTROLS, KEYS, dense_first
from tests.models.changes import edit, set_key, swap

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


def mla(arch: str, keys: dict[str, object], extra: dict[str, Any], **said: Any) -> Case:
    """With experts in all layers but the first."""
    usual: dict[str, Any] = BIASED | {
        "extra": {**BIASED["extra"], **MLA, **extra},
        "ranges": {"exp_probs_b.bias": (0.0, 0.8)},
        "only": dense_first,
        "untied": True,
        "no_rope": True,
        "controls": {**CONTROLS, "rotary-rows-shifted": SHIFT},
    }
    return Case(arch, **usual | said, keys={**MLA_KEYS, **keys})


SOFTMAX: dict[str, Any] = {
    "controls": {
        "no-scale": CONTROLS["no-scale"],
        "rotary-rows-shifted": SHIFT,
        "not-normalised": set_key("expert_weights_norm", False),
    }
}
NO_BIAS: dict[str, None] = {"exp_probs_b.bias": None}
# Many heads of the indexer: with few, ties of its scores make the choice arbitrary.
INDEXED = {
    "attention.indexer.head_count": 16,
    "attention.indexer.key_length": 64,
    "attention.indexer.top_k": 8,
}
INDEXER: dict[str, Any] = {
    "indexer.k_norm": (64,),
    "indexer.k_norm.bias": (64,),
    "indexer.proj": (16, "hidden"),
    "indexer.attn_k": (64, "hidden"),
    "indexer.attn_q_b": (16 * 64, Q_LORA),
}
DEEPSEEK_YARN: dict[str, object] = {
    **YARN,
    "rope.scaling.yarn_log_multiplier": 0.08,
    "expert_group_count": 4,
    "expert_group_used_count": 2,
}


def shared_indexer(case: Case, layer: int, usual: dict[str, Shape]) -> dict[str, Shape]:
    """No indexer in the third layer."""
    found = dense_first(case, layer, usual)
    return {n: s for n, s in found.items() if layer != 2 or not n.startswith("indexer")}


KDA = 32  # of 4 heads


def kimi(case: Case, layer: int, usual: dict[str, Shape]) -> dict[str, Shape]:
    """A delta net in all layers but the second."""
    found, inner = dense_first(case, layer, usual), 4 * KDA
    if layer == 1:
        return found
    found = {n: s for n, s in found.items() if not n.startswith("attn_") or n == "attn_norm"}
    found |= {f"attn_{n}": (inner, case.hidden) for n in "qkv"}
    found |= {f"ssm_conv1d_{n}": (1, inner, 1, 4) for n in "qkv"}
    found |= {f"ssm_{n}_a": (KDA, case.hidden) for n in "fg"}
    found |= {f"ssm_{n}_b": (inner, KDA) for n in "fg"}
    return found | {
        "ssm_beta": (4, case.hidden),
        "ssm_a": (1, 1, 4, 1),
        "ssm_dt.bias": (inner,),
        "ssm_norm": (KDA,),
        "attn_output": (case.hidden, inner),
    }


CASES = {
    "deepseek2": mla("deepseek2", DEEPSEEK_YARN, Q_LATENT),
    # GLM-4.7-Flash's: no groups, no scaling.
    "deepseek2-flash": mla("deepseek2", {}, Q_LATENT),
    # DeepSeek V2 Lite's: a softmax of scores, and no latent queries (llama.cpp: of 26 layers).
    "deepseek2-lite": mla(
        "deepseek2",
        {"expert_gating_func": None, "attention.q_lora_rank": None},
        {**NO_BIAS, "attn_q": (4 * (NOPE + ROPE), "hidden")},
        layers=26,
        **SOFTMAX,
    ),
    "deepseek32": mla(
        "deepseek32",
        {**DEEPSEEK_YARN, **INDEXED, "rope.scaling.yarn_log_multiplier": 0.1},
        {**Q_LATENT, **INDEXER},
    ),
    "glm-dsa": mla("glm-dsa", INDEXED, {**Q_LATENT, **INDEXER}),
    # GLM-5.2's: a layer attends to the tokens that an earlier one has chosen.
    "glm-dsa-shared": mla(
        "glm-dsa",
        {**INDEXED, "attention.indexer.types": [1, 1, 0, 1]},
        {**Q_LATENT, **INDEXER},
        layers=4,
        only=shared_indexer,
    ),
    "kimi-linear": mla(
        "kimi-linear",
        {
            "attention.head_count_kv": [0, 1, 0],
            "attention.q_lora_rank": None,
            "kda.head_dim": KDA,
            "ssm.conv_kernel": 4,
        },
        {"attn_q": (4 * (NOPE + ROPE), "hidden")},
        only=kimi,
        ranges={"exp_probs_b.bias": (0.0, 0.8), "ssm_a": (-2.0, -0.2), "ssm_dt.bias": (-1.5, 1.5)},
        controls={
            **CONTROLS,
            "conv-reversed": edit("ssm_conv1d_k", lambda data: data[..., ::-1].copy()),
            "gates-and-decays": swap("ssm_f_b", "ssm_g_b"),
            "decay-not-exponential": edit("ssm_a", lambda data: -np.exp(data)),
        },
    ),
    "mistral4": mla(
        "mistral4",
        {
            **YARN,
            "rope.scaling.yarn_log_multiplier": 0.1,
            "expert_gating_func": None,
            "attention.temperature_scale": 0.5,
            "attention.temperature_length": 8,
        },
        {**Q_LATENT, **NO_BIAS},
        controls={
            **SOFTMAX["controls"],
            "no-temperature": set_key("attention.temperature_scale", 0.0),
        },
    ),
    # Its experts' gate and up in one tensor, and no scaling.
    "mistral4-fused": mla(
        "mistral4",
        {"expert_gating_func": None},
        {**Q_LATENT, **NO_BIAS},
        fused_gate=True,
        **SOFTMAX,
    ),
}
