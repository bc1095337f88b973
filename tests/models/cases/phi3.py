"""Phi-3."""

from tests.models.case import Q4_MIX, Case

PHI3 = {"rope.scaling.attn_factor": 1.25, "rope.dimension_count": 12}
LONGROPE = {"rope_factors_long": 6, "rope_factors_short": 6}
EXPERT_BIASES = tuple(f"ffn_{name}" for name in ("gate_inp", "gate_exps", "up_exps", "down_exps"))
EXPERT_Q4 = {"": "Q4_0", "attn_v": "Q8_0", "ffn_down_exps": "Q5_0", "token_embd": "Q8_0"}

GEMMA4 = {
    "attention.sliding_window": 6,
    "attention.shared_kv_layers": 0,
    "attention.key_length": 32,
    "attention.value_length": 32,
    "attention.key_length_swa": 16,
    "attention.value_length_swa": 16,
    "embedding_length_per_layer_input": 0,
    "rope.dimension_count": 32,
    "rope.dimension_count_swa": 16,
    "rope.freq_base": 100.0,
    "rope.freq_base_swa": 30.0,
    "final_logit_softcapping": 4.0,
}
LONGROPE = {"rope_factors_long": 6, "rope_factors_short": 6}
EXPERT_BIASES = tuple(f"ffn_{name}" for name in ("gate_inp", "gate_exps", "up_exps", "down_exps"))
EXPERT_Q4 = {"": "Q4_0", "attn_v": "Q8_0", "ffn_down_exps": "Q5_0", "token_embd": "Q8_0"}

GEMMA4 = {
    "attention.sliding_window": 6,
    "attention.shared_kv_layers": 0,
    "attention.key_length": 32,
    "attention.value_length": 32,
    "attention.key_length_swa": 16,
    "attention.value_length_swa": 16,
    "embedding_length_per_layer_input": 0,
    "rope.dimension_count": 32,
    "rope.dimension_count_swa": 16,
    "rope.freq_base": 100.0,
    "rope.freq_base_swa": 30.0,
    "final_logit_softcapping": 4.0,
}

CASES = {
    # llama.cpp takes the long factors when the context exceeds the original one, and ignores
    # phi3's sliding window.
    "phi3": Case(
        "phi3",
        hidden=64,
        fused_qkv=True,
        fused_gate=True,
        untied=True,
        factors=LONGROPE,
        keys={
            **PHI3,
            "rope.scaling.original_context_length": 512,
            "attention.sliding_window": 6,
            "context_length": 1024,
        },
        formats=Q4_MIX,
    ),
    "phi3-long": Case(
        "phi3",
        fused_qkv=True,
        fused_gate=True,
        untied=True,
        factors=LONGROPE,
        keys={**PHI3, "rope.scaling.original_context_length": 8, "context_length": 512},
    ),
    "phi3-separate-qkv": Case("phi3", fused_gate=True, formats={"": "BF16"}),
    "phi3-4k": Case(
        "phi3", fused_qkv=True, fused_gate=True, untied=True, keys={"context_length": 4096}
    ),
}
