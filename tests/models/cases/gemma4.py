"""Gemma 4, whose layers differ in heads, keys and values, and MLP."""

from __future__ import annotations

from typing import Any

from tests.models.case import EXPERT_Q4, Q4_MIX, VOCABULARY, Case, Shape

GEMMA4 = {
    "attention.sliding_window": 6,
    "attention.shared_kv_layers": 0,
    "attention.key_length": 32,
    "attention.value_length": 32,
    "attention.key_length_swa": 16,
    "attention.value_length_swa": 16,
    "embedding_length_per_layer_input": 0,
    "rope.dimension_count": 32,
    "rope.dimension_count_swa": 16,
    "rope.freq_base": 100.0,
    "rope.freq_base_swa": 30.0,
    "final_logit_softcapping": 4.0,
}


def _layer(case: Case, layer: int, _: dict[str, Shape]) -> dict[str, Shape]:
    """The tensors of one layer, as the case's metadata has them."""
    keys: dict[str, Any] = {**case.keys}
    sliding = keys["attention.sliding_window_pattern"][layer]
    hidden, per_layer = case.hidden, keys["embedding_length_per_layer_input"]

    def each(value: Any) -> int:
        return value[layer] if isinstance(value, list) else value

    head = keys["attention.key_length_swa" if sliding else "attention.key_length"]
    kv = head * each(keys.get("attention.head_count_kv", case.kv_heads))
    ffn = each(keys.get("feed_forward_length", case.ffn))
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
    if layer < case.layers - keys["attention.shared_kv_layers"] or case.unused_kv:
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
    return found


def _case(layers: int, inputs: int = 0, **said: Any) -> Case:
    """A case with what all have alike; `inputs` of each layer's own."""
    per_layer: dict[str, tuple[int | str, ...]] = {
        "per_layer_token_embd": (VOCABULARY, layers * inputs),
        "per_layer_model_proj": (layers * inputs, "hidden"),
        "per_layer_proj_norm": (inputs,),
    }
    said["keys"] = {**GEMMA4, "embedding_length_per_layer_input": inputs, **said["keys"]}
    return Case(
        "gemma4",
        layers=layers,
        only=_layer,
        factors={"rope_freqs": 16},
        unrotated=12,
        outside=per_layer if inputs else {},
        # Gemma 4 has no other factors: it divides the router's by the root of the width, and not
        # the scores by the root of a head's.
        ranges={"ffn_gate_inp.scale": (1.6, 17.6), "attn_q_norm": (0.05, 0.55)},
        **said,
    )


CASES = {
    # The 31B's form.
    "gemma4": _case(
        layers=4,
        k_is_v=True,
        keys={
            "attention.sliding_window_pattern": [True, True, False, True],
            "attention.head_count_kv": [2, 2, 1, 2],
        },
        formats=Q4_MIX,
    ),
    # The E4B's, with the tensors that nothing reads; the E2B's, with MLPs of two widths.
    "gemma4-e4b": _case(
        layers=6,
        inputs=32,
        unused_kv=True,
        keys={
            "attention.shared_kv_layers": 2,
            "attention.sliding_window_pattern": [True, True, True, False, True, False],
        },
        formats={"": "Q8_0"},
    ),
    "gemma4-e2b": _case(
        layers=5,
        inputs=32,
        kv_heads=1,
        keys={
            "attention.shared_kv_layers": 2,
            "attention.sliding_window_pattern": [True, True, False, True, False],
            "feed_forward_length": [64, 64, 64, 128, 128],
        },
    ),
    "gemma4-a4b": _case(
        layers=3,
        k_is_v=True,
        experts=4,
        used=2,
        expert_ffn=32,
        fused_gate=True,
        keys={
            "attention.sliding_window_pattern": [True, True, False],
            "attention.head_count_kv": [2, 2, 1],
        },
        formats={**EXPERT_Q4, "ffn_gate_up_exps": "Q8_0"},
    ),
}
