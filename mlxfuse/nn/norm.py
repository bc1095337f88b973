"""RMSNorm as one kernel with the addition before it and the int8 codes behind it."""

from __future__ import annotations

from collections.abc import Collection

import mlx.core as mx
import mlx.nn as nn

from ..kernels.norm.rms_norm import NormResult, rms_norm


class FusedNorm:
    """An RMSNorm that is given more than its input, or gives more than floats.

    Args:
        parent: of the norm.
        name: of the norm, an RMSNorm with a ``weight``.
        offset: added to its weight: 1 for gemma's.
    """

    def __init__(self, parent: nn.Module, name: str, eps: float, offset: float) -> None:
        self._parent, self._name, self._norm = parent, name, parent[name]
        self._eps, self._offset = eps, offset

    def holds(self) -> bool:
        """Whether the parent still has this norm."""
        return self._parent.get(self._name) is self._norm

    def __call__(
        self, x: mx.array, residual: mx.array | None = None, outputs: Collection[str] = ("y",)
    ) -> NormResult:
        """x [..., K] -> its norm, or that of x + residual; see `rms_norm`."""
        weight, offset = self._norm.weight, self._offset
        return rms_norm(x, weight, self._eps, residual=residual, offset=offset, outputs=outputs)
