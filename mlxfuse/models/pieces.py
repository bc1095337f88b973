"""Tables of tensors that many architectures have alike, under mlx-lm's usual names."""

from __future__ import annotations

from .table import Weight

NORMS = {
    "attn_norm": Weight("input_layernorm", ("embd",)),
    "ffn_norm": Weight("post_attention_layernorm", ("embd",)),
}
"""Before attention and before the MLP."""

POST_ATTENTION_NORMS = {
    "attn_norm": NORMS["attn_norm"],
    "post_attention_norm": Weight("post_attention_layernorm", ("embd",)),
}
"""The same under another name of llama.cpp's: its norm after attention is that before the MLP."""

QK_NORMS = {
    "attn_q_norm": Weight("self_attn.q_norm", ("head",)),
    "attn_k_norm": Weight("self_attn.k_norm", ("head",)),
}
WIDE_QK_NORMS = {
    "attn_q_norm": Weight("self_attn.q_norm", ("q",)),
    "attn_k_norm": Weight("self_attn.k_norm", ("kv",)),
}
"""Over all heads together."""

QKV: dict[str, tuple[str, ...]] = {"qkv": ("attn_q", "attn_k", "attn_v")}
GROUPS = QKV | {"gate_up": ("ffn_gate", "ffn_up")}
SHARED = {"shared_gate_up": ("ffn_gate_shexp", "ffn_up_shexp")}
EXPERT_GROUPS = QKV | {"gate_up": ("ffn_gate_exps", "ffn_up_exps")}


def attention(bias: str = "no", output_bias: str = "no") -> dict[str, Weight]:
    """Queries, keys, values and the output projection; see `Weight.bias`."""
    return {
        "attn_q": Weight("self_attn.q_proj", ("q", "embd"), bias, "heads"),
        "attn_k": Weight("self_attn.k_proj", ("kv", "embd"), bias, "kv_heads"),
        "attn_v": Weight("self_attn.v_proj", ("v", "embd"), bias),
        "attn_output": Weight("self_attn.o_proj", ("embd", "o"), output_bias),
    }


def mlp(bias: str = "no", at: str = "mlp") -> dict[str, Weight]:
    """A gated MLP at a path below a layer; see `Weight.bias`."""
    return {
        "ffn_gate": Weight(f"{at}.gate_proj", ("ff", "embd"), bias),
        "ffn_up": Weight(f"{at}.up_proj", ("ff", "embd"), bias),
        "ffn_down": Weight(f"{at}.down_proj", ("embd", "ff"), bias),
    }


def shared_expert(at: str) -> dict[str, Weight]:
    """An expert that every token uses, at a path below a layer."""
    return {
        "ffn_gate_shexp": Weight(f"{at}.gate_proj", ("shared_ff", "embd")),
        "ffn_up_shexp": Weight(f"{at}.up_proj", ("shared_ff", "embd")),
        "ffn_down_shexp": Weight(f"{at}.down_proj", ("embd", "shared_ff")),
    }


SHARED_EXPERT = {
    "ffn_gate_inp_shexp": Weight("mlp.shared_expert_gate", ("one", "embd")),
    **shared_expert("mlp.shared_expert"),
}
"""Beside the chosen experts, with a gate of its own."""


def experts(router: str, switch: str, bias: str = "no") -> dict[str, Weight]:
    """Experts behind the paths of mlx-lm's router and of its stacked matrices, below a layer."""
    up, down = ("experts", "expert_ff", "embd"), ("experts", "embd", "expert_ff")
    return {
        "ffn_gate_inp": Weight(router, ("experts", "embd"), bias),
        "ffn_gate_exps": Weight(f"{switch}.gate_proj", up, bias),
        "ffn_up_exps": Weight(f"{switch}.up_proj", up, bias),
        "ffn_down_exps": Weight(f"{switch}.down_proj", down, bias),
    }


def biased_experts(
    router: Weight, bias: str, switch: str, shared: str = "mlp.shared_experts"
) -> dict[str, Weight]:
    """Experts that are chosen by scores with a bias, beside others that every token uses.

    Args:
        router: of the scores.
        bias: path of the array that is added to them for the choice alone.
        switch, shared: paths of the stacked matrices, and of the other experts'.
    """
    return {
        **experts(router.module, switch),
        "ffn_gate_inp": router,
        "exp_probs_b": Weight(
            bias, ("experts",), bare=True, float32=True, suffix=".bias", zero=True
        ),
        **shared_expert(shared),
    }


BARE_ROUTER = Weight("mlp.gate.weight", ("experts", "embd"), bare=True)
"""An array of mlx-lm's, which is no linear."""
