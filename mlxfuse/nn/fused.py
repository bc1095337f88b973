"""What a module of mlx-lm becomes while it is patched: the same object in a class of ours."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, ClassVar, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from ..kernels import Backend, backend, fallbacks
from ..kernels.activations import Int8Activations
from ..kernels.matmul.shapes import MAX_BATCH
from ..kernels.norm.quantize_int8 import quantize_int8
from .kept_graph import Piece
from .norm import FusedNorm, Given, Normed, floats
from .projection import KernelProjection, Projection, no_integers
from .rotation import Rotation
from .snapshot import Snapshot, of_class


@dataclass
class Form:
    """What a fused class knows of one module; it is outside the module's tree of parameters.

    original  the module's own class.
    kept      parts of its graph that are built once, by name.
    watched   what the projections and the rotation of ``pieces`` were made of, as one.
    fusings   `Form.changes` when these two were made: they may hold what is fused of the modules
              below.
    """

    original: type[nn.Module]
    kept: dict[str, Piece] = field(default_factory=dict, kw_only=True, repr=False, compare=False)
    watched: Snapshot | None = field(default=None, kw_only=True, repr=False, compare=False)
    fusings: int = field(default=0, kw_only=True, repr=False, compare=False)
    pieces: ClassVar[tuple[str, ...]] = ()
    changes: ClassVar[int] = 0

    def holds(self) -> bool:
        """Whether what is fused is still what the module has."""
        fused = (getattr(self, piece) for piece in self.pieces)
        return all(f.holds() for f in fused if isinstance(f, Fused))

    def snapshot(self) -> Snapshot | None:
        """What its projections and its rotation were made of; None without any."""
        if self.fusings != Form.changes:
            self.renew()
        return self.watched

    def renew(self) -> None:
        """Forget what was made before the fusions changed."""
        self.kept.clear()
        pieces = (getattr(self, name) for name in self.pieces)
        held = [p.snapshot for p in pieces if isinstance(p, Projection | Rotation)]
        self.watched = Snapshot.joined(held) if held else None
        self.fusings = Form.changes

    def empty(self) -> bool:
        """Whether no fusion is left in it."""
        return not any(getattr(self, piece) for piece in self.pieces)


Fused = Projection | Rotation | FusedNorm | Snapshot


class Run(NamedTuple):
    """How one call is run; a graph that is kept is of one of them.

    on      what runs kernels.
    kept    whether by graphs that are kept: not for long inputs, each of which would have another.
    rounds  whether activations are rounded to int8, where what reads them takes that.
    """

    on: Backend
    kept: bool
    rounds: bool = False

    @classmethod
    def of(cls, x: mx.array | Normed) -> Run:
        """How x ``[..., K]`` is run; activations are rounded if x was normed for that."""
        on, rounds = backend(), isinstance(x, Normed)
        x = floats(x)
        return cls(on, on.keeps and x.size <= MAX_BATCH * x.shape[-1], rounds)


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

    def part(
        self,
        run: Run,
        function: Callable[..., Any],
        children: Callable[[], Iterable[tuple[nn.Module, str]]],
        *arrays: Any,
    ) -> Any:
        """``function(run, *arrays)``, a method of this module; see `Piece`."""
        if not run.kept:
            return function(run, *arrays)
        form: Form = self._fused
        if form.fusings != Form.changes:
            form.renew()
        piece = form.kept.get(function.__name__)
        if piece is None:
            piece = form.kept[function.__name__] = Piece(function, children())
        return piece(run, *arrays)


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
    x: mx.array | Int8Activations,
    residual: mx.array | None,
    on: Backend,
) -> mx.array:
    """The parent's linear ``name`` of x, plus ``residual``, in one dispatch where that can be."""
    if isinstance(x, Int8Activations):
        assert isinstance(projection, KernelProjection)
        return projection.integers(x, residual)[0]
    if residual is None:
        y: mx.array = parent[name](x)
        return y
    added = None if projection is None else projection.added(x, residual, on)
    return residual + parent[name](x) if added is None else added


def rounded(projection: Projection | None, x: mx.array) -> mx.array | Int8Activations:
    """x as the codes of `quantize_int8`, if that is what the projection takes."""
    return quantize_int8(x) if no_integers(projection) is None else x


def readable(projection: Projection | None, x: Given) -> mx.array | Int8Activations:
    """What a reader of a norm is called with: the codes, if there are any and it takes them."""
    if not isinstance(x, Normed):
        return x
    codes = x.int8
    return x.floats if codes is None or no_integers(projection) is not None else codes


def split(projection: Projection, x: Given, on: Backend) -> Sequence[mx.array] | None:
    """`Projection.split` of what a norm gives; None if the linears are to be called with floats."""
    read = readable(projection, x)
    if isinstance(read, Int8Activations):
        assert isinstance(projection, KernelProjection)
        return projection.integers(read, split=True)
    return projection.split(read, on)


def replacing(module: nn.Module, children: dict[str, Callable[..., Any]]) -> nn.Module:
    """The module as its own code sees it for one call, with something else for some children."""
    other: nn.Module = type(module).__new__(type(module))
    vars(other).update(vars(module))
    dict.update(other, module)
    dict.update(other, children)
    return other
