"""Tensors of a tiny Gemma 4, whose layers differ in heads, keys and values, and MLP."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.models.tiny import Case


def shapes(case: Case, vocabulary: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every tensor with its shape, as the case's metadata has them."""
    keys: dict[str, Any] = {**case.keys}
    slides = keys["attention.sliding_window_pattern"]
    first_shared = case.layers - keys["attention.shared_kv_layers"]
    hidden, per_layer = case.hidden, keys["embedding_length_per_layer_input"]

    def each(value: Any, layer: int) -> int:
        return value[layer] if isinstance(value, list) else value

    yield "token_embd.weight", (vocabulary, hidden)
    yield "output_norm.weight", (hidden,)
    yield "rope_freqs.weight", (keys["attention.key_length"] // 2,)
    if per_layer:
        yield "per_layer_token_embd.weight", (vocabulary, case.layers * per_layer)
        yield "per_layer_model_proj.weight", (case.layers * per_layer, hidden)
        yield "per_layer_proj_norm.weight", (per_layer,)
    for layer, sliding in enumerate(slides):
        head = keys["attention.key_length_swa" if sliding else "attention.key_length"]
        kv = head * each(keys.get("attention.head_count_kv", case.kv_heads), layer)
        ffn = each(keys.get("feed_forward_length", case.ffn), layer)
        found: dict[str, tuple[int, ...]] = {
            "attn_q": (case.heads * head, hidden),
            "attn_q_norm": (head,),
            "attn_output": (hidden, case.heads * head),
            "ffn_gate": (ffn, hidden),
            "ffn_up": (ffn, hidden),
            "ffn_down": (hidden, ffn),
            "layer_output_scale": (1,),
        }
        found |= dict.fromkeys(("attn_norm", "post_attention_norm"), (hidden,))
        found |= dict.fromkeys(("ffn_norm", "post_ffw_norm"), (hidden,))
        if layer < first_shared or case.unused_kv:
            found |= {"attn_k": (kv, hidden), "attn_k_norm": (head,)}
            if sliding or not case.k_is_v:
                found["attn_v"] = (kv, hidden)
        if per_layer:
            found |= {"inp_gate": (per_layer, hidden), "proj": (hidden, per_layer)}
            found["post_norm"] = (hidden,)
        if case.experts:
            norms = ("pre_ffw_norm_2", "post_ffw_norm_1", "post_ffw_norm_2", "ffn_gate_inp.scale")
            found |= dict.fromkeys(norms, (hidden,))
            found |= {
                "ffn_gate_inp": (case.experts, hidden),
                "ffn_gate_up_exps": (case.experts, 2 * case.expert_ffn, hidden),
                "ffn_down_exps": (case.experts, hidden, case.expert_ffn),
                "ffn_down_exps.scale": (case.experts,),
            }
        for name, shape in found.items():
            yield f"blk.{layer}.{name}" + ("" if "." in name else ".weight"), shape
