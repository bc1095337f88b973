"""Attention whose heads differ between layers with a window and those without, and experts."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.models.case import QKV, YARN, Case, Shape
from tests.models.cases.moe import BIASED, CONTROLS, KEYS, dense_first
from tests.models.changes import edit, set_key

SLIDES = [False, True, True, False]
WINDOWS: dict[str, object] = {
    **KEYS,
    "attention.sliding_window": 6,
    "attention.sliding_window_pattern": SLIDES,
    "attention.head_count_kv": [2, 4, 4, 2],
    "attention.key_length": 16,
    "attention.value_length": 16,
}
VALUE = 32  # of MiMo's heads, whose keys have 64


def heads(case: Case, layer: int) -> tuple[int, int]:
    """Of queries, and of keys and values."""
    keys: dict[str, Any] = {"attention.head_count": case.heads, **case.keys}
    found = []
    for name in ("attention.head_count", "attention.head_count_kv"):
        many = keys.get(name, case.kv_heads)
        found.append(many[layer] if isinstance(many, list) else many)
    return found[0], found[1]


def uneven(case: Case, layer: int, usual: dict[str, Shape]) -> dict[str, Shape]:
    found, (many, kv) = dense_first(case, layer, usual), heads(case, layer)
    keys: dict[str, Any] = {**case.keys}
    value = keys.get("attention.value_length", case.head_dim)
    return found | {
        "attn_q": (many * case.head_dim, case.hidden),
        "attn_k": (kv * case.head_dim, case.hidden),
        "attn_v": (kv * value, case.hidden),
        "attn_output": (case.hidden, many * value),
    }


def gated(case: Case, layer: int, usual: dict[str, Shape]) -> dict[str, Shape]:
    """A gate for each head."""
    return uneven(case, layer, usual) | {"attn_gate": (heads(case, layer)[0], case.hidden)}


def mimo(case: Case, layer: int, usual: dict[str, Shape]) -> dict[str, Shape]:
    """No shared expert, and sinks in the layers with a window; queries, keys and values in one
    tensor in the last layer.
    """
    found = {n: s for n, s in uneven(case, layer, usual).items() if not n.endswith("shexp")}
    if SLIDES[layer]:
        found["attn_sinks"] = (case.heads,)
    if layer == 3:
        rows = sum(found.pop(name)[0] for name in QKV)
        found["attn_qkv"] = (rows, case.hidden)
    return found


def case(arch: str, **said: Any) -> Case:
    usual: dict[str, Any] = {
        **BIASED,
        "layers": 4,
        "only": gated,
        "untied": True,
        "head_norms": True,
        "no_rope": True,
    }
    said["keys"] = WINDOWS | said["keys"]
    return Case(arch, **usual | said)


NO_GATE = {"no-gate": edit("attn_gate", np.zeros_like)}

CASES = {
    # The layers that see everything rotate half of a head, by YaRN's rule.
    "laguna": case(
        "laguna",
        keys={
            **YARN,
            "attention.head_count": [4, 8, 8, 4],
            "attention.head_count_kv": 2,
            "rope.dimension_count": 8,
            "rope.dimension_count_swa": 16,
            "rope.freq_base_swa": 300.0,
        },
        controls={**CONTROLS, **NO_GATE, "one-rope-base": set_key("rope.freq_base_swa", 10000.0)},
    ),
    # The first layer of two sees everything, of which no list tells.
    "laguna-period": case(
        "laguna",
        keys={
            "attention.sliding_window_pattern": 2,
            "attention.head_count_kv": 2,
            "rope.dimension_count_swa": 16,
        },
        controls={**CONTROLS, "other-period": set_key("attention.sliding_window_pattern", 3)},
    ),
    "mimo2": case(
        "mimo2",
        only=mimo,
        head_norms=False,
        head_dim=64,
        shared_ffn=0,
        ranges={**BIASED["ranges"], "attn_sinks": (-1.0, 3.0)},
        keys={
            "attention.key_length": 64,
            "attention.value_length": VALUE,
            "attention.value_scale": 0.6,
            "expert_weights_scale": None,
            "rope.dimension_count": 16,
            "rope.freq_base_swa": 300.0,
        },
        controls={
            "no-bias": CONTROLS["no-bias"],
            "no-value-scale": set_key("attention.value_scale", 1.0),
            "one-rope-base": set_key("rope.freq_base_swa", 10000.0),
            "no-sinks": edit("attn_sinks", lambda data: data - 1e4),
        },
    ),
    "step35": case(
        "step35",
        factors={"rope_freqs": 8},
        keys={
            "attention.head_count": [4, 8, 8, 4],
            "rope.freq_base_swa": 300.0,
            "swiglu_clamp_exp": [0.0, 0.0, 0.8, 0.0],
            "swiglu_clamp_shexp": [0.0, 0.0, 0.0, 0.7],
        },
        controls={
            **CONTROLS,
            **NO_GATE,
            "one-rope-base": set_key("rope.freq_base_swa", 10000.0),
            "no-limit": set_key("swiglu_clamp_exp", [0.0] * 4),
            "no-limit-of-the-shared": set_key("swiglu_clamp_shexp", [0.0] * 4),
        },
    ),
}
