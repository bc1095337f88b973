"""MLPs and decoder layers of mlx-lm's models with fewer dispatches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..env import switched_off
from .attention import FusedAttention
from .form import Form, FusedModule, Run, plus, project
from .linear import GATED, PLAIN
from .norm import AddedNorm, Int8Norm
from .projection import MAX_IDS, KernelProjection, Projection


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
        if not self._holds():
            return plus(self._fused.original.__call__(self, x), residual)
        added = () if residual is None else (residual,)
        return self._part(Run.of(x), self._whole, list, x, *added)

    def _holds(self, *, counted: bool = True) -> bool:
        """`fusible`, with what is fused of it."""
        return self.fusible(self._fused.up, self._fused.down, counted=counted)

    def _whole(self, mode: str, x: mx.array, residual: mx.array | None = None) -> mx.array:
        """All of it."""
        form = self._fused
        hidden = None if form.up is None else form.up.activated(x, form.activation, mode)
        if hidden is None:
            parts = [self[name](x) for name in form.linears]
            if form.activation in PLAIN:
                hidden = PLAIN[form.activation](parts[0])
            elif len(parts) == 1:
                hidden = GATED[form.activation](*mx.split(parts[0], 2, axis=-1))
            else:
                hidden = GATED[form.activation](*parts)
        return self._down(mode, hidden, residual)

    def _down(
        self, mode: str, hidden: mx.array, residual: mx.array | None, *, int8: bool = False
    ) -> mx.array:
        """The last linear, with ``residual`` added."""
        form = self._fused
        return project(self, form.output, form.down, hidden, residual, mode, int8=int8)


@dataclass
class ExpertsForm(Form):
    """The variant of mlx-lm's gated experts that a module has.

    linears     names of gate and up.
    output      name of down.
    activation  of `mlxfuse.kernels.quantized_matmul`.
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
        x: mx.array,
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
        alike = scores is None or cast or scores.dtype == x.dtype
        if not (alike and self.fusible(form.up, form.down)):
            y: mx.array = form.original.__call__(self, x, indices)
            total = _weighted(y, scores)
            return total.astype(y.dtype) if cast else total
        given = (x, indices) if scores is None else (x, indices, scores)
        return self._part(Run.of(x), self._whole, self._children, *given)

    def _children(self) -> list[tuple[nn.Module, str]]:
        form = self._fused
        own = () if form.up is not None else form.linears
        return [(self, name) for name in (*own, form.output)]

    def _whole(
        self, mode: str, x: mx.array, indices: mx.array, scores: mx.array | None = None
    ) -> mx.array:
        """All of it."""
        form = self._fused
        hidden = None
        if form.up is not None:
            hidden = form.up.gathered(x, indices, mode, activation=form.activation)
        elif scores is not None and indices.size < MAX_IDS:
            wide = mx.expand_dims(x, (-2, -3))
            both = (self[name](wide, indices) for name in form.linears)
            hidden = GATED[form.activation](*both).squeeze(-2)
        if hidden is None:
            y: mx.array = form.original.__call__(self, x, indices)
        else:
            if scores is not None and form.down is not None:
                total = form.down.gathered(hidden, indices, mode, scores=scores)
                if total is not None:
                    return total
            y = self[form.output](mx.expand_dims(hidden, -2), indices).squeeze(-2)
        return _weighted(y, scores).astype(y.dtype)


def _weighted(y: mx.array, scores: mx.array | None) -> mx.array:
    return y if scores is None else (y * scores[..., None]).sum(axis=-2)


@dataclass
class MoEForm(Form):
    """A block of mlx-lm that sums its experts' results by their scores.

    experts  name of the experts.
    body     its `__call__`, with the sum left to a `FusedExperts`.
    sums     whether it is.
    """

    experts: str
    body: Callable[..., mx.array]
    sums: bool = False
    pieces = ("sums",)


class FusedMoE(FusedModule):
    """Mixed with the class of an mlx-lm block of experts; see `MoEForm`."""

    _fused: MoEForm

    def __call__(self, *args: Any, **kwargs: Any) -> mx.array:
        form = self._fused
        whole = self.fusible() and isinstance(self[form.experts], FusedExperts)
        body: Callable[..., mx.array] = form.body if whole else form.original.__call__
        return body(self, *args, **kwargs)


@dataclass
class BlockForm(Form):
    """A decoder layer that norms, mixes and adds, then norms, multiplies and adds.

    norms          names of both.
    mixer          name of the attention or of what is in its place.
    mlp            name of the MLP or of what is in its place.
    keywords       whether the mixer gets mask and cache by name.
    mixer_adds     whether the mixer is a `FusedAttention` whose o adds the residual.
    mlp_adds       whether the MLP is a `FusedMLP` whose down adds the residual.
    second         the first addition together with the second norm.
    int8           norms whose readers take int8 activations, by whether they are the second.
    int8_linears   which of o and down take them.
    """

    norms: tuple[str, str]
    mixer: str
    mlp: str
    keywords: bool = False
    mixer_adds: bool = False
    mlp_adds: bool = False
    second: AddedNorm | None = None
    int8: dict[bool, Int8Norm] = field(default_factory=dict)
    int8_linears: set[str] = field(default_factory=set)
    pieces = ("mixer_adds", "mlp_adds", "second")


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
        mixer, mlp = self[form.mixer], self[form.mlp]
        if self._complete(mixer, mlp):
            run = Run.of(x)
            offset = mixer._offset(run, cache)
            enter, leave = self._enter, self._leave
            if (form.int8 or form.int8_linears) and not switched_off("int8"):
                enter, leave = self._enter_int8, self._leave_int8
            heads = self._part(mixer._entering(run), enter, self._norms, x, offset)
            output = mixer._attended(*heads, mask, cache)
            return self._part(run, leave, self._norms, output, x)
        normed = self[form.norms[0]](x)
        both = None
        if form.mixer_adds and isinstance(mixer, FusedAttention):
            h: mx.array = mixer(normed, mask, cache, residual=x)
        else:
            how = {"mask": mask, "cache": cache}
            r = mixer(normed, **how) if form.keywords else mixer(normed, mask, cache)
            if form.second is not None and self.fusible(form.second):
                both = form.second(r, x, Run.of(x).mode)
            h = x + r if both is None else both[0]
        normed = self[form.norms[1]](h) if both is None else both[1]
        if form.mlp_adds and isinstance(mlp, FusedMLP):
            return mlp(normed, residual=h)
        out: mx.array = h + mlp(normed)
        return out

    def _complete(self, mixer: nn.Module, mlp: nn.Module) -> bool:
        """Whether the layer is one part before attention and one after it."""
        form = self._fused
        if not (form.mixer_adds and form.mlp_adds):
            return False
        if not (isinstance(mixer, FusedAttention) and isinstance(mlp, FusedMLP)):
            return False
        return mixer._holds(counted=False) and mlp._holds(counted=False)

    def _norms(self) -> list[tuple[nn.Module, str]]:
        """Its own and those of q and k, for `_part`."""
        own: list[tuple[nn.Module, str]] = [(self, name) for name in self._fused.norms]
        return own + list(self[self._fused.mixer]._norms())

    def _enter(
        self, mode: str, x: mx.array, offset: int | mx.array
    ) -> tuple[mx.array, mx.array, mx.array]:
        """What comes before attention."""
        form = self._fused
        normed = self[form.norms[0]](x)
        return self[form.mixer]._enter(mode, normed, offset)

    def _leave(self, mode: str, output: mx.array, x: mx.array) -> mx.array:
        """What comes after it."""
        form = self._fused
        h = self[form.mixer]._leave(mode, output, x)
        return self[form.mlp]._whole(mode, self[form.norms[1]](h), h)

    def _enter_int8(
        self, mode: str, x: mx.array, offset: int | mx.array
    ) -> tuple[mx.array, mx.array, mx.array]:
        """`_enter` with int8 activations where readers take them."""
        form, mixer = self._fused, self[self._fused.mixer]
        if False not in form.int8:
            return self._enter(mode, x, offset)
        parts = mixer._fused.qkv.integers(form.int8[False](x), split=True)
        return mixer._placed(mode, parts, offset)

    def _leave_int8(self, mode: str, output: mx.array, x: mx.array) -> mx.array:
        """`_leave` with int8 activations where readers take them."""
        form, mlp = self._fused, self[self._fused.mlp]
        h = self[form.mixer]._leave(mode, output, x, int8="o" in form.int8_linears)
        if True in form.int8:
            up, activation = mlp._fused.up, mlp._fused.activation
            (hidden,) = up.integers(form.int8[True](h), activation=activation)
            return mlp._down(mode, hidden, h, int8="down" in form.int8_linears)
        return mlp._whole(mode, self[form.norms[1]](h), h)
