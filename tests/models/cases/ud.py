"""Files that mix many types, as Unsloth's dynamic ones: in q, k and v, gate and up, experts."""

from tests.models.case import MLP, QKV, Case

_LAYERS = {
    "blk.0.attn_q": "IQ2_XXS",
    "blk.0.attn_k": "IQ3_XXS",
    "blk.0.attn_v": "Q4_K",
    "blk.1.attn_q": "IQ2_S",
    "blk.1.attn_k": "F16",
    "blk.1.attn_v": "IQ1_S",
    "blk.2.attn_q": "IQ3_S",
    "blk.2.attn_k": "IQ2_XS",
    "blk.2.attn_v": "BF16",
    "attn_output": "IQ3_XXS",
    "blk.1.attn_output": "Q6_K",
}

CASES = {
    "llama-ud": Case(
        "llama",
        hidden=256,
        heads=8,
        head_dim=32,
        ffn=256,
        formats={
            **_LAYERS,
            "": "Q3_K",
            "blk.0.ffn_gate": "IQ1_M",
            "blk.0.ffn_up": "IQ2_XXS",
            "blk.1.ffn_gate": "IQ3_XXS",
            "blk.1.ffn_up": "F32",
            "blk.2.ffn_gate": "TQ2_0",
            "blk.2.ffn_up": "IQ4_XS",
            "blk.0.ffn_down": "Q2_K",
            "blk.1.ffn_down": "IQ4_NL",
            "token_embd": "IQ3_S",
        },
    ),
    "qwen3moe-ud": Case(
        "qwen3moe",
        hidden=256,
        heads=8,
        head_dim=32,
        head_norms=True,
        untied=True,
        experts=4,
        used=2,
        expert_ffn=256,
        formats={
            **_LAYERS,
            "": "IQ2_XS",
            "blk.0.ffn_gate_exps": "IQ2_XXS",
            "blk.0.ffn_up_exps": "IQ3_S",
            "blk.1.ffn_gate_exps": "IQ1_M",
            "blk.1.ffn_up_exps": "F16",
            "blk.1.ffn_down_exps": "IQ2_S",
            "blk.2.ffn_down_exps": "NVFP4",
            "token_embd": "IQ2_S",
            "output": "Q6_K",
        },
    ),
    # As converted from NVFP4 checkpoints: a scale beside each matrix, of experts for each.
    "llama-scales": Case(
        "llama",
        layers=2,
        ffn=128,
        untied=True,
        formats={"": "NVFP4", "token_embd": "Q8_0", "blk.1.attn_v": "Q4_0"},
        extra={
            **{f"{name}.scale": (1,) for name in (*QKV, "attn_output", *MLP)},
            "attn_q.input_scale": (1,),
        },
    ),
    "qwen3moe-scales": Case(
        "qwen3moe",
        layers=2,
        head_norms=True,
        untied=True,
        experts=4,
        used=2,
        expert_ffn=64,
        formats={"": "NVFP4", "token_embd": "Q8_0", "blk.1.ffn_up_exps": "Q4_0"},
        extra={f"{name}_exps.scale": ("experts",) for name in MLP},
    ),
}
