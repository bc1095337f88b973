"""A norm of mlx-lm's models that adds a number to its weight, in one dispatch (Gemma)."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from ..kernels import backend
from .fused import Form, FusedModule
from .norm import FusedNorm


@dataclass
class OffsetNormForm(Form):
    """A norm, and what computes it with the addition to its weight."""

    norm: FusedNorm | None = None
    pieces = ("norm",)


class FusedOffsetNorm(FusedModule):
    """Mixed with a class whose ``__call__`` norms by ``1 + weight``."""

    _fused: OffsetNormForm

    def __call__(self, x: mx.array) -> mx.array:
        """x [..., K] -> the same shape."""
        form = self._fused
        if form.norm is None or not self.fusible(backend(), form.norm):
            own: mx.array = form.original.__call__(self, x)
            return own
        y = form.norm(x).y
        assert y is not None
        return y
