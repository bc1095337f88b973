"""Qwen's models with experts."""

from tests.models.case import EXPERT_Q4, QKV, Case

CASES = {
    # 24 tokens of 3 experts: mlx-lm sorts from 64 rows on.
    "qwen3moe": Case(
        "qwen3moe",
        head_norms=True,
        head_dim=32,
        experts=6,
        used=3,
        expert_ffn=32,
        formats=EXPERT_Q4,
    ),
    "qwen3moe-k-quants": Case(
        "qwen3moe",
        layers=2,
        hidden=256,
        heads=8,
        head_dim=32,
        head_norms=True,
        fused_qkv=True,
        untied=True,
        experts=4,
        used=2,
        expert_ffn=256,
        formats={"": "Q4_K", "ffn_up_exps": "Q6_K", "token_embd": "Q6_K"},
    ),
    "qwen2moe": Case(
        "qwen2moe",
        biases=QKV,
        untied=True,
        experts=6,
        used=3,
        expert_ffn=32,
        shared_ffn=64,
        formats={"": "Q8_0"},
    ),
}
