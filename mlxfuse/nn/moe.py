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
from .fused import Form, FusedModule, Run, readable
from .linear import GATED
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
        if not (alike and self.fusible(run.on, form.up, form.down)):
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


@dataclass
class MoEForm(Form):
    """A block of mlx-lm that sums its experts' results by their scores.

    experts  name of the experts.
    body     its `__call__`, with the sum left to a `FusedExperts`.
    sums     whether it is.
    readers  names of those that take int8 activations of its input.
    """

    experts: str
    body: Callable[..., mx.array]
    sums: bool = False
    readers: tuple[str, ...] = ()
    pieces = ("sums", "readers")


class FusedMoE(FusedModule):
    """Mixed with the class of an mlx-lm block of experts; see `MoEForm`."""

    _fused: MoEForm

    def __call__(self, x: mx.array | Normed, *args: Any, **kwargs: Any) -> mx.array:
        """x [..., hidden_size] -> the same shape."""
        form = self._fused
        body: Callable[..., mx.array] = form.original.__call__
        if form.sums and self.fusible(backend()) and isinstance(self[form.experts], FusedExperts):
            body = form.body
        module: nn.Module = self
        if isinstance(x, Normed):
            module = replacing(self, {n: _reading(self[n], x) for n in form.readers})
        return body(module, floats(x), *args, **kwargs)


def _reading(child: nn.Module, x: Normed) -> Callable[..., mx.array]:
    """The child, which takes x where it is given its floats."""
    return lambda y, *args, **kwargs: child(x if y is x.floats else y, *args, **kwargs)


def replacing(module: nn.Module, children: dict[str, Callable[..., Any]]) -> nn.Module:
    """The module as its own code sees it for one call, with something else for some children."""
    other: nn.Module = type(module).__new__(type(module))
    vars(other).update(vars(module))
    dict.update(other, module)
    dict.update(other, children)
    return other
