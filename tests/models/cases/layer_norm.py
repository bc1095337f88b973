"""Models whose norms subtract the mean."""

from tests.models.case import QKV, Case
from tests.models.changes import set_key, swap

NORM_BIASES = ("attn_norm", "ffn_norm")
PLAIN = {"ffn_gate": None}  # an MLP without a gate
PARALLEL = {"ffn_norm": None}  # attention and the MLP side by side
OUTPUT_NORM = {"output_norm.bias": ("hidden",)}

CASES = {
    "cohere2": Case(
        "cohere2",
        layers=4,
        layer_norm=True,
        extra=PARALLEL,
        keys={"attention.sliding_window": 6, "logit_scale": 2.0},
        controls={"no-logit-scale": set_key("logit_scale", 1.0)},
    ),
    "command-r": Case(
        "command-r",
        layer_norm=True,
        extra=PARALLEL,
        keys={"logit_scale": 2.0},
        controls={"no-logit-scale": set_key("logit_scale", 1.0)},
    ),
    "nemotron": Case(
        "nemotron",
        layer_norm=True,
        untied=True,
        biases=NORM_BIASES,
        extra=PLAIN,
        outside=OUTPUT_NORM,
        keys={"rope.dimension_count": 8},
    ),
    "phi2": Case(
        "phi2",
        layer_norm=True,
        untied=True,
        kv_heads=4,
        biases=(*QKV, "attn_output", "ffn_up", "ffn_down", "attn_norm"),
        extra=PLAIN | PARALLEL,
        outside={**OUTPUT_NORM, "output.bias": (259,)},
        ranges={"attn_k.bias": (-6.0, 6.0)},
        keys={"rope.dimension_count": 8},
    ),
    "stablelm": Case(
        "stablelm",
        layer_norm=True,
        untied=True,
        biases=(*QKV, *NORM_BIASES),
        outside=OUTPUT_NORM,
        keys={"rope.dimension_count": 4, "use_parallel_residual": False},
        controls={"norms-swapped": swap("attn_norm", "ffn_norm")},
    ),
    "stablelm-parallel": Case(
        "stablelm",
        layer_norm=True,
        untied=True,
        biases=("attn_norm",),
        extra=PARALLEL,
        outside=OUTPUT_NORM,
        keys={"rope.dimension_count": 4, "use_parallel_residual": True},
    ),
    "starcoder2": Case(
        "starcoder2",
        layer_norm=True,
        biases=(*QKV, "attn_output", "ffn_up", "ffn_down", *NORM_BIASES),
        extra=PLAIN,
        outside=OUTPUT_NORM,
    ),
}
