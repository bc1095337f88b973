"""Phi-3 and Phi-4: query, key and value in one tensor, gate and up in another."""

from __future__ import annotations

from ..pieces import NORMS
from ..table import Architecture, Weight

ROWS = (
    Architecture(
        name="phi3",
        models="Phi-3, Phi-3.5, Phi-4",
        module="mlx_lm.models.phi3",
        layer={
            **NORMS,
            "attn_qkv": Weight("self_attn.qkv_proj", ("qkv", "embd")),
            "attn_output": Weight("self_attn.o_proj", ("embd", "q")),
            "ffn_up": Weight("mlp.gate_up_proj", ("gate_up", "embd")),
            "ffn_down": Weight("mlp.down_proj", ("embd", "ff")),
        },
        groups={"qkv": ("attn_qkv",), "gate_up": ("ffn_up",)},
        rope_types=("linear", "longrope"),
        partial_rope=True,
        float16=True,
        fixed_head=True,
    ),
)
