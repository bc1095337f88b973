"""OLMo and EXAONE 4."""

from tests.models.case import YARN, Case
from tests.models.changes import set_key

NO_NORMS_BEFORE = {"attn_norm": None, "ffn_norm": None}

CASES = {
    "olmo2": Case("olmo2", untied=True, wide_norms=True, post_norms=True, extra=NO_NORMS_BEFORE),
    # OLMo 3: windows in three of four layers, whose rotation is not scaled.
    "olmo3": Case(
        "olmo2",
        layers=4,
        untied=True,
        wide_norms=True,
        post_norms=True,
        extra=NO_NORMS_BEFORE,
        keys={**YARN, "rope.scaling.factor": 16.0, "attention.sliding_window": 6},
    ),
    "exaone4": Case(
        "exaone4",
        head_norms=True,
        post_norms=True,
        extra=NO_NORMS_BEFORE,
        factors={"rope_freqs": 8},
    ),
    # 64 layers are how llama.cpp knows the 32B, which has windows.
    "exaone4-32b": Case(
        "exaone4",
        layers=64,
        hidden=32,
        heads=2,
        kv_heads=1,
        ffn=32,
        untied=True,
        head_norms=True,
        post_norms=True,
        extra=NO_NORMS_BEFORE,
        keys={"attention.sliding_window": 6},
        formats={"": "F32"},
        controls={"all-slide": set_key("attention.sliding_window", 1)},
    ),
}
