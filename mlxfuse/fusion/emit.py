"""How a fusion is made and taken off again."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import mlx.nn as nn

from ..nn.fused import Form, FusedModule, adopt, release
from .candidates import Candidate


class Piece(NamedTuple):
    """What a fusion gives one module.

    mixin  the fused class, with the module's own.
    form   of the module, if it has none yet.
    name   of the form's attribute that is set.
    make   makes its value.
    """

    module: nn.Module
    mixin: type[FusedModule]
    form: Form
    name: str
    make: Callable[[], Any]


def same(value: Any) -> Callable[[], Any]:
    """What makes a value that there is."""
    return lambda: value


def candidate(
    name: str,
    score: float,
    path: str,
    absorbed: Iterable[str],
    pieces: list[Piece],
    explain: str,
    formats: tuple[str, ...] = (),
) -> Candidate:
    """The candidate that sets ``pieces``.

    Args:
        absorbed: names of children, below ``path``, that are no more called.
    """
    claims = frozenset(f"{path}.{child}" if path else child for child in absorbed)

    def emit() -> None:
        for piece in pieces:
            held = adopt(piece.module, piece.mixin, piece.form)
            if not getattr(held, piece.name):
                setattr(held, piece.name, piece.make())

    def undo() -> None:
        for piece in pieces:
            held = vars(piece.module).get("_fused")
            if held is not None:
                setattr(held, piece.name, getattr(type(piece.form), piece.name))
                release(piece.module)

    return Candidate(name, score, path, claims, emit, undo, explain, formats)
