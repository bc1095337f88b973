"""A pipeline: each of several machines has some consecutive layers."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn


def _attributes(layer: nn.Module) -> dict[str, Any]:
    """What a model may ask a layer of: which kind it is."""
    return {name: value for name, value in vars(layer).items() if not name.startswith("_")}


class Passing(nn.Module):
    """Stands for a layer that another rank holds: the input is passed on as it is.

    Its cache counts the tokens, from which masks are made, and holds a number or so of each: what
    evaluates the caches of a prompt lets the ranks hand on what they computed by that.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        vars(self).update(_attributes(layer))

    def __call__(self, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        """x [B, L, hidden_size] -> x."""
        for one in getattr(cache, "caches", (cache,)):
            _count(one, x)
        return x


def _count(cache: Any, x: mx.array) -> None:
    if hasattr(cache, "update_and_fetch"):
        # Compressed ones hold groups of 32 at least.
        few = x[:, None, :, : 32 if hasattr(cache, "attend") else 1]
        cache.update_and_fetch(few, few)
    elif hasattr(cache, "advance"):
        cache[0] = x[:, -1:, :1]
        cache.advance(x.shape[1])


class Stage(nn.Module):
    """The last layer of a rank's: what it gives goes to all ranks.

    Args:
        layer: on the rank that has it; on others a `Passing`.
    """

    def __init__(self, layer: nn.Module, group: mx.distributed.Group) -> None:
        super().__init__()
        vars(self).update(_attributes(layer))
        self.inner = layer
        self.group = group

    def __call__(self, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        """x [B, L, hidden_size] -> the same shape: the sum of the one that has it, and of zeros."""
        y = self.inner(x, mask, cache)
        if isinstance(self.inner, Passing):
            (y,) = mx.depends([mx.zeros_like(x)], [y])  # one stage after the other
        return mx.distributed.all_sum(y, group=self.group)
