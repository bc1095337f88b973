"""Routers that are modules of their own: Gemma 4's."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..kernels.norm.rms_norm import rms_norm
from ..kernels.route import route
from .fused import Form, FusedModule, Run
from .projection import Projection
from .snapshot import Snapshot


@dataclass
class RouterForm(Form):
    """A router that norms its input, and gives the chosen experts and their weights.

    proj     name of the linear.
    scale    name of the norm's weight, which is multiplied by the attribute ``root``.
    root     see ``scale``.
    eps      of the norm.
    factors  name of what multiplies the weights, one number for each expert.
    config   name of what has ``top_k_experts``, the number of those that are chosen.
    count    what that number was.
    logits   the linear, fused.
    chooses  whether experts are chosen in one dispatch.
    made     the norm's weight, and what it was made of.
    """

    proj: str
    scale: str
    root: str
    eps: float
    factors: str
    config: str
    count: int
    logits: Projection | None = None
    chooses: bool = False
    made: tuple[Snapshot, mx.array] | None = field(default=None, repr=False, compare=False)
    pieces = ("chooses", "logits")


class FusedRouter(FusedModule):
    """Mixed with the class of an mlx-lm router; see `RouterForm`."""

    _fused: RouterForm

    def __call__(self, x: mx.array) -> tuple[mx.array, mx.array]:
        """x [..., hidden_size] -> ids of experts and their weights, [..., k]."""
        run = Run.of(x)
        if not self.holds(run):
            own: tuple[mx.array, mx.array] = self._fused.original.__call__(self, x)
            return own
        y = rms_norm(x, self.weight(), self._fused.eps).y
        assert y is not None
        return self.chosen(run, y)

    def holds(self, run: Run) -> bool:
        """Whether it is fused, and runs by kernels."""
        form = self._fused
        config: Any = getattr(self, form.config)
        chooses = form.chooses and not run.on.reason and config.top_k_experts == form.count
        return chooses and self.fusible(run.on, form.logits)

    def weight(self) -> mx.array:
        """The norm's."""
        form = self._fused
        if form.made is None or not form.made[0].holds():
            weight = getattr(self, form.scale) * getattr(self, form.root)
            mx.eval(weight)
            form.made = Snapshot([(self.get, form.scale)]), weight
        return form.made[1]

    def chosen(self, run: Run, y: mx.array) -> tuple[mx.array, mx.array]:
        """Its result from the norm of its input."""
        form = self._fused
        factors = getattr(self, form.factors)
        found: tuple[mx.array, mx.array] = self.part(
            run, self.choose, self.children_read, y, factors
        )
        return found

    def children_read(self) -> list[tuple[nn.Module, str]]:
        """The linear, for `part`."""
        return [(self, self._fused.proj)]

    def choose(self, run: Run, y: mx.array, factors: mx.array) -> tuple[mx.array, ...]:
        form = self._fused
        parts = None if form.logits is None else form.logits.split(y, run.on)
        logits = self[form.proj](y) if parts is None else parts[0]
        return route(logits, form.count, whole=False, factors=factors)
