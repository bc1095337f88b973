"""Muse Glimmer."""

import numpy as np

from tests.models.case import Case
from tests.models.changes import edit, set_key

CASES = {
    "muse-glimmer": Case(
        "muse-glimmer",
        layers=4,
        untied=True,
        head_norms=True,
        post_norms=True,
        extra={"attn_gate": ("q", "hidden")},
        ranges={"attn_q_norm": (6.0, 6.0), "attn_k_norm": (0.5, 0.5)},
        keys={
            "attention.sliding_window": 6,
            "attention.sliding_window_pattern": [True, True, True, False],
            "logit_scale": 2.0,
            "final_logit_softcapping": 4.0,
        },
        controls={
            "no-gate": edit("attn_gate", np.zeros_like),
            "no-logit-scale": set_key("logit_scale", 1.0),
        },
    ),
}
