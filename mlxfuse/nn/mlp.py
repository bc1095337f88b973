"""MLPs of mlx-lm's models with fewer dispatches."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from ..kernels import Backend
from ..kernels.activations import Int8Activations
from .activations import GATED, PLAIN
from .fused import Form, FusedModule, Run, plus, project, readable, rounded
from .norm import Given, Normed, floats
from .projection import KernelProjection, Projection


@dataclass
class MLPForm(Form):
    """The variant of MLP that a module has, and what is fused of it.

    linears     names of gate and up, or of the one that is both, or of the only one.
    output      name of down.
    activation  of `mlxfuse.kernels.matmul.quantized_matmul`.
    up, down    the fused projections.
    rounds      whether down takes int8 activations.
    """

    linears: tuple[str, ...]
    output: str
    activation: str
    up: Projection | None = None
    down: Projection | None = None
    rounds: bool = False
    pieces = ("up", "down")


class FusedMLP(FusedModule):
    """Mixed with the class of an mlx-lm MLP; see `MLPForm`."""

    _fused: MLPForm

    def __call__(self, x: mx.array | Normed, *, residual: mx.array | None = None) -> mx.array:
        """x [..., hidden_size] -> the same shape, with ``residual`` added."""
        run = Run.of(x)
        if not self.holds(run.on):
            return plus(self._fused.original.__call__(self, floats(x)), residual)
        arrays = (x,) if residual is None else (x, residual)
        return self.part(run, self.whole, self.children_read, *arrays)

    def holds(self, on: Backend, *, counted: bool = True) -> bool:
        """`fusible`, with what is fused of it."""
        return self.fusible(on, self._fused.snapshot(), counted=counted)

    def children_read(self) -> list[tuple[nn.Module, str]]:
        """The linears that are not fused, for `part`."""
        form = self._fused
        linears = [*(form.linears if form.up is None else ()), *[form.output] * (form.down is None)]
        return [(self, name) for name in linears]

    def whole(self, run: Run, x: Given, residual: mx.array | None = None) -> mx.array:
        """The whole MLP."""
        form = self._fused
        hidden = self.activated(run.on, readable(form.up, x))
        last = rounded(form.down, hidden) if run.rounds and form.rounds else hidden
        return project(self, form.output, form.down, last, residual, run.on)

    def activated(self, on: Backend, x: mx.array | Int8Activations) -> mx.array:
        """What the last linear gets."""
        form = self._fused
        if isinstance(x, Int8Activations):
            assert isinstance(form.up, KernelProjection)
            return form.up.integers(x, activation=form.activation)[0]
        hidden = None if form.up is None else form.up.activated(x, form.activation, on)
        if hidden is not None:
            return hidden
        parts = [self[name](x) for name in form.linears]
        if form.activation in PLAIN:
            return PLAIN[form.activation](parts[0])
        gate, up = parts if len(parts) == 2 else mx.split(parts[0], 2, axis=-1)
        return GATED[form.activation](gate, up)
