"""mlx-lm's model as one of several machines has it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..errors import UnsupportedError
from ..nn.summed import Nothing, SharedEmbedding, SharedHead, Summed, SummedNorm
from .shard import Share

# What mlx-lm's attentions call their counts of heads.
_HEADS = ("n_heads", "num_heads", "num_attention_heads")
KV_HEADS = ("n_kv_heads", "num_kv_heads", "num_key_value_heads")


@dataclass(frozen=True, slots=True)
class Part:
    """A rank's share of a model, and the group that the ranks talk in."""

    share: Share
    group: mx.distributed.Group

    def narrow(self, model: nn.Module) -> None:
        """Let the attentions count the rank's own heads.

        Raises:
            UnsupportedError: one does not say how many it has.
        """
        for path, counts in self.share.heads.items():
            parent, name = parent_of(model, path)
            attention = parent[name]
            found = 0
            for names, count in zip((_HEADS, KV_HEADS), counts, strict=True):
                for attribute in names:
                    if hasattr(attention, attribute):
                        setattr(attention, attribute, count)
                        found += names is _HEADS
            if not found:
                raise UnsupportedError(
                    f"this version of mlx-lm has an attention ({path}) that does not say how many "
                    "heads it has, so that machines cannot share them"
                )

    def join(self, model: nn.Module) -> None:
        """Add results up over the ranks, and gather those of the vocabulary."""
        share = self.share
        for path, outputs in share.absent.items():
            parent, name = parent_of(model, path)
            parent[name] = Nothing(outputs)
            if not any(path.startswith(f"{block}.") for block in share.sums):
                parent[name] = Summed(parent[name], self.group)
        for path in share.sums:
            if path.rpartition(".")[0] not in share.absent:
                parent, name = parent_of(model, path)
                parent[name] = Summed(parent[name], self.group)
        for path, width in share.norms.items():
            parent, name = parent_of(model, path)
            parent[name] = SummedNorm(parent[name], width, self.group)
        for weight in share.plan.outer if share.vocabulary else ():
            if weight.of.shape[0] == "vocab":
                parent, name = parent_of(model, weight.module)
                embeds = hasattr(parent[name], "as_linear")
                cls = SharedEmbedding if embeds else SharedHead
                parent[name] = cls(parent[name], share.vocabulary, self.group)


def parent_of(model: nn.Module, path: str) -> tuple[nn.Module, str]:
    """The module that has the one at ``path``, and its name there."""
    *parents, name = path.split(".")
    module: Any = model
    for step in parents:
        module = module[int(step)] if isinstance(module, list) else module[step]
    return module, name
