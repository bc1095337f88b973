"""Blocks of experts whose router is a module of its own, with fewer dispatches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import mlx.core as mx

from ..kernels.route_sigmoid import SigmoidOptions, route_sigmoid
from .fused import Form, FusedModule, Run, plus
from .mlp import FusedMLP
from .moe import FusedMoE, MoEForm
from .norm import Normed, floats
from .snapshot import Snapshot


@dataclass
class SigmoidRouterForm(Form):
    """A router that chooses experts as `route_sigmoid` does.

    options   how it does.
    selects   its arrays and its settings.
    """

    options: SigmoidOptions
    selects: Snapshot | None = None
    pieces: ClassVar[tuple[str, ...]] = ("selects",)


class FusedSigmoidRouter(FusedModule):
    """Mixed with the class of an mlx-lm router; see `SigmoidRouterForm`."""

    _fused: SigmoidRouterForm

    def __call__(self, x: mx.array) -> tuple[mx.array, mx.array]:
        """x [..., hidden_size] -> ids of experts and their float32 weights, [..., k]."""
        run = Run.of(x)
        if not self.fusible(run.on, self._fused.selects):
            own: tuple[mx.array, mx.array] = self._fused.original.__call__(self, x)
            return own
        found: tuple[mx.array, mx.array] = self.part(run, self.select, lambda: (), x)
        return found

    def select(self, run: Run, x: mx.array) -> tuple[mx.array, mx.array]:
        """The product, and the choice in one dispatch."""
        logits = x @ self.weight.T
        return route_sigmoid(logits, self.e_score_correction_bias, self._fused.options)


@dataclass
class RoutedForm(MoEForm):
    """A block that does nothing but to sum its experts' results, and that of a shared expert.

    gate     name of the router.
    always   name of the expert that all tokens get, or empty.
    """

    gate: str = ""
    always: str = ""


class FusedRoutedMoE(FusedMoE):
    """A `FusedMoE` whose sum and shared expert add what is before them; see `RoutedForm`."""

    _fused: RoutedForm

    def __call__(
        self, x: mx.array | Normed, *args: Any, residual: mx.array | None = None, **kwargs: Any
    ) -> mx.array:
        """x [..., hidden_size] -> the same shape, with ``residual`` added."""
        form = self._fused
        experts = form.summing(self)
        sharded = getattr(self, "sharding_group", None) is not None
        if experts is None or sharded or args or kwargs:
            return super().__call__(x, *args, residual=residual, **kwargs)
        ids, scores = self[form.gate](floats(x))
        if form.always:
            shared = self[form.always]
            if isinstance(shared, FusedMLP):
                residual = shared(
                    x if form.always in form.readers else floats(x), residual=residual
                )
            else:
                residual = plus(shared(floats(x)), residual)
        read = x if form.experts in form.readers else floats(x)
        return experts(read, ids, scores, residual, cast=form.cast)
