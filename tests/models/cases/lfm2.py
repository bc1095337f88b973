"""LFM2: layers without key-value heads have a short convolution."""

from __future__ import annotations

import numpy as np

from tests.models.case import QKV, Case, Shape
from tests.models.cases.moe import dense_first
from tests.models.changes import edit

OUTSIDE = {"output_norm": None, "token_embd_norm": ("hidden",)}
HEADS = {"attention.head_count_kv": [0, 2, 0], "shortconv.l_cache": 3}


def layer(case: Case, i: int, usual: dict[str, Shape]) -> dict[str, Shape]:
    found = dense_first(case, i, usual) if case.experts else usual
    if i == 1:
        return found
    dropped = (*QKV, "attn_output", "attn_q_norm", "attn_k_norm")
    return {name: shape for name, shape in found.items() if name not in dropped} | {
        "shortconv.in_proj": (3 * case.hidden, case.hidden),
        "shortconv.conv": (case.hidden, 3),
        "shortconv.out_proj": (case.hidden, case.hidden),
    }


CONTROLS = {"conv-reversed": edit("shortconv.conv", lambda data: data[:, ::-1].copy())}

CASES = {
    "lfm2": Case(
        "lfm2",
        head_norms=True,
        outside=OUTSIDE,
        only=layer,
        keys=HEADS,
        formats={"conv": "F32"},
        controls=CONTROLS,
    ),
    "lfm2moe": Case(
        "lfm2moe",
        head_norms=True,
        experts=8,
        used=3,
        expert_ffn=32,
        outside=OUTSIDE,
        only=layer,
        extra={"exp_probs_b.bias": ("experts",)},
        ranges={"exp_probs_b.bias": (-0.6, 0.6)},
        keys={**HEADS, "leading_dense_block_count": 1, "expert_gating_func": 2},
        formats={"conv": "F32"},
        controls={**CONTROLS, "no-bias": edit("exp_probs_b.bias", np.zeros_like)},
    ),
}
