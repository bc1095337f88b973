"""GLM-5 whose later layers may use the tokens that an earlier layer's indexer has chosen.

In GLM-5.2 three of four layers have no indexer of their own (``indexer_types`` of its
configuration). mlx-lm 0.32's ``glm_moe_dsa`` has one in each.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import deepseek_v32, glm_moe_dsa


@dataclass
class ModelArgs(glm_moe_dsa.ModelArgs):
    """``own_indexers`` says for each layer whether it has one."""

    own_indexers: list[bool] = field(default_factory=list)


class Choice:
    """What the last indexer before a layer chose; no module, so that it is no parameter."""

    tokens: mx.array | None = None


class Indexer(deepseek_v32.Indexer):
    def __init__(self, args: ModelArgs, choice: Choice) -> None:
        super().__init__(args)
        self.choice = choice

    def __call__(
        self, x: mx.array, qr: mx.array, mask: mx.array | None, cache: Any = None
    ) -> mx.array | None:
        """Indices of the chosen tokens, [B, 1, L, index_topk]; None for all of them."""
        self.choice.tokens = super().__call__(x, qr, mask, cache)
        return self.choice.tokens


class SharedIndexer(nn.Module):
    """Chooses what an earlier layer chose. Its cache counts tokens, in one number each."""

    def __init__(self, choice: Choice) -> None:
        super().__init__()
        self.choice = choice

    def __call__(
        self, x: mx.array, qr: mx.array, mask: mx.array | None, cache: Any = None
    ) -> mx.array | None:
        if cache is not None:
            count = mx.zeros((x.shape[0], 1, x.shape[1], 1), x.dtype)
            cache.update_and_fetch(count, count)
        return self.choice.tokens


class Model(glm_moe_dsa.Model):
    def __init__(self, args: ModelArgs) -> None:
        super().__init__(args)
        choice = Choice()
        for layer, own in zip(self.layers, args.own_indexers, strict=True):
            made = Indexer(args, choice) if own else SharedIndexer(choice)
            layer.self_attn.indexer = made
