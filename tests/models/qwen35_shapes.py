"""Tensors of a tiny Qwen3.5, whose layers have attention or a gated delta net."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.models.tiny import Case

Shape = tuple[int, ...]


def shapes(case: Case, vocabulary: int, mlp: dict[str, Shape]) -> Iterator[tuple[str, Shape]]:
    """Every tensor with its shape, as the case's metadata has them; ``mlp`` is in every layer."""
    keys: dict[str, Any] = {**case.keys}
    hidden, ahead = case.hidden, keys.get("nextn_predict_layers", 0)
    yield "token_embd.weight", (vocabulary, hidden)
    yield "output_norm.weight", (hidden,)
    if case.untied:
        yield "output.weight", (vocabulary, hidden)
    for layer in range(case.layers):
        last = layer >= case.layers - ahead
        recurrent = not last and (layer + 1) % keys["full_attention_interval"]
        found = {"attn_norm": (hidden,), "post_attention_norm": (hidden,), **mlp}
        found |= _delta_net(keys, hidden) if recurrent else _attention(case)
        if last:
            found |= {"nextn.eh_proj": (hidden, 2 * hidden)}
            found |= dict.fromkeys(("nextn.enorm", "nextn.hnorm"), (hidden,))
        for name, shape in found.items():
            whole = name == "ssm_a" or name.endswith(".bias")
            yield f"blk.{layer}.{name}" + ("" if whole else ".weight"), shape


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
