"""MLPs and decoder layers of mlx-lm's models with fewer dispatches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from ..kernels import ready
from .attention import FusedAttention
from .form import Form, FusedModule, plus, project
from .linear import GATED, PLAIN
from .projection import Projection


@dataclass
class MLPForm(Form):
    """The variant of MLP that a module has, and what is fused of it.

    linears     names of gate and up, or of the one that is both, or of the only one.
    output      name of down.
    activation  of `mlxfuse.kernels.quantized_matmul`.
    up, down    the fused projections.
    """

    linears: tuple[str, ...]
    output: str
    activation: str
    up: Projection | None = None
    down: Projection | None = None
    pieces = ("up", "down")


class FusedMLP(FusedModule):
    """Mixed with the class of an mlx-lm MLP; see `MLPForm`."""

    _fused: MLPForm

    def __call__(self, x: mx.array, *, residual: mx.array | None = None) -> mx.array:
        """x [..., hidden_size] -> the same shape, with ``residual`` added."""
        form = self._fused
        if not self.fusible(form.up, form.down):
            return plus(form.original.__call__(self, x), residual)
        mode = ready()
        hidden = None if form.up is None else form.up.activated(x, form.activation, mode)
        if hidden is None:
            parts = [self[name](x) for name in form.linears]
            if form.activation in PLAIN:
                hidden = PLAIN[form.activation](parts[0])
            elif len(parts) == 1:
                hidden = GATED[form.activation](*mx.split(parts[0], 2, axis=-1))
            else:
                hidden = GATED[form.activation](*parts)
        return project(self, form.output, form.down, hidden, residual, mode)


@dataclass
class BlockForm(Form):
    """A decoder layer that norms, mixes and adds, then norms, multiplies and adds.

    norms          names of both.
    mixer          name of the attention or of what is in its place.
    mlp            name of the MLP or of what is in its place.
    keywords       whether the mixer gets mask and cache by name.
    mixer_adds     whether the mixer is a `FusedAttention` whose o adds the residual.
    mlp_adds       whether the MLP is a `FusedMLP` whose down adds the residual.
    """

    norms: tuple[str, str]
    mixer: str
    mlp: str
    keywords: bool = False
    mixer_adds: bool = False
    mlp_adds: bool = False
    pieces = ("mixer_adds", "mlp_adds")


class FusedBlock(FusedModule):
    """Mixed with the class of an mlx-lm decoder layer; see `BlockForm`."""

    _fused: BlockForm

    def __call__(
        self, x: mx.array, mask: mx.array | str | None = None, cache: Any = None
    ) -> mx.array:
        """x [B, L, hidden_size] -> the same shape."""
        form = self._fused
        if not self.fusible():
            own: mx.array = form.original.__call__(self, x, mask, cache)
            return own
        normed = self[form.norms[0]](x)
        mixer = self[form.mixer]
        if form.mixer_adds and isinstance(mixer, FusedAttention):
            h: mx.array = mixer(normed, mask, cache, residual=x)
        elif form.keywords:
            h = x + mixer(normed, mask=mask, cache=cache)
        else:
            h = x + mixer(normed, mask, cache)
        normed, mlp = self[form.norms[1]](h), self[form.mlp]
        if form.mlp_adds and isinstance(mlp, FusedMLP):
            return mlp(normed, residual=h)
        out: mx.array = h + mlp(normed)
        return out
