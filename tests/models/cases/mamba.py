"""Mamba-2 layers beside attention."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.models.case import MLP, QKV, Case, Shape
from tests.models.cases.llama import GRANITE, unset
from tests.models.changes import edit, set_key

INNER, STATE, HEADS = 128, 16, 8
ATTENTION = (*QKV, "attn_output")
RANGES = {"ssm_a": (-2.0, -0.2), "ssm_dt.bias": (-1.5, 1.5)}
CONTROLS = {
    "conv-reversed": edit("ssm_conv1d", lambda data: data[:, ::-1].copy()),
    "no-D": edit("ssm_d", np.zeros_like),
}


def ssm(groups: int) -> dict[str, object]:
    return {
        "ssm.conv_kernel": 4,
        "ssm.inner_size": INNER,
        "ssm.state_size": STATE,
        "ssm.time_step_rank": HEADS,
        "ssm.group_count": groups,
    }


def mixer(case: Case, norm: bool = True) -> dict[str, Shape]:
    keys: dict[str, Any] = {**case.keys}
    groups = keys["ssm.group_count"]
    conv = INNER + 2 * groups * STATE
    made: dict[str, Shape] = {
        "ssm_in": (INNER + conv + HEADS, case.hidden),
        "ssm_conv1d": (conv, 4),
        "ssm_conv1d.bias": (conv,),
        "ssm_dt.bias": (HEADS,),
        "ssm_a": (HEADS, 1),
        "ssm_d": (HEADS, 1),
        "ssm_out": (case.hidden, INNER),
    }
    return made | ({"ssm_norm": (groups, INNER // groups)} if norm else {})


def granite(case: Case, i: int, usual: dict[str, Shape]) -> dict[str, Shape]:
    """Attention in the second layer."""
    if i == 1:
        return usual
    return {n: s for n, s in usual.items() if n not in ATTENTION} | mixer(case)


def nemotron(case: Case, i: int, usual: dict[str, Shape]) -> dict[str, Shape]:
    """A mixer, attention, an MLP or experts, a mixer."""
    norm: dict[str, Shape] = {"attn_norm": usual["attn_norm"]}
    if i in (0, 3):
        return norm | mixer(case)
    if i == 1:
        return norm | {n: usual[n] for n in ATTENTION}
    if not case.experts:
        return norm | {n: usual[n] for n in MLP[1:]}
    keys: dict[str, Any] = {**case.keys}
    width = keys.get("moe_latent_size", case.hidden)
    routed: dict[str, Shape] = {
        "ffn_gate_inp": (case.experts, case.hidden),
        "exp_probs_b.bias": (case.experts,),
        "ffn_up_exps": (case.experts, case.expert_ffn, width),
        "ffn_down_exps": (case.experts, width, case.expert_ffn),
        "ffn_up_shexp": (case.shared_ffn, case.hidden),
        "ffn_down_shexp": (case.hidden, case.shared_ffn),
    }
    if width != case.hidden:
        routed |= {
            "ffn_latent_down": (width, case.hidden),
            "ffn_latent_up": (case.hidden, width),
        }
    return norm | routed


def falcon(case: Case, i: int, usual: dict[str, Shape]) -> dict[str, Shape]:
    """Both in every layer."""
    return usual | mixer(case, norm=False)


NEMOTRON: dict[str, Any] = {
    "layers": 4,
    "layer_norm": True,  # the name of the epsilon's key alone
    "untied": True,
    "only": nemotron,
    "no_rope": True,
    "ranges": {**RANGES, "exp_probs_b.bias": (-0.6, 0.6)},
    "controls": CONTROLS,
}
NEMOTRON_KEYS = {**ssm(2), "attention.head_count_kv": [0, 2, 0, 0]}
NEMOTRON_MOE: dict[str, Any] = {
    **NEMOTRON,
    "experts": 8,
    "used": 3,
    "expert_ffn": 32,
    "shared_ffn": 64,
    "controls": {**CONTROLS, "no-scale": set_key("expert_weights_scale", 1.0)},
}
MOE_KEYS = {
    **NEMOTRON_KEYS,
    "feed_forward_length": [0, 0, 32, 0],
    "expert_gating_func": 2,
    "expert_weights_norm": True,
    "expert_weights_scale": 1.5,
    "expert_shared_count": 1,
}
GRANITE_KEYS = {**GRANITE, **ssm(1), "attention.head_count_kv": [0, 2, 0]}

CASES = {
    "falcon-h1": Case("falcon-h1", only=falcon, ranges=RANGES, keys=ssm(2), controls=CONTROLS),
    "granitehybrid": Case(
        "granitehybrid",
        only=granite,
        ranges=RANGES,
        keys={**GRANITE_KEYS, "rope.scaling.finetuned": False},
        no_rope=True,
        controls=unset(GRANITE) | CONTROLS | {"rope": set_key("rope.scaling.finetuned", True)},
    ),
    "granitehybrid-experts": Case(
        "granitehybrid",
        only=granite,
        ranges=RANGES,
        experts=8,
        used=3,
        ffn=32,
        expert_ffn=32,
        shared_ffn=64,
        extra={"ffn_gate_inp_shexp": None},
        keys=GRANITE_KEYS,
        controls=unset(GRANITE) | CONTROLS,
    ),
    "nemotron_h": Case(
        "nemotron_h",
        **NEMOTRON,
        keys={**NEMOTRON_KEYS, "feed_forward_length": [0, 0, 96, 0]},
    ),
    "nemotron_h_moe": Case("nemotron_h_moe", **NEMOTRON_MOE, keys=MOE_KEYS),
    # Super's: the experts work on a vector of another width.
    "nemotron_h_moe-latent": Case(
        "nemotron_h_moe", **NEMOTRON_MOE, keys={**MOE_KEYS, "moe_latent_size": 32}
    ),
}
