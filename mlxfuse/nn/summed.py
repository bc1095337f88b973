"""Modules of which each of several machines holds a part; the sums are MLX's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.activations import swiglu

from ..kernels import Backend
from .projection import Projection
from .snapshot import Snapshot


class Summed(nn.Module):
    """A linear, or a block of experts, whose results are added up over the ranks of a group."""

    def __init__(self, inner: nn.Module, group: mx.distributed.Group) -> None:
        super().__init__()
        self.inner = inner
        self.group = group

    def __call__(self, *args: Any, **kwargs: Any) -> mx.array:
        """What each rank's part gives, added up."""
        return mx.distributed.all_sum(self.inner(*args, **kwargs), group=self.group)


class SummedProjection(Projection):
    """A linear whose results are summed: `Summed`, or one that mlx-lm has sharded.

    The residual is added by rank 0, where its part is multiplied, so that it is in the sum once.

    Args:
        inner: the projection of this rank's part.
        multiply: what that does without a kernel.
        bias: what is added after the sum.
    """

    def __init__(
        self,
        parent: nn.Module,
        name: str,
        inner: Projection,
        multiply: Callable[[mx.array], mx.array],
        bias: mx.array | None = None,
    ) -> None:
        super().__init__(parent, [name], inner.formats)
        self.snapshot = Snapshot.joined((self.snapshot, inner.snapshot))
        self.holds = self.snapshot.holds
        self._linear, self._inner, self._multiply, self._bias = parent[name], inner, multiply, bias

    def split(self, x: mx.array, on: Backend) -> Sequence[mx.array]:
        return (self._linear(x),)

    def activated(self, x: mx.array, activation: str, on: Backend) -> None:
        """Always None: a sum comes before the activation."""

    def added(self, x: mx.array, residual: mx.array, on: Backend) -> mx.array:
        group = self._linear.group
        if group.rank() == 0:
            y = self._inner.added(x, residual, on)
            y = residual + self._multiply(x) if y is None else y
        else:
            parts = self._inner.split(x, on)
            y = self._multiply(x) if parts is None else parts[0]
            # What made the residual may be a sum that nothing else on this rank asks for.
            (y,) = mx.depends([y], [residual])
        y = mx.distributed.all_sum(y, group=group)
        return y if self._bias is None else y + self._bias


class SummedNorm(nn.Module):
    """An RMS norm over a width of which each rank has a part, or over several one after the other.

    Args:
        own: the norm of this rank's part, which has its weight; a mixer's has a gate beside.
        width: that is normed together.
        groups: how many such widths there are on all ranks.
        first: the first of them of which this rank has a part.
    """

    def __init__(
        self,
        own: nn.Module,
        width: int,
        group: mx.distributed.Group,
        groups: int = 1,
        first: int = 0,
    ) -> None:
        super().__init__()
        self.weight = own.weight
        self.eps = own.eps if hasattr(own, "eps") else own.variance_epsilon
        self.gate_after = getattr(own, "norm_before_gate", False)
        self.width, self.groups, self.first = width, groups, first
        self.group = group

    def __call__(self, x: mx.array, gate: mx.array | None = None) -> mx.array:
        """x, and any gate ``[..., K]`` -> the same shape; squares are added up in float32."""
        if gate is not None and not self.gate_after:
            x = swiglu(gate, x)
        y = self._normed(x)
        return swiglu(gate, y) if gate is not None and self.gate_after else y

    def _normed(self, x: mx.array) -> mx.array:
        wide = x.astype(mx.float32)
        squares = self.squares(wide.square().sum(-1, keepdims=True))
        return (wide * mx.rsqrt(squares / self.width + self.eps) * self.weight).astype(x.dtype)

    def squares(self, own: mx.array) -> mx.array:
        """The sum [..., 1] of this rank's squares -> that of all that are normed with them."""
        at, last = self.first, self.groups - 1
        spread = mx.pad(own, [(0, 0)] * (own.ndim - 1) + [(at, last - at)])
        return mx.distributed.all_sum(spread, group=self.group)[..., at : at + 1]


class Nothing(nn.Module):
    """Stands for experts of which this rank holds no part.

    Args:
        outputs: of each row.
    """

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.outputs = outputs

    def __call__(self, x: mx.array, ids: mx.array | None = None) -> mx.array:
        """x ``[..., K]`` and any ids ``[..., k]`` -> zeros ``[..., outputs]``, for each id."""
        lead = x.shape[:-1] if ids is None else ids.shape
        return mx.zeros((*lead, self.outputs), x.dtype)


class SharedHead(nn.Module):
    """A linear of which each rank has some rows: its results one after the other.

    Args:
        counts: how many rows each rank has.
    """

    def __init__(
        self, inner: nn.Module, counts: Sequence[int], group: mx.distributed.Group
    ) -> None:
        super().__init__()
        self.inner = inner
        self.counts = tuple(counts)
        self.group = group

    def __call__(self, x: mx.array) -> mx.array:
        """x ``[..., K]`` -> ``[..., N]``, of all ranks."""
        return self.gathered(self.inner(x))

    def gathered(self, y: mx.array) -> mx.array:
        """[..., rows of this rank] -> [..., rows of all]."""
        most = max(self.counts)
        if y.shape[-1] < most:
            y = mx.pad(y, [(0, 0)] * (y.ndim - 1) + [(0, most - y.shape[-1])])
        found = mx.distributed.all_gather(y[None], group=self.group)
        if min(self.counts) == most:
            return mx.moveaxis(found, 0, -2).flatten(-2)
        return mx.concatenate(
            [part[..., :n] for part, n in zip(found, self.counts, strict=True)], -1
        )


class SharedEmbedding(SharedHead):
    """An embedding of which each rank has the rows of some tokens."""

    def __call__(self, ids: mx.array) -> mx.array:
        """ids, integers of any shape -> ``[*ids.shape, K]``."""
        first = list(accumulate(self.counts, initial=0))[self.group.rank()]
        own = ids.astype(mx.int32) - first
        here = (own >= 0) & (own < self.counts[self.group.rank()])
        rows = mx.where(here[..., None], self.inner(mx.where(here, own, 0)), 0)
        return mx.distributed.all_sum(rows, group=self.group)

    def as_linear(self, x: mx.array) -> mx.array:
        """x ``[..., K]`` -> ``[..., vocabulary]``: a tied output head."""
        return self.gathered(self.inner.as_linear(x))
