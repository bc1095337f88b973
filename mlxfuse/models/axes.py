"""Along which axis each size of a model lies, of those that several machines can share."""

from __future__ import annotations

from collections.abc import Mapping

Sizes = Mapping[str, int]

UNITS = {
    # Key-value heads, with the query heads that read them.
    **dict.fromkeys(("q", "whole_q", "kv", "v", "o", "heads"), "kv_heads"),
    # A delta net's key heads, with their value heads.
    **dict.fromkeys(("keys", "values", "tiled_values", "value_heads"), "key_heads"),
    # A Mamba-2 mixer's groups of heads.
    **dict.fromkeys(("ssm_inner", "ssm_bc", "ssm_heads"), "ssm_groups"),
    # Single channels, and tokens.
    **{name: name for name in ("ff", "expert_ff", "shared_ff", "channels", "vocab")},
}
"""Size -> the size that counts the units of its axis; a model that lacks that does not split it."""

TOGETHER = {
    "qkv": ("q", "kv", "kv"),
    "gate_up": ("ff", "ff"),
    "shared_rows": ("shared_ff", "shared_ff"),
    "conv": ("keys", "keys", "values"),
    "ssm_in": ("ssm_inner", "ssm_inner", "ssm_bc", "ssm_bc", "ssm_heads"),
    "ssm_conv": ("ssm_inner", "ssm_bc", "ssm_bc"),
    "conv_in": ("channels", "channels", "channels"),
}
"""Sizes that are others one after the other."""

WHOLE = {
    "kv_heads": "attention (key/value heads)",
    "key_heads": "the delta net (key heads)",
    "ssm_groups": "the mixer (groups of heads)",
    "ff": "the MLP (its width)",
    "channels": "the convolution (its channels)",
    "vocab": "the vocabulary",
}
"""What is not split if an axis cannot be."""

HEADS = ("n_heads", "num_heads", "num_attention_heads")
KV_HEADS = ("n_kv_heads", "num_kv_heads", "num_key_value_heads")
"""What mlx-lm's attentions call their counts of heads."""


def tiles(name: str, sizes: Sizes) -> int:
    """In how many runs the rows or columns of consecutive units lie.

    Value heads that are tiled over the key heads: those of a key head are not neighbours.
    """
    return sizes["value_heads"] // sizes["key_heads"] if name == "tiled_values" else 1


def counts(axis: str, sizes: Sizes, units: int) -> dict[str, int]:
    """What a module of mlx-lm counts when it has so many units: attribute -> number.

    A module may lack some of the attributes; a path is that of a child's.
    """

    def own(size: str) -> int:
        return sizes[size] * units // sizes[axis]

    if axis == "kv_heads":
        return dict.fromkeys(HEADS, own("heads")) | dict.fromkeys(KV_HEADS, units)
    if axis == "key_heads":
        return {
            "num_k_heads": units,
            "num_v_heads": own("value_heads"),
            "key_dim": own("keys"),
            "value_dim": own("values"),
            "conv_dim": 2 * own("keys") + own("values"),
            "norm.key_heads": units,
        }
    if axis == "ssm_groups":
        return {
            "n_groups": units,
            "num_heads": own("ssm_heads"),
            "intermediate_size": own("ssm_inner"),
            "conv_dim": own("ssm_inner") + 2 * own("ssm_bc"),
        }
    return {"args.hidden_size": units} if axis == "channels" else {}
