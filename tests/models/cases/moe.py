"""Models with experts, in all layers or in all but the first."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.models.case import MLP, QKV, YARN, Case, Shape
from tests.models.cases.llama import GRANITE, unset
from tests.models.changes import edit, set_key

EXPERTS: dict[str, Any] = {"experts": 8, "used": 3, "expert_ffn": 32}
# A dense layer, then experts whose choice has a bias, beside one that all tokens use.
BIASED: dict[str, Any] = {
    **EXPERTS,
    "shared_ffn": 64,
    "extra": {"exp_probs_b.bias": ("experts",), "ffn_gate_inp_shexp": None},
    "ranges": {"exp_probs_b.bias": (-0.6, 0.6)},
}
KEYS: dict[str, object] = {
    "expert_shared_count": 2,
    "expert_gating_func": 2,
    "expert_weights_norm": True,
    "expert_weights_scale": 1.5,
    "leading_dense_block_count": 1,
}
CONTROLS = {
    "no-bias": edit("exp_probs_b.bias", np.zeros_like),
    "no-scale": set_key("expert_weights_scale", 1.0),
}


def dense_first(case: Case, layer: int, usual: dict[str, Shape]) -> dict[str, Shape]:
    """An MLP in the first layer, and no experts."""
    if layer:
        return usual
    mlp = {"ffn_gate": (case.ffn, case.hidden), "ffn_up": (case.ffn, case.hidden)}
    mlp["ffn_down"] = (case.hidden, case.ffn)
    assert set(mlp) == set(MLP)
    return {n: s for n, s in usual.items() if "exp" not in n and n != "ffn_gate_inp"} | mlp


def dense_first_and_ahead(case: Case, layer: int, usual: dict[str, Shape]) -> dict[str, Shape]:
    """The same, and a last block that predicts the token after the next."""
    found, hidden = dense_first(case, layer, usual), case.hidden
    if layer == case.layers - 1:
        found["nextn.eh_proj"] = (hidden, 2 * hidden)
        found |= dict.fromkeys(("nextn.enorm", "nextn.hnorm"), (hidden,))
    return found


def biased(arch: str, **said: Any) -> Case:
    said = {"only": dense_first, "controls": CONTROLS, **BIASED, **said}
    said["keys"] = KEYS | said.get("keys", {})
    for name in ("extra", "ranges"):
        said[name] = BIASED[name] | said[name]
    return Case(arch, **said)


WINDOWS = {"attention.sliding_window": 6}

WHOLE: dict[str, Any] = {**EXPERTS, "ffn": 32, "untied": True}

CASES = {
    "afmoe": biased(
        "afmoe",
        layers=5,
        untied=True,
        head_norms=True,
        post_norms=True,
        extra={"attn_gate": ("q", "hidden")},
        keys=WINDOWS,
        controls={**CONTROLS, "no-gate": edit("attn_gate", np.zeros_like)},
    ),
    "bailingmoe2": biased(
        "bailingmoe2",
        untied=True,
        fused_qkv=True,
        head_norms=True,
        keys={
            "rope.dimension_count": 8,
            "expert_shared_feed_forward_length": 32,
            "expert_group_count": 4,
            "expert_group_used_count": 2,
        },
        # mlx-lm gives the experts of the other groups a score of 0, llama.cpp none at all.
        ranges={"exp_probs_b.bias": (0.0, 0.8)},
        controls={**CONTROLS, "no-groups": set_key("expert_group_used_count", 4)},
    ),
    "dots1": biased("dots1", untied=True, kv_heads=4, head_norms=True),
    "ernie4_5-moe": biased(
        "ernie4_5-moe",
        ranges={"exp_probs_b.bias": (-0.2, 0.2)},
        keys={"expert_shared_feed_forward_length": 64, "interleave_moe_layer_step": 1},
        controls={"no-bias": CONTROLS["no-bias"]},
    ),
    "exaone-moe": biased("exaone-moe", layers=5, untied=True, head_norms=True, keys=WINDOWS),
    "glm4moe": biased(
        "glm4moe",
        untied=True,
        biases=QKV,
        head_norms=True,
        post_attention_norm=True,
        keys={"rope.dimension_count": 8},
    ),
    # GLM-4.5-Air: no norms of q and k; its last block predicts the token after the next.
    "glm4moe-air": biased(
        "glm4moe",
        untied=True,
        biases=QKV,
        post_attention_norm=True,
        layers=4,
        only=dense_first_and_ahead,
        keys={"rope.dimension_count": 8, "nextn_predict_layers": 1},
    ),
    "granitemoe": Case("granitemoe", **WHOLE, keys=GRANITE, controls=unset(GRANITE)),
    "hunyuan-moe": Case(
        "hunyuan-moe",
        **{**WHOLE, "untied": False},
        shared_ffn=64,
        head_norms=True,
        extra={"ffn_gate_inp_shexp": None},
    ),
    "llama-experts": Case("llama", **WHOLE),
    "mellum": Case(
        "mellum",
        **EXPERTS,
        layers=5,
        untied=True,
        head_norms=True,
        keys={**YARN, **WINDOWS},
    ),
    "minimax-m2": Case(
        "minimax-m2",
        **WHOLE,
        wide_norms=True,
        extra={"exp_probs_b.bias": ("experts",)},
        ranges={"exp_probs_b.bias": (-0.6, 0.6)},
        keys={"rope.dimension_count": 8, "expert_gating_func": 2},
        controls={"no-bias": CONTROLS["no-bias"]},
    ),
    "olmoe": Case(
        "olmoe",
        **WHOLE,
        kv_heads=4,
        wide_norms=True,
    ),
    "qwen3vlmoe": Case(
        "qwen3vlmoe",
        **EXPERTS,
        untied=True,
        head_norms=True,
        keys={"rope.dimension_sections": [3, 3, 2, 0]},
    ),
}
