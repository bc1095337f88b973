"""Modules of mlx-lm's models with their input projections in one dispatch, and else as they are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from .fused import Form, FusedModule, Run, replacing, split
from .norm import Normed, floats
from .projection import Projection


@dataclass
class DeltaNetForm(Form):
    """What is fused of a module whose own code goes on to run.

    linears  names of those of its input, together those that are computed together.
    joined   the fused projections, one for each of ``linears``.
    """

    linears: tuple[tuple[str, ...], ...]
    joined: tuple[Projection, ...] = ()
    pieces = ("joined",)

    def holds(self) -> bool:
        return all(projection.holds() for projection in self.joined)


class FusedDeltaNet(FusedModule):
    """Mixed with the class of an mlx-lm gated delta net, or with that of another module whose own
    code calls linears with its input; see `DeltaNetForm`.
    """

    _fused: DeltaNetForm

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Inputs [B, L, hidden_size], the first argument -> what the class gives."""
        form = self._fused
        if not args:  # a block of mlx-lm's may name it
            name = form.original.__call__.__code__.co_varnames[1]
            args = (kwargs.pop(name),)
        inputs: mx.array | Normed = args[0]
        module: Any = self
        run = Run.of(inputs)
        # With a sharding group their own code changes the inputs' gradient first.
        if self.fusible(run.on, *form.joined) and getattr(self, "sharding_group", None) is None:
            parts = self.part(run, self.project, list, inputs)
            names = [name for group in form.linears for name in group]
            module = replacing(self, {n: _constant(y) for n, y in zip(names, parts, strict=True)})
        return form.original.__call__(module, floats(inputs), *args[1:], **kwargs)

    def project(self, run: Run, x: mx.array | Normed) -> list[mx.array]:
        """x [B, L, hidden_size] -> the result of each of the linears; by its codes, if there are
        any and they take them.
        """
        found: list[mx.array] = []
        for names, projection in zip(self._fused.linears, self._fused.joined, strict=True):
            parts = split(projection, x, run.on)
            found += [self[name](floats(x)) for name in names] if parts is None else parts
        return found


def _constant(y: mx.array) -> Callable[[mx.array], mx.array]:
    return lambda _: y
