"""Experts of mlx-lm's models with fewer dispatches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.switch_layers import _gather_sort, _scatter_unsort

from ..kernels import Backend, backend
from ..kernels.activations import Int8Activations
from .activations import GATED
from .fused import Form, FusedModule, Run, readable, replacing
from .norm import Normed, floats
from .projection import MAX_IDS, KernelProjection


@dataclass
class ExpertsForm(Form):
    """The variant of mlx-lm's gated experts that a module has.

    linears     names of gate and up.
    output      name of down.
    activation  of `mlxfuse.kernels.matmul.quantized_matmul`.
    up          gate and up, fused.
    down        for the sum over experts.
    """

    linears: tuple[str, str]
    output: str
    activation: str
    up: KernelProjection | None = None
    down: KernelProjection | None = None
    pieces = ("up", "down")


class FusedExperts(FusedModule):
    """Mixed with the class of mlx-lm's ``SwitchGLU``; see `ExpertsForm`."""

    _fused: ExpertsForm

    def __call__(
        self,
        x: mx.array | Normed,
        indices: mx.array,
        scores: mx.array | None = None,
        *,
        cast: bool = False,
    ) -> mx.array:
        """x [..., hidden_size], ids of experts [..., k] -> [..., k, hidden_size].

        With ``scores`` [..., k] their sum by these, [..., hidden_size], for `FusedMoE`.

        Args:
            cast: the sum is of the experts' type, if the scores are of a wider one.
        """
        form = self._fused
        run = Run.of(x)
        alike = scores is None or cast or scores.dtype == floats(x).dtype
        if not (alike and self.fusible(run.on, form.snapshot())):
            y: mx.array = form.original.__call__(self, floats(x), indices)
            total = _weighted(y, scores)
            return total.astype(y.dtype) if cast else total
        arrays = (x, indices) if scores is None else (x, indices, scores)
        return self.part(run, self.whole, self.children_read, *arrays)

    def children_read(self) -> list[tuple[nn.Module, str]]:
        """The linears that are not fused, for `part`."""
        form = self._fused
        own = () if form.up is not None else form.linears
        return [(self, name) for name in (*own, form.output)]

    def whole(
        self,
        run: Run,
        given: mx.array | Normed,
        indices: mx.array,
        scores: mx.array | None = None,
    ) -> mx.array:
        """All of it."""
        form, up, x = self._fused, self._fused.up, floats(given)
        hidden = None
        if up is not None:
            read = x if up.large(x, indices) else readable(up, given)
            if isinstance(read, Int8Activations):
                (hidden,) = up.integers(read, None, form.activation, indices)
            else:
                hidden = up.gathered(x, indices, run.on, activation=form.activation)
        elif scores is not None and indices.size < MAX_IDS:
            wide = mx.expand_dims(x, (-2, -3))
            both = (self[name](wide, indices) for name in form.linears)
            hidden = GATED[form.activation](*both).squeeze(-2)
        if hidden is None:
            y = self._sorted(run.on, x, indices)
        else:
            if scores is not None and form.down is not None:
                total = form.down.gathered(hidden, indices, run.on, scores=scores)
                if total is not None:
                    return total
            y = self[form.output](mx.expand_dims(hidden, -2), indices).squeeze(-2)
        return _weighted(y, scores).astype(y.dtype)

    def _sorted(self, on: Backend, x: mx.array, indices: mx.array) -> mx.array:
        """All of it as mlx-lm has it, which sorts many ids; gate and up together if that can be."""
        form, up = self._fused, self._fused.up
        y: mx.array
        if up is None or indices.size < MAX_IDS or not up.takes_many(on):
            y = form.original.__call__(self, x, indices)
            return y
        rows, ids, order = _gather_sort(mx.expand_dims(x, (-2, -3)), indices)
        hidden = up.gathered(rows, ids, on, activation=form.activation, sorted_experts=True)
        assert hidden is not None
        y = self[form.output](mx.expand_dims(hidden, -2), ids, sorted_indices=True)
        y = _scatter_unsort(y, order, indices.shape).squeeze(-2)
        return y


def _weighted(y: mx.array, scores: mx.array | None) -> mx.array:
    return y if scores is None else (y * scores[..., None]).sum(axis=-2)


class Summands:
    """The results of chosen experts, ``[..., k, hidden_size]``, of which only the sum is asked for.

    ``(y * scores[..., None]).sum(axis=-2)`` is all that can be done with it, and is computed by
    the experts.

    Args:
        weighted: scores ``[..., k]`` -> the sum by them, ``[..., hidden_size]``.
        dtype: of the results.
    """

    def __init__(self, weighted: Callable[[mx.array], mx.array], dtype: mx.Dtype) -> None:
        self.dtype = dtype
        self._weighted = weighted
        self._scores: mx.array | None = None

    def __mul__(self, scores: mx.array) -> Summands:
        """scores ``[..., k, 1]``."""
        found = Summands(self._weighted, self.dtype)
        found._scores = scores.squeeze(-1)
        return found

    def sum(self, axis: int) -> mx.array:
        """The sum over the experts, which are axis -2."""
        assert axis == -2
        assert self._scores is not None
        return self._weighted(self._scores)


@dataclass
class MoEForm(Form):
    """A block of mlx-lm that sums its experts' results by their scores.

    experts  name of the experts.
    cast     the sum gets the type of the experts' results, if the scores are of a wider one.
    sums     whether the experts give the sum.
    readers  names of those that take int8 activations of its input.
    """

    experts: str
    cast: bool = False
    sums: bool = False
    readers: tuple[str, ...] = ()
    pieces = ("sums", "readers")

    def summing(self, module: FusedModule) -> FusedExperts | None:
        """The experts, if they give the sum now."""
        experts = module[self.experts] if self.sums and module.fusible(backend()) else None
        return experts if isinstance(experts, FusedExperts) else None


class FusedMoE(FusedModule):
    """Mixed with the class of an mlx-lm block of experts; see `MoEForm`."""

    _fused: MoEForm

    def __call__(self, x: mx.array | Normed, *args: Any, **kwargs: Any) -> mx.array:
        """x [..., hidden_size] -> the same shape."""
        form = self._fused
        children: dict[str, Callable[..., Any]] = {}
        if isinstance(x, Normed):
            children = {name: _reading(self[name], x) for name in form.readers}
        if (experts := form.summing(self)) is not None:
            children[form.experts] = _summing(children.get(form.experts, experts), form.cast)
        own = replacing(self, children) if children else self
        y: mx.array = form.original.__call__(own, floats(x), *args, **kwargs)
        return y


class FusedWeightedExperts(FusedModule):
    """Mixed with a class of mlx-lm that does nothing but to sum its experts' results."""

    _fused: MoEForm

    def __call__(self, x: mx.array, top_k_indices: mx.array, top_k_weights: mx.array) -> mx.array:
        """x [..., hidden_size], ids and scores [..., k] -> [..., hidden_size]."""
        experts = self._fused.summing(self)
        if experts is not None:
            return experts(x, top_k_indices, top_k_weights)
        original = self._fused.original
        own: mx.array = original.__call__(self, x, top_k_indices, top_k_weights)
        return own


def _summing(experts: Callable[..., mx.array], cast: bool) -> Callable[..., Summands]:
    """Experts as their block's own code calls them."""

    def call(x: mx.array, ids: mx.array) -> Summands:
        return Summands(lambda scores: experts(x, ids, scores, cast=cast), x.dtype)

    return call


def _reading(child: nn.Module, x: Normed) -> Callable[..., mx.array]:
    """The child, which takes x where it is given its floats."""
    return lambda y, *args, **kwargs: child(x if y is x.floats else y, *args, **kwargs)
