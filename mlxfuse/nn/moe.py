"""Experts of mlx-lm's models with fewer dispatches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.switch_layers import _gather_sort, _scatter_unsort

from ..kernels import Backend, backend
from ..kernels.activations import Int8Activations
from ..kernels.matmul.product import Experts
from ..kernels.route import route
from .activations import GATED
from .fused import Form, FusedModule, Run, plus, readable, replacing
from .mlp import FusedMLP
from .norm import Normed, floats
from .projection import MAX_IDS, KernelProjection, Projection


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
        residual: mx.array | None = None,
        *,
        cast: bool = False,
    ) -> mx.array:
        """x [..., hidden_size], ids of experts [..., k] -> [..., k, hidden_size].

        With ``scores`` [..., k] their sum by these, [..., hidden_size], for `FusedMoE`.

        Args:
            residual: is added to the sum.
            cast: the sum is of the experts' type, if the scores are of a wider one.
        """
        form = self._fused
        run = Run.of(x)
        alike = scores is None or cast or scores.dtype == floats(x).dtype
        if not (alike and self.fusible(run.on, form.snapshot())):
            y: mx.array = form.original.__call__(self, floats(x), indices)
            total = _weighted(y, scores)
            return plus(total.astype(y.dtype) if cast else total, residual)
        more = [array for array in (scores, residual) if array is not None]
        return self.part(run, self.whole, self.children_read, x, indices, *more)

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
        residual: mx.array | None = None,
    ) -> mx.array:
        """All experts of each row, from their input to their sum."""
        form, up, x = self._fused, self._fused.up, floats(given)
        hidden = None
        if up is not None:
            read = x if up.large(x, indices) else readable(up, given)
            if isinstance(read, Int8Activations):
                (hidden,) = up.integers(read, None, form.activation, indices)
            else:
                of = Experts(indices)
                hidden = up.gathered(x, of, run.on, activation=form.activation)
        elif scores is not None and indices.size < MAX_IDS:
            wide = mx.expand_dims(x, (-2, -3))
            both = (self[name](wide, indices) for name in form.linears)
            hidden = GATED[form.activation](*both).squeeze(-2)
        if hidden is None:
            y = self._sorted(run.on, x, indices)
        else:
            if scores is not None and form.down is not None:
                alike = residual is None or residual.dtype == hidden.dtype
                summed = Experts(indices, scores)
                total = form.down.gathered(
                    hidden, summed, run.on, residual=residual if alike else None
                )
                if total is not None:
                    return total if alike else plus(total, residual)
            y = self[form.output](mx.expand_dims(hidden, -2), indices).squeeze(-2)
        return plus(_weighted(y, scores).astype(y.dtype), residual)

    def _sorted(self, on: Backend, x: mx.array, indices: mx.array) -> mx.array:
        """The experts as mlx-lm computes them, which sorts many ids; gate and up are together if
        possible."""
        form, up = self._fused, self._fused.up
        y: mx.array
        if up is None or indices.size < MAX_IDS or not up.takes_many(on):
            y = form.original.__call__(self, x, indices)
            return y
        rows, ids, order = _gather_sort(mx.expand_dims(x, (-2, -3)), indices)
        of = Experts(ids, sorted=True)
        hidden = up.gathered(rows, of, on, activation=form.activation)
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


@dataclass(frozen=True)
class Choosing:
    """How a block of mlx-lm chooses experts, where its whole method is known.

    router    name of the linear that gives each expert's logit.
    count     the experts that a token gets.
    whole     their weights are a softmax over all experts, else over the chosen ones.
    settings  names of the block's attributes that say so, and what they were.
    shared    names of the expert that all tokens get and of its gate, or empty.
    inner     name of the module that has the router and the settings, and that module; None if it
              is the block.
    """

    router: str
    count: int
    whole: bool
    settings: tuple[tuple[str, object], ...]
    shared: tuple[str, ...] = ()
    inner: tuple[str, nn.Module] | None = None

    def holder(self, module: nn.Module) -> nn.Module:
        """What has the router: the block, or a module of it."""
        return module if self.inner is None else self.inner[1]

    def holds(self, module: nn.Module) -> bool:
        """Whether the block still chooses so."""
        if self.inner is not None and module.get(self.inner[0]) is not self.inner[1]:
            return False
        holder = self.holder(module)
        return all(getattr(holder, name) == value for name, value in self.settings)


@dataclass
class MoEForm(Form):
    """A block of mlx-lm that sums its experts' results by their scores.

    experts   name of the experts.
    cast      the sum gets the type of the experts' results, if the scores are of a wider one.
    choosing  how it chooses experts, if that is known.
    sums      whether the experts give the sum.
    chooses   whether experts are chosen in one dispatch.
    router    the router, where its bias can be added in its dispatch; or with the gate of the
              shared expert.
    shared    down of the shared expert, to add its result by its gate.
    readers   names of those that take int8 activations of its input.
    """

    experts: str
    cast: bool = False
    choosing: Choosing | None = None
    sums: bool = False
    chooses: bool = False
    router: Projection | None = None
    shared: KernelProjection | None = None
    readers: tuple[str, ...] = ()
    pieces = ("sums", "chooses", "router", "shared", "readers")

    def summing(self, module: FusedModule) -> FusedExperts | None:
        """The experts, if they give the sum now."""
        experts = module[self.experts] if self.sums and module.fusible(backend()) else None
        return experts if isinstance(experts, FusedExperts) else None


class FusedMoE(FusedModule):
    """Mixed with the class of an mlx-lm block of experts; see `MoEForm`."""

    _fused: MoEForm

    def __call__(
        self, x: mx.array | Normed, *args: Any, residual: mx.array | None = None, **kwargs: Any
    ) -> mx.array:
        """x [..., hidden_size] -> the same shape, with ``residual`` added."""
        form = self._fused
        experts = form.summing(self)
        run = Run.of(x)
        if experts is not None and form.choosing and not (args or kwargs) and self._chooses(run):
            return self._chosen(run, form.choosing, experts, x, residual)
        children: dict[str, Callable[..., Any]] = {}
        if isinstance(x, Normed):
            children = {name: _reading(self[name], x) for name in form.readers}
        if experts is not None:
            children[form.experts] = _summing(children.get(form.experts, experts), form.cast)
        own = replacing(self, children) if children else self
        y: mx.array = form.original.__call__(own, floats(x), *args, **kwargs)
        return plus(y, residual)

    def _chooses(self, run: Run) -> bool:
        """Whether experts are chosen by the kernel now."""
        form = self._fused
        if not form.chooses or run.on.reason or getattr(self, "sharding_group", None) is not None:
            return False
        assert form.choosing is not None
        return form.choosing.holds(self) and self.fusible(run.on, form.router, form.shared)

    def _chosen(
        self,
        run: Run,
        how: Choosing,
        experts: FusedExperts,
        given: mx.array | Normed,
        residual: mx.array | None,
    ) -> mx.array:
        """The whole block; the sum is computed in another order than in mlx-lm's code."""
        form, x = self._fused, floats(given)
        ids, scores, *gate = self.part(run, self.choose, self.children_read, x)

        def read(name: str) -> mx.array | Normed:
            return given if name in form.readers else x

        if gate:
            more = [] if residual is None else [residual]
            arrays = (read(how.shared[0]), *gate, *more)
            residual = self.part(run, self.share, self.children_read, *arrays)
        return experts(read(form.experts), ids, scores, residual, cast=form.cast)

    def children_read(self) -> list[tuple[nn.Module, str]]:
        """The router, the shared expert and its gate, for `part`."""
        how = self._fused.choosing
        if how is None:
            return []
        return [(how.holder(self), how.router), *((self, name) for name in how.shared)]

    def choose(self, run: Run, x: mx.array) -> tuple[mx.array, ...]:
        """x [..., hidden_size] -> ids of experts and their weights, [..., k], and the weight of
        the shared expert, [..., 1], if there is one.
        """
        router, how = self._fused.router, self._fused.choosing
        assert how is not None
        linears = [how.holder(self)[how.router], *(self[name] for name in how.shared[1:])]
        found = [] if router is None else list(router.split(x, run.on) or ())
        found += [linear(x) for linear in linears[len(found) :]]
        logits, *gate = found
        return route(logits, how.count, whole=how.whole, gate=gate[0] if gate else None)

    def share(
        self, run: Run, given: mx.array | Normed, gate: mx.array, residual: mx.array | None = None
    ) -> mx.array:
        """What the shared expert gives, times its gate [..., 1], with ``residual`` added."""
        down, how = self._fused.shared, self._fused.choosing
        assert how is not None
        expert = self[how.shared[0]]
        fused = isinstance(expert, FusedMLP) and expert.holds(run.on)
        # Int8 activations are for its own down.
        if fused and down is not None and not (run.rounds and expert._fused.rounds):
            hidden = expert.activated(run.on, readable(expert._fused.up, given))
            if residual is None or residual.dtype == hidden.dtype:
                of, rows = Experts(first_expert(gate.shape), gate), mx.expand_dims(hidden, -2)
                total = down.gathered(rows, of, run.on, residual=residual)
                if total is not None:
                    return total
        return plus(gate * expert(given), residual)


@lru_cache(maxsize=64)
def first_expert(shape: tuple[int, ...]) -> mx.array:
    """Ids of the first of some experts."""
    ids = mx.zeros(shape, mx.uint32)
    mx.eval(ids)
    return ids


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
