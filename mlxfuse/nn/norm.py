"""RMSNorm as one kernel with the addition before it and the int8 codes behind it."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn

from ..kernels.activations import Int8Activations
from ..kernels.norm.rms_norm import NormResult, Post, rms_norm


class Normed(NamedTuple):
    """What a norm gives its readers where activations are rounded to int8.

    floats  for readers that need them.
    codes   codes, scales and sums of `Int8Activations`; none if no reader takes them.
    """

    floats: mx.array
    codes: tuple[mx.array, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        return self.floats.shape

    @property
    def int8(self) -> Int8Activations | None:
        if not self.codes:
            return None
        codes, scales, sums = self.codes
        return Int8Activations(codes, scales, sums, self.floats.dtype)


Given = mx.array | Int8Activations | Normed
"""What a reader is called with: floats, codes, or both."""


def floats(given: Given) -> mx.array:
    """The floats of what a norm gives, for a reader that needs them."""
    assert not isinstance(given, Int8Activations)
    return given.floats if isinstance(given, Normed) else given


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
        self,
        x: mx.array,
        residual: mx.array | None = None,
        outputs: Collection[str] = ("y",),
        post: Post | float | None = None,
        others: tuple[mx.array, ...] = (),
        beside: tuple[Post, mx.array] | None = None,
    ) -> NormResult:
        """x [..., K] -> its norm, or that of x + residual, or of post(x) + residual; see
        `rms_norm`.
        """
        return rms_norm(
            x,
            self._norm.weight,
            self._eps,
            residual=residual,
            offset=self._offset,
            outputs=outputs,
            post=post,
            others=others,
            beside=beside,
        )

    def before(self, factor: mx.array | None = None) -> Post:
        """What `rms_norm` is told where this norm precedes its addition.

        Args:
            factor: ``[1]``, multiplies the sum.
        """
        return Post(self._norm.weight, self._eps, self._offset, factor)

    def normed(
        self,
        x: mx.array,
        residual: mx.array | None = None,
        post: Post | float | None = None,
    ) -> tuple[mx.array, Normed]:
        """x, or its sum with the residual, and the norm of that as floats and codes."""
        found = self(x, residual, ("y", "int8"), post)
        assert found.y is not None
        assert found.int8 is not None
        codes = found.int8
        normed = Normed(found.y, (codes.codes, codes.scales, codes.sums))
        return x if found.h is None else found.h, normed


class FusedFactor:
    """A number that multiplies what is added to a residual.

    Args:
        parent: the decoder layer.
        names: its attribute that is the number; or two of its attributes, of which the first is
            divided by the root of the second.
    """

    def __init__(self, parent: nn.Module, names: tuple[str, ...]) -> None:
        self._parent, self._names = parent, names
        self._values = self._now()

    def _now(self) -> tuple[float, ...]:
        return tuple(getattr(self._parent, name) for name in self._names)

    def holds(self) -> bool:
        """Whether the parent still has these numbers."""
        return self._now() == self._values

    def before(self, factor: None = None) -> float:
        """What `rms_norm` is told where the product precedes its addition."""
        number, *parts = self._values
        return float(number / parts[0] ** 0.5 if parts else number)


def added(
    x: mx.array,
    residual: mx.array,
    post: Post | float,
    beside: tuple[Post, mx.array] | None = None,
) -> mx.array:
    """x normed or multiplied, plus the residual; see `rms_norm`."""
    found = rms_norm(x, None, 0.0, residual=residual, outputs=(), post=post, beside=beside)
    assert found.h is not None
    return found.h
