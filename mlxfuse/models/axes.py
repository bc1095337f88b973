"""Along which axis each size of a model lies, of those that several machines can share."""

from __future__ import annotations

import math
from collections.abc import Mapping

Sizes = Mapping[str, int]

UNITS = {
    # Key-value heads, with the query heads that read them.
    **dict.fromkeys(("q", "whole_q", "kv", "v", "o", "heads"), "kv_heads"),
    # A delta net's key heads, with their value heads.
    **dict.fromkeys(("keys", "values", "tiled_values", "value_heads"), "key_heads"),
    # A Mamba-2 mixer's heads.
    **dict.fromkeys(("ssm_inner", "ssm_width", "ssm_bc", "ssm_heads"), "ssm_heads"),
    # Single channels, and tokens.
    **{name: name for name in ("ff", "expert_ff", "shared_ff", "channels", "vocab")},
    "ssm_channels": "ssm_channels",
}
"""Size -> the size that counts the units of its axis; a model that lacks that does not split it."""

TOGETHER = {
    "qkv": ("q", "kv", "kv"),
    "gate_up": ("ff", "ff"),
    "shared_rows": ("shared_ff", "shared_ff"),
    "conv": ("keys", "keys", "values"),
    "ssm_in": ("ssm_inner", "ssm_inner", "ssm_bc", "ssm_bc", "ssm_heads"),
    "ssm_conv": ("ssm_inner", "ssm_bc", "ssm_bc"),
    "ssm_xz": ("ssm_channels", "ssm_channels"),
    "conv_in": ("channels", "channels", "channels"),
}
"""Sizes that are others one after the other."""

WHOLE = {
    "kv_heads": "attention (key/value heads)",
    "key_heads": "the delta net (key heads)",
    "ssm_heads": "the mixer (heads)",
    "ssm_channels": "the mixer (channels)",
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


def per_unit(name: str, sizes: Sizes, first: int, end: int) -> tuple[int, int, int]:
    """Of a size's rows or columns, in each of its runs, those of consecutive units of its axis.

    ``B`` and ``C`` of a Mamba-2 mixer are those of a group of heads: who has one of these heads
    has all of them.

    Args:
        first, end: the units ``[first, end)``.

    Returns:
        The first one and the end, and how many there are in a run.
    """
    units, run = sizes[UNITS[name]], sizes[name] // tiles(name, sizes)
    if name == "ssm_bc":
        groups = sizes["ssm_groups"]
        first, end, units = first * groups // units, -(-end * groups // units), groups
    return first * (run // units), end * (run // units), run


def together(units: int, groups: int, step: int, ranks: int) -> int:
    """How many heads of a Mamba-2 mixer stay together, where ``step`` of them have to.

    Each rank's heads are whole groups, or as many of one group as others have: mlx-lm's mixers read
    the same ``B`` and ``C`` with equal numbers of heads.
    """
    even = ranks % groups == 0 and units % (step * ranks) == 0
    return step if groups == 1 or even else math.lcm(step, units // groups)


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
    if axis == "ssm_heads":
        groups = max(1, own("ssm_groups"))
        each = sizes["ssm_bc"] // sizes["ssm_groups"]
        return {
            "n_groups": groups,
            "num_heads": units,
            "intermediate_size": own("ssm_inner"),
            "conv_dim": own("ssm_inner") + 2 * groups * each,
        }
    if axis == "ssm_channels":
        return {"intermediate_size": units}
    return {"args.hidden_size": units} if axis == "channels" else {}
