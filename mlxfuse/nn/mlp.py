"""MLPs and decoder layers of mlx-lm's models with fewer dispatches."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..env import switched_off
from ..kernels import Backend
from ..kernels.activations import Int8Activations
from ..kernels.norm.rms_norm import NormResult
from .attention import FusedAttention
from .fused import Form, FusedModule, Run, given, giving, plus, project
from .linear import GATED, PLAIN
from .norm import FusedNorm
from .projection import KernelProjection, Projection, no_integers


@dataclass
class MLPForm(Form):
    """The variant of MLP that a module has, and what is fused of it.

    linears     names of gate and up, or of the one that is both, or of the only one.
    output      name of down.
    activation  of `mlxfuse.kernels.matmul.quantized_matmul`.
    up, down    the fused projections.
    int8        whether down takes int8 activations.
    """

    linears: tuple[str, ...]
    output: str
    activation: str
    up: Projection | None = None
    down: Projection | None = None
    int8: bool = False
    pieces = ("up", "down")


class FusedMLP(FusedModule):
    """Mixed with the class of an mlx-lm MLP; see `MLPForm`."""

    _fused: MLPForm

    def __call__(self, x: mx.array, *, residual: mx.array | None = None) -> mx.array:
        """x [..., hidden_size] -> the same shape, with ``residual`` added."""
        run = Run.of(x)
        if not self._holds(run.on):
            return plus(self._fused.original.__call__(self, x), residual)
        codes = given(x)
        arrays = (x,) if residual is None and not codes else (x, residual, *(codes or ()))
        return self._part(run, self._whole, self._children, *arrays, int8=codes is not None)

    def _holds(self, on: Backend, *, counted: bool = True) -> bool:
        """`fusible`, with what is fused of it."""
        return self.fusible(on, self._fused.up, self._fused.down, counted=counted)

    def _children(self) -> list[tuple[nn.Module, str]]:
        """The linears that are not fused, for `_part`."""
        form = self._fused
        linears = [*(form.linears if form.up is None else ()), *[form.output] * (form.down is None)]
        return [(self, name) for name in linears]

    def _whole(
        self,
        on: Backend,
        x: mx.array | Int8Activations,
        residual: mx.array | None = None,
        *codes: mx.array,
        int8: bool = False,
    ) -> mx.array:
        """All of it; by the codes of x, if there are any and gate and up take them."""
        form = self._fused
        if codes and no_integers(form.up) is None:
            x = Int8Activations(codes[0], codes[1], codes[2], x.dtype)
        if isinstance(x, Int8Activations):
            assert isinstance(form.up, KernelProjection)
            (hidden,) = form.up.integers(x, activation=form.activation)
        else:
            hidden = self._activated(on, x)
        int8 = int8 and form.int8
        return project(self, form.output, form.down, hidden, residual, on, int8=int8)

    def _activated(self, on: Backend, x: mx.array) -> mx.array:
        """What the last linear gets."""
        form = self._fused
        hidden = None if form.up is None else form.up.activated(x, form.activation, on)
        if hidden is not None:
            return hidden
        parts = [self[name](x) for name in form.linears]
        if form.activation in PLAIN:
            return PLAIN[form.activation](parts[0])
        gate, up = parts if len(parts) == 2 else mx.split(parts[0], 2, axis=-1)
        return GATED[form.activation](gate, up)


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
    int8           its norms and last linears, by path, that give or take int8 activations; the
                   latter say so themselves too.
    """

    norms: tuple[str, str]
    mixer: str
    mlp: str
    keywords: bool = False
    mixer_adds: bool = False
    mlp_adds: bool = False
    second: FusedNorm | None = None
    int8: dict[str, FusedNorm | None] = field(default_factory=dict)
    pieces = ("mixer_adds", "mlp_adds", "second")


class FusedBlock(FusedModule):
    """Mixed with the class of an mlx-lm decoder layer; see `BlockForm`."""

    _fused: BlockForm

    def __call__(
        self, x: mx.array, mask: mx.array | str | None = None, cache: Any = None
    ) -> mx.array:
        """x [B, L, hidden_size] -> the same shape."""
        form = self._fused
        run = Run.of(x)
        if not self.fusible(run.on):
            own: mx.array = form.original.__call__(self, x, mask, cache)
            return own
        mixer, mlp = self[form.mixer], self[form.mlp]
        int8 = bool(form.int8) and not switched_off("int8")
        if (
            form.mixer_adds
            and isinstance(mixer, FusedAttention)
            and mixer._holds(run.on, counted=False)
        ):
            arrays = x, mixer._offset(run, cache)
            heads = self._part(
                mixer._entering(run), self._enter, self._children, *arrays, int8=int8
            )
            output = mixer._attended(heads, mask, cache)
            if form.mlp_adds and isinstance(mlp, FusedMLP) and mlp._holds(run.on, counted=False):
                return self._part(run, self._leave, self._children, output, x, int8=int8)
            h, normed, *codes = self._part(run, self._left, self._children, output, x, int8=int8)
        else:
            h, normed, *codes = self._mixed(run, x, mask, cache, int8=int8)
        with giving(normed, tuple(codes)) if int8 else nullcontext():
            if form.mlp_adds and isinstance(mlp, FusedMLP):
                return mlp(normed, residual=h)
            out: mx.array = h + mlp(normed)
            return out

    def _mixed(
        self, run: Run, x: mx.array, mask: mx.array | str | None, cache: Any, *, int8: bool
    ) -> Sequence[mx.array]:
        """`_left` where attention does not add, by its own modules."""
        form, mixer = self._fused, self[self._fused.mixer]
        normed, *codes = self._first(x, int8=int8)
        if form.mixer_adds and isinstance(mixer, FusedAttention):
            return self._second(run.on, mixer(normed, mask, cache, residual=x), int8=int8)
        how = {"mask": mask, "cache": cache}
        with giving(normed, tuple(codes)) if codes else nullcontext():
            r = mixer(normed, **how) if form.keywords else mixer(normed, mask, cache)
        h: Sequence[mx.array] = self._part(run, self._second, self._children, r, x, int8=int8)
        return h

    def _children(self) -> list[tuple[nn.Module, str]]:
        """Its norms and what the mixer and the MLP have, for `_part`."""
        own: list[tuple[nn.Module, str]] = [(self, name) for name in self._fused.norms]
        for child in (self[self._fused.mixer], self[self._fused.mlp]):
            own += child._children() if isinstance(child, FusedAttention | FusedMLP) else []
        return own

    def _normed(self, which: int, x: mx.array, *, int8: bool) -> mx.array | Int8Activations:
        """A norm of x for one reader."""
        norm = self._rounding(which) if int8 else None
        codes = None if norm is None else norm(x, outputs=("int8",)).int8
        y: mx.array | Int8Activations = codes or self[self._fused.norms[which]](x)
        return y

    def _rounding(self, which: int) -> FusedNorm | None:
        """A norm that gives int8 activations, if it does."""
        norm = self._fused.int8.get(self._fused.norms[which])
        return norm if norm is not None and norm.holds() else None

    def _enter(
        self, on: Backend, x: mx.array, offset: int | mx.array, *, int8: bool = False
    ) -> tuple[mx.array, ...]:
        """What comes before attention."""
        found: tuple[mx.array, ...] = self[self._fused.mixer]._enter(
            on, self._normed(0, x, int8=int8), offset
        )
        return found

    def _leave(self, on: Backend, output: mx.array, x: mx.array, *, int8: bool = False) -> mx.array:
        """What comes after it."""
        form = self._fused
        h = self[form.mixer]._leave(on, output, x, int8=int8)
        y: mx.array = self[form.mlp]._whole(on, self._normed(1, h, int8=int8), h, int8=int8)
        return y

    def _left(
        self, on: Backend, output: mx.array, x: mx.array, *, int8: bool = False
    ) -> Sequence[mx.array]:
        """What comes after it and before the MLP; see `_second`."""
        h = self[self._fused.mixer]._leave(on, output, x, int8=int8)
        return self._second(on, h, int8=int8)

    def _first(self, x: mx.array, *, int8: bool) -> Sequence[mx.array]:
        """The first norm of x and, if its reader takes them, its codes."""
        norm = self._rounding(0) if int8 else None
        if norm is None:
            return (self[self._fused.norms[0]](x),)
        return _arrays(norm(x, outputs=("y", "int8")))

    def _second(
        self, on: Backend, x: mx.array, residual: mx.array | None = None, *, int8: bool = False
    ) -> Sequence[mx.array]:
        """h, which is x with the residual, its norm and, if some reader takes them, its codes."""
        form = self._fused
        norm = self._rounding(1) if int8 else None
        rounded = norm is not None
        if norm is None and residual is not None and form.second and form.second.holds():
            norm = form.second
        if norm is None:
            h = plus(x, residual)
            return h, self[form.norms[1]](h)
        found = norm(x, residual, ("y", "int8") if rounded else ("y",))
        return x if found.h is None else found.h, *_arrays(found)


def _arrays(found: NormResult) -> tuple[mx.array, ...]:
    """The norm and, if there are any, its codes, scales and sums."""
    assert found.y is not None
    codes = found.int8
    return (found.y,) if codes is None else (found.y, codes.codes, codes.scales, codes.sums)
