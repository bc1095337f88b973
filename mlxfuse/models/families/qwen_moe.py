"""Qwen's models with experts and attention in every layer."""

from __future__ import annotations

from ..pieces import EXPERT_GROUPS, NORMS, QK_NORMS, SHARED, SHARED_EXPERT, attention, experts
from ..table import Architecture

_EXPERTS = experts("mlp.gate", "mlp.switch_mlp")

ROWS = (
    Architecture(
        name="qwen2moe",
        models="Qwen1.5-MoE, Qwen2-57B-A14B",
        module="mlx_lm.models.qwen2_moe",
        layer=NORMS | attention("optional") | _EXPERTS | SHARED_EXPERT,
        groups=EXPERT_GROUPS | SHARED,
        fixed_head=True,
        may_tie=False,
    ),
    # Both projects normalise the weights of a token's experts in every qwen3moe and in no
    # qwen2moe; llama.cpp reads no key for it.
    Architecture(
        name="qwen3moe",
        models="Qwen3-30B-A3B, Qwen3-235B-A22B, Qwen3-Coder",
        module="mlx_lm.models.qwen3_moe",
        layer=NORMS | attention() | QK_NORMS | _EXPERTS,
        groups=EXPERT_GROUPS,
        args={"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": ()},
        float16=True,
    ),
    # For text alone the three axes of positions are equal: the rotation is qwen3moe's.
    Architecture(
        name="qwen3vlmoe",
        models="the text of Qwen3-VL-30B-A3B and 235B-A22B",
        module="mlx_lm.models.qwen3_moe",
        layer=NORMS | attention() | QK_NORMS | _EXPERTS,
        groups=EXPERT_GROUPS,
        args={"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": ()},
    ),
)
