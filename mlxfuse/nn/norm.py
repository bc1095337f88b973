"""RMSNorm behind an addition, as one kernel where there is one."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn

from ..kernels import Prepared, wanted
from ..kernels.activations import Int8Activations
from ..kernels.rms_norm import prepare, rms_norm

# Tokens of a call up to which its launch is kept: prompts have lengths of every kind.
_KEPT = 32


class Int8Norm:
    """An RMSNorm whose readers take int8 activations.

    Args:
        parent: of the norm.
        name: of the norm, an RMSNorm with a ``weight``.
        offset: added to its weight: 1 for gemma's.
    """

    def __init__(self, parent: nn.Module, name: str, eps: float, offset: float) -> None:
        self._parent, self._name, self._eps, self._offset = parent, name, eps, offset

    def __call__(self, x: mx.array) -> Int8Activations:
        """x [..., K] -> its norm."""
        weight = self._parent[self._name].weight
        found = rms_norm(x, weight, self._eps, offset=self._offset, outputs=("int8",)).int8
        assert found is not None
        return found


class AddedNorm:
    """``h = x + residual`` and the norm of h.

    Args:
        parent: of the norm.
        name: of the norm, an RMSNorm with a ``weight``.
        offset: added to its weight: 1 for gemma's.
    """

    def __init__(self, parent: nn.Module, name: str, eps: float, offset: float) -> None:
        norm = parent[name]
        self._weight: mx.array = norm.weight
        self._held: list[tuple[Callable[[str], object], str, object]] = [
            (parent.get, name, norm),
            (norm.get, "weight", norm.weight),
        ]
        self._eps, self._offset = eps, offset
        self._prepared: dict[tuple[object, ...], Prepared] = {}

    def holds(self) -> bool:
        """Whether the norm still has the weight that it had."""
        return all(get(name) is value for get, name, value in self._held)

    def __call__(
        self, x: mx.array, residual: mx.array, mode: str
    ) -> tuple[mx.array, mx.array] | None:
        """h and its norm; None if the module is to be called."""
        reason = None
        if x.dtype != residual.dtype or x.shape != residual.shape:
            reason = "what is added has another type or shape"
        elif mode:
            key = (mode, x.shape, x.dtype)
            prepared = self._prepared.get(key)
            if prepared is None:
                prepared = prepare(x, self._weight, self._eps, residual, self._offset)
                if prepared is not None and x.shape[-2] <= _KEPT:
                    self._prepared[key] = prepared
            if prepared is not None:
                found = prepared(x, residual)
                if found is not None:
                    return found[0], found[1]
                reason = "it failed its self-test"
        if not wanted("rms_norm", reason):
            return None
        both = rms_norm(x, self._weight, self._eps, residual=residual, offset=self._offset)
        assert both.h is not None
        assert both.y is not None
        return both.h, both.y
