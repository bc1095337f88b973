"""GLM-4."""

from tests.models.case import QKV, Case
from tests.models.changes import swap

CASES = {
    "glm4": Case(
        "glm4",
        untied=True,
        biases=QKV,
        fused_gate=True,
        post_norms=True,
        keys={"rope.dimension_count": 8},
        controls={"norms-swapped": swap("post_attention_norm", "ffn_norm")},
    ),
    # With pictures: the rotary rows are in halves, and no biases.
    "glm4-sections": Case(
        "glm4",
        untied=True,
        fused_gate=True,
        post_norms=True,
        keys={"rope.dimension_count": 8, "rope.dimension_sections": [1, 1, 2, 0]},
    ),
}
