"""Mamba's selective state spaces, alone and beside attention."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.models.case import MLP, QKV, Case, Shape, expert_shapes
from tests.models.cases.mamba import CONTROLS, RANGES, mixer, ssm
from tests.models.changes import edit, set_key

INNER, STATE, RANK = 128, 8, 32
KEYS = {
    "ssm.conv_kernel": 4,
    "ssm.inner_size": INNER,
    "ssm.state_size": STATE,
    "ssm.time_step_rank": RANK,
}
# What files of models without attention have.
NOTHING = {
    "attention.head_count": 0,
    "attention.head_count_kv": None,
    "feed_forward_length": 0,
    "rope.freq_base": None,
    "rope.dimension_count": None,
}


def selective(case: Case) -> dict[str, Shape]:
    """A mixer of the first kind."""
    return {
        "ssm_in": (2 * INNER, case.hidden),
        "ssm_conv1d": (INNER, 4),
        "ssm_conv1d.bias": (INNER,),
        "ssm_x": (RANK + 2 * STATE, INNER),
        "ssm_dt": (INNER, RANK),
        "ssm_dt.bias": (INNER,),
        "ssm_a": (INNER, STATE),
        "ssm_d": (INNER,),
        "ssm_out": (case.hidden, INNER),
    }


def mamba(case: Case, i: int, usual: dict[str, Shape]) -> dict[str, Shape]:
    return {"attn_norm": usual["attn_norm"]} | selective(case)


def mamba2(case: Case, i: int, usual: dict[str, Shape]) -> dict[str, Shape]:
    return {"attn_norm": usual["attn_norm"]} | mixer(case)


def jamba(case: Case, i: int, usual: dict[str, Shape]) -> dict[str, Shape]:
    """Attention in the second layer, experts in the first three of four."""
    found = {n: usual[n] for n in ("attn_norm", "ffn_norm")}
    mlp: dict[str, Shape] = dict.fromkeys(MLP, (case.ffn, case.hidden))
    mlp["ffn_down"] = (case.hidden, case.ffn)
    found |= expert_shapes(case) if i < 3 and case.experts else mlp
    if i == 1:
        return found | {n: usual[n] for n in (*QKV, "attn_output")}
    norms: dict[str, Shape] = {"ssm_dt_norm": (RANK,)}
    return found | selective(case) | norms | {"ssm_b_norm": (STATE,), "ssm_c_norm": (STATE,)}


def roll(data: np.ndarray) -> np.ndarray:
    """Time steps, B and C begin elsewhere."""
    return np.roll(data, STATE, 0)


SELECTIVE: dict[str, Any] = {**CONTROLS, "other-order": edit("ssm_x", roll)}
JAMBA: dict[str, Any] = {
    "layers": 4,
    "only": jamba,
    "no_rope": True,
    "ranges": RANGES,
    "keys": {**KEYS, "attention.head_count_kv": [0, 2, 0, 0]},
    "controls": SELECTIVE,
}

CASES = {
    "jamba": Case("jamba", **JAMBA, experts=4, used=2, expert_ffn=96),
    "jamba-dense": Case("jamba", **JAMBA, untied=True),
    "mamba": Case(
        "mamba",
        only=mamba,
        no_rope=True,
        ranges=RANGES,
        keys={**NOTHING, **KEYS},
        controls=SELECTIVE,
    ),
    "mamba-falcon": Case(
        "mamba",
        only=mamba,
        no_rope=True,
        untied=True,
        ranges=RANGES,
        keys={**NOTHING, **KEYS, "ssm.dt_b_c_rms": True},
        controls={"no-norms": set_key("ssm.dt_b_c_rms", False)},
    ),
    "mamba2": Case(
        "mamba2",
        only=mamba2,
        no_rope=True,
        ranges=RANGES,
        keys={**NOTHING, **ssm(2)},
        controls=CONTROLS,
    ),
}
