"""Llama 4, whose files have experts in every layer (Scout) or in every second (Maverick)."""

from __future__ import annotations

from typing import Any

from tests.models.case import Case, Shape


def layer(case: Case, i: int, usual: dict[str, Shape]) -> dict[str, Shape]:
    """Experts in the last of ``interleave_moe_layer_step`` layers, beside a shared one."""
    keys: dict[str, Any] = {**case.keys}
    if (i + 1) % keys["interleave_moe_layer_step"] == 0:
        return usual
    mlp = {"ffn_gate": (case.ffn, case.hidden), "ffn_up": (case.ffn, case.hidden)}
    mlp["ffn_down"] = (case.hidden, case.ffn)
    return {n: s for n, s in usual.items() if "exp" not in n and n != "ffn_gate_inp"} | mlp


EXPERTS: dict[str, Any] = {
    "layers": 5,
    "only": layer,
    "untied": True,
    "used": 1,
    "expert_ffn": 64,
    "shared_ffn": 64,
    "extra": {"ffn_gate_inp_shexp": None},
}

CASES = {
    "llama4": Case(
        "llama4",
        **EXPERTS,
        experts=16,
        factors={"rope_freqs": 8},
        keys={"interleave_moe_layer_step": 1, "expert_shared_feed_forward_length": None},
    ),
    # Of 128 experts, which tells llama.cpp that queries and keys are not normalised.
    "llama4-maverick": Case(
        "llama4",
        **EXPERTS | {"expert_ffn": 32, "shared_ffn": 32},
        experts=128,
        keys={"interleave_moe_layer_step": 2},
    ),
}
