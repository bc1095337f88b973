"""Qwen3.5, whose layers have attention or a gated delta net."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.models.case import EXPERT_Q4, K_MIX, MLP, Q4_MIX, Case, Shape, expert_shapes
from tests.models.changes import edit

# Heads of 16, of which 8 are rotated; two value heads for each key head.
QWEN35 = {
    "full_attention_interval": 2,
    "rope.dimension_count": 8,
    "rope.dimension_sections": [2, 1, 1, 0],
    "ssm.conv_kernel": 4,
    "ssm.state_size": 16,
    "ssm.group_count": 2,
    "ssm.time_step_rank": 6,
    "ssm.inner_size": 96,
}
# K-quants, whose blocks of 256 hold the columns of several heads.
QWEN35_LARGE = {
    **QWEN35,
    "rope.dimension_count": 32,
    "ssm.state_size": 64,
    "ssm.time_step_rank": 4,
    "ssm.inner_size": 256,
}


def layer(case: Case, i: int, usual: dict[str, Shape]) -> dict[str, Shape]:
    """The tensors of one layer, as the case's metadata has them."""
    keys: dict[str, Any] = {**case.keys}
    hidden = case.hidden
    last = i >= case.layers - keys.get("nextn_predict_layers", 0)
    recurrent = not last and (i + 1) % keys["full_attention_interval"]
    mlp = expert_shapes(case) if case.experts else {name: usual[name] for name in MLP}
    found: dict[str, Shape] = {"attn_norm": (hidden,), "post_attention_norm": (hidden,), **mlp}
    found |= _delta_net(keys, hidden) if recurrent else _attention(case)
    if last:
        found |= {"nextn.eh_proj": (hidden, 2 * hidden)}
        found |= dict.fromkeys(("nextn.enorm", "nextn.hnorm"), (hidden,))
    return found


def _attention(case: Case) -> dict[str, Shape]:
    q, kv, hidden = case.heads * case.head_dim, case.kv_heads * case.head_dim, case.hidden
    found: dict[str, Shape] = {"attn_output": (hidden, q)}
    if case.fused_qkv:
        found["attn_qkv"] = (2 * q + 2 * kv, hidden)
    else:
        found |= {"attn_q": (2 * q, hidden), "attn_k": (kv, hidden), "attn_v": (kv, hidden)}
    return found | dict.fromkeys(("attn_q_norm", "attn_k_norm"), (case.head_dim,))


def _delta_net(keys: dict[str, Any], hidden: int) -> dict[str, Shape]:
    heads, values = keys["ssm.time_step_rank"], keys["ssm.inner_size"]
    conv = values + 2 * keys["ssm.group_count"] * keys["ssm.state_size"]
    return {
        "attn_qkv": (conv, hidden),
        "attn_gate": (values, hidden),
        "ssm_beta": (heads, hidden),
        "ssm_alpha": (heads, hidden),
        "ssm_conv1d": (conv, keys["ssm.conv_kernel"]),
        "ssm_a": (heads,),
        "ssm_dt.bias": (heads,),
        "ssm_norm": (keys["ssm.state_size"],),
        "ssm_out": (hidden, values),
    }


def _case(arch: str, **said: Any) -> Case:
    return Case(arch, only=layer, ranges={"ssm_a": (-2.0, -0.2)}, **said)  # -exp(A_log)


def next_layer(case: Case, i: int, usual: dict[str, Shape]) -> dict[str, Shape]:
    """Qwen3-Next's: two small matrices are one."""
    found = layer(case, i, usual)
    if "ssm_beta" in found:
        heads, hidden = found.pop("ssm_beta")
        del found["ssm_alpha"]
        found["ssm_ba"] = (2 * heads, hidden)
    return found


CASES = {
    "qwen35": _case("qwen35", layers=4, keys=QWEN35, formats={**Q4_MIX, "ssm_alpha": "F32"}),
    "qwen35-k-quants": _case(
        "qwen35",
        layers=5,
        hidden=256,
        head_dim=64,
        ffn=256,
        untied=True,
        fused_qkv=True,
        keys={**QWEN35_LARGE, "nextn_predict_layers": 1},
        formats=K_MIX,
    ),
    "qwen35moe": _case(
        "qwen35moe",
        layers=3,
        experts=6,
        used=3,
        expert_ffn=32,
        shared_ffn=64,
        fused_gate=True,
        keys={**QWEN35, "full_attention_interval": 3},
        formats=EXPERT_Q4,
    ),
    "qwen3next": Case(
        "qwen3next",
        only=next_layer,
        ranges={"ssm_a": (-2.0, -0.2)},
        layers=4,
        untied=True,
        experts=6,
        used=3,
        expert_ffn=32,
        shared_ffn=64,
        keys={**QWEN35, "rope.dimension_sections": None},
        controls={"turns-shifted": edit("ssm_ba", lambda data: np.roll(data, 3, 0))},
    ),
}
