"""What a module of mlx-lm becomes while it is patched: the same object in a class of ours."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any, ClassVar, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from ..kernels import Backend, backend, fallbacks
from ..kernels.matmul.product import MAX_BATCH
from .kept_graph import Piece
from .norm import FusedNorm
from .projection import KernelProjection, Projection
from .rotation import Rotation
from .snapshot import of_class


@dataclass
class Form:
    """What a fused class knows of one module; it is outside the module's tree of parameters.

    original  the module's own class.
    kept      parts of its graph that are built once, by name.
    fusings   `Form.changes` when they were: they may hold what is fused of the modules below.
    """

    original: type[nn.Module]
    kept: dict[str, Piece] = field(default_factory=dict, kw_only=True, repr=False, compare=False)
    fusings: int = field(default=0, kw_only=True, repr=False, compare=False)
    pieces: ClassVar[tuple[str, ...]] = ()
    changes: ClassVar[int] = 0

    def holds(self) -> bool:
        """Whether what is fused is still what the module has."""
        fused = (getattr(self, piece) for piece in self.pieces)
        return all(f.holds() for f in fused if isinstance(f, Fused))

    def empty(self) -> bool:
        """Whether no fusion is left in it."""
        return not any(getattr(self, piece) for piece in self.pieces)


class _Given(threading.local):
    normed: mx.array | None = None
    codes: tuple[mx.array, ...] = ()


_given = _Given()


@contextmanager
def giving(normed: mx.array, codes: tuple[mx.array, ...]) -> Iterator[None]:
    """Within, what reads this very array in this thread may take its int8 codes instead.

    Args:
        codes: codes, scales and sums of `Int8Activations`; or none, and what is made of it is to
            be rounded all the same.
    """
    before = _given.normed, _given.codes
    _given.normed, _given.codes = normed, codes
    try:
        yield
    finally:
        _given.normed, _given.codes = before


def given(x: mx.array) -> tuple[mx.array, ...] | None:
    """The codes that are given for x; None if nothing of it is to be rounded."""
    return _given.codes if _given.normed is x else None


Fused = Projection | Rotation | FusedNorm


class Run(NamedTuple):
    """How one call is run.

    on    what runs kernels.
    kept  whether by graphs that are kept: not for long inputs, each of which would have another.
    """

    on: Backend
    kept: bool

    @classmethod
    def of(cls, x: mx.array) -> Run:
        """Of x ``[..., K]``."""
        on = backend()
        return cls(on, on.keeps and x.size <= MAX_BATCH * x.shape[-1])


class FusedModule(nn.Module):
    """Base of the fused classes; each is mixed with the original class of its module."""

    _fused: Any

    def __reduce_ex__(self, protocol: Any) -> Any:
        """A copy or a pickle is of the original class: what is fused is this module's alone."""
        made: Any = super().__reduce_ex__(protocol)
        new, kind, state, *rest = of_class(self._fused.original, made)
        return new, kind, {n: v for n, v in state.items() if n != "_fused"}, *rest

    def fusible(self, on: Backend, *pieces: Fused | None, counted: bool = True) -> bool:
        """Whether this call may be fused: kernels have no gradient, and arrays may have changed.

        Args:
            on: what runs kernels.
            counted: as a fallback, if so.
        """
        if self.training or not on.fused:
            return False
        for piece in pieces:
            if piece is not None and not piece.holds():
                reason = "its arrays are not those that were fused"
                fallbacks[type(self).__name__, reason] += counted
                return False
        return True

    def _part(
        self,
        run: Run,
        function: Callable[..., Any],
        children: Callable[[], Iterable[tuple[nn.Module, str]]],
        *arrays: Any,
        int8: bool = False,
    ) -> Any:
        """``function(run.on, *arrays)``, a method of this module; see `Piece`.

        Args:
            int8: that the function takes too; it has a graph of its own.
        """
        name = function.__name__
        if int8:
            name, function = f"{name}_int8", partial(function, int8=True)
        if not run.kept:
            return function(run.on, *arrays)
        form: Form = self._fused
        kept = form.kept
        if form.fusings != Form.changes:
            kept.clear()
            form.fusings = Form.changes
        piece = kept.get(name)
        if piece is None:
            piece = kept[name] = Piece(function, children())
        return piece(run.on, *arrays)


@cache
def fused_class(mixin: type[FusedModule], original: type[nn.Module]) -> type[nn.Module]:
    """``original`` whose ``__call__`` is the mixin's; everything else of it stays."""
    own = {"__doc__": mixin.__doc__, "__module__": mixin.__module__}
    return type(mixin.__name__, (mixin, original), own)


def adopt(module: nn.Module, mixin: type[FusedModule], form: Form) -> Any:
    """Give the module its fused class, if it has not got it yet, and return its form."""
    Form.changes += 1
    held = vars(module).get("_fused")
    if held is None:
        module._fused = held = form
        module.__class__ = fused_class(mixin, form.original)
    return held


def release(module: nn.Module) -> None:
    """Give the module its own class back, if no fusion is left."""
    Form.changes += 1
    form = vars(module).get("_fused")
    if isinstance(form, Form) and form.empty():
        module.__class__ = form.original
        del module._fused


def plus(y: mx.array, residual: mx.array | None) -> mx.array:
    return y if residual is None else residual + y


def project(
    parent: nn.Module,
    name: str,
    projection: Projection | None,
    x: mx.array,
    residual: mx.array | None,
    on: Backend,
    *,
    int8: bool = False,
) -> mx.array:
    """The parent's linear ``name`` of x, plus ``residual``, in one dispatch where that can be.

    Args:
        int8: x is rounded to int8, where the projection has integers.
    """
    if int8 and isinstance(projection, KernelProjection):
        return projection.integers(x, residual)[0]
    if residual is None:
        y: mx.array = parent[name](x)
        return y
    added = None if projection is None else projection.added(x, residual, on)
    return residual + parent[name](x) if added is None else added
