"""Gemma 2 and 3."""

from tests.models.case import Q4_MIX, Case

# Caps and rope bases are smaller than in released models, so that 24 tokens of random weights
# feel them.
GEMMA2 = {
    "attention.sliding_window": 6,
    "attn_logit_softcapping": 4.0,
    "final_logit_softcapping": 4.0,
}
GEMMA3 = {"attention.sliding_window": 6, "rope.freq_base": 100.0}

CASES = {
    "gemma": Case("gemma", hidden=96, head_dim=32),
    "gemma2": Case(
        "gemma2",
        layers=4,
        hidden=96,
        head_dim=32,
        post_norms=True,
        keys=GEMMA2,
        formats=Q4_MIX,
    ),
    "gemma2-pattern": Case(
        "gemma2",
        layers=4,
        post_norms=True,
        keys={**GEMMA2, "attention.sliding_window_pattern": 3},
    ),
    # 46 and 62 layers are how llama.cpp knows the 27B models, whose query scale differs.
    "gemma2-27b": Case(
        "gemma2",
        formats={"": "F32"},
        layers=46,
        hidden=48,
        heads=2,
        kv_heads=1,
        ffn=32,
        post_norms=True,
        keys=GEMMA2,
    ),
    # No pattern key, as in released files: five sliding layers to one global.
    "gemma3": Case(
        "gemma3",
        layers=7,
        hidden=96,
        head_dim=32,
        head_norms=True,
        post_norms=True,
        keys=GEMMA3,
        formats={"": "Q8_0"},
    ),
    "gemma3-rope-linear": Case(
        "gemma3",
        layers=5,
        hidden=96,
        head_norms=True,
        post_norms=True,
        keys={
            **GEMMA3,
            "attention.sliding_window_pattern": [True, True, False, True, True],
            "rope.freq_base_swa": 30.0,
            "rope.scaling.type": "linear",
            "rope.scaling.factor": 8.0,
        },
    ),
    "gemma3-27b": Case(
        "gemma3",
        formats={"": "F32"},
        layers=62,
        hidden=48,
        heads=2,
        kv_heads=1,
        ffn=32,
        head_norms=True,
        post_norms=True,
        keys=GEMMA3,
    ),
}
