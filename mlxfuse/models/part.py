"""mlx-lm's model as one of several machines has it."""

from __future__ import annotations

import inspect
from copy import copy
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..errors import UnsupportedError
from ..nn.stages import Passing, Stage
from ..nn.summed import Nothing, SharedEmbedding, SharedHead, Summed, SummedNorm
from .share import Share


@dataclass(frozen=True, slots=True)
class Part:
    """A rank's share of a model, and the group that the ranks talk in."""

    share: Share
    group: mx.distributed.Group

    def narrow(self, model: nn.Module) -> None:
        """Let the attentions count the rank's own heads, and leave out others' layers.

        Raises:
            UnsupportedError: an attention does not say how many heads it has, or layers hand on
                more than their results.
        """
        for path, counts in self.share.counts.items():
            parent, name = parent_of(model, path)
            module = parent[name]
            found = [_count(module, *count) for count in counts.items()]
            if not any(found):
                raise UnsupportedError(
                    f"this version of mlx-lm has a {type(module).__name__} ({path}) that does not "
                    "say how many heads it has, so that machines cannot share them"
                )
        layers_at = self.share.plan.config.architecture.layers_at
        for i in range(len(model.layers)) if self.share.stages else ():
            parent, name = parent_of(model, layers_at)
            layer = parent[name][i]
            given = list(inspect.signature(type(layer).__call__).parameters)[2:]
            if given != ["mask", "cache"]:
                raise UnsupportedError(
                    f"layers of {type(model).__module__} hand on more than their results, so that "
                    "machines cannot have some layers each; they can share each layer (without "
                    "pipeline)"
                )
            if i not in self.share.layers:
                parent[name][i] = Passing(layer)

    def join(self, model: nn.Module) -> None:
        """Add results up over the ranks, and gather those of the vocabulary."""
        share = self.share
        for i in share.stages:
            parent, name = parent_of(model, share.plan.config.architecture.layers_at)
            parent[name][i] = Stage(parent[name][i], self.group)
        for path, outputs in share.absent.items():
            parent, name = parent_of(model, path)
            parent[name] = Nothing(outputs)
            if not any(path.startswith(f"{block}.") for block in share.sums):
                parent[name] = Summed(parent[name], self.group)
        for path in share.sums:
            if path.rpartition(".")[0] not in share.absent:
                parent, name = parent_of(model, path)
                parent[name] = Summed(parent[name], self.group)
        for path, wide in share.norms.items():
            parent, name = parent_of(model, path)
            parent[name] = SummedNorm(parent[name], wide.width, self.group, wide.groups, wide.first)
        for weight in share.plan.outer if share.vocabulary else ():
            if weight.of.shape[0] == "vocab":
                parent, name = parent_of(model, weight.module)
                embeds = hasattr(parent[name], "as_linear")
                cls = SharedEmbedding if embeds else SharedHead
                parent[name] = cls(parent[name], share.vocabulary, self.group)
        model.eval()


def _count(module: nn.Module, path: str, number: int) -> bool:
    """Let a module, or something in it, count so many; False if there is no such attribute."""
    *steps, name = path.split(".")
    of: Any = module
    for step in steps:
        inner = getattr(of, step, None)
        if isinstance(inner, nn.Module) or inner is None:
            of = inner
        else:  # arguments that layers have in common
            setattr(of, step, copy(inner))
            of = getattr(of, step)
    if not hasattr(of, name):
        return False
    setattr(of, name, number)
    return True


def parent_of(model: nn.Module, path: str) -> tuple[nn.Module, str]:
    """The module that has the one at ``path``, and its name there."""
    *parents, name = path.split(".")
    module: Any = model
    for step in parents:
        module = module[int(step)] if isinstance(module, list) else module[step]
    return module, name
