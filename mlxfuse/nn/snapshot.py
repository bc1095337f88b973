"""What something fused was made of, and whether the modules still have it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import mlx.core as mx

_IN_PLACE = (
    "__setitem__",
    *("__iadd__", "__isub__", "__imul__", "__itruediv__", "__ifloordiv__", "__imod__"),
    *("__ipow__", "__imatmul__", "__iand__", "__ior__", "__ixor__", "__ilshift__", "__irshift__"),
)


def of_class(kind: type, made: Any) -> tuple[Any, ...]:
    """What `object.__reduce_ex__` gives, for a copy or a pickle that is of another class."""
    _, _, *rest = made
    return _new, (kind,), *rest


def _new(kind: Any) -> object:
    return kind.__new__(kind)


class Watched(mx.array):
    """An array that something fused was made of; once it is changed in place, it is a plain array.

    ``w *= 3`` and ``w[...] = 0`` give the same Python object another value, which neither joined
    rows nor a kept graph would notice. An array is watched by making this its class, so nothing
    is copied and reading it costs what it did. A copy or a pickle of it is a plain array.

    edits  changes so far, of all watched arrays.
    """

    __slots__ = ()
    edits: ClassVar[int] = 0

    def __reduce_ex__(self, protocol: Any) -> Any:
        return of_class(mx.array, super().__reduce_ex__(protocol))


def _counted(name: str) -> Callable[..., Any]:
    plain = getattr(mx.array, name)

    def change(self: mx.array, *arguments: Any) -> Any:
        found = plain(self, *arguments)
        Watched.edits += 1
        _become(self, mx.array)
        return found

    return change


def _become(array: mx.array, kind: type[mx.array]) -> None:
    object.__setattr__(array, "__class__", kind)


for _name in _IN_PLACE:
    setattr(Watched, _name, _counted(_name))


class Snapshot:
    """Entries of mappings as they are now; the arrays among them are watched.

    Args:
        items: (what gives an entry by its name, the name).
    """

    __slots__ = ("_edits", "_held")

    def __init__(self, items: Iterable[tuple[Callable[[str], object], str]]) -> None:
        self._held = [(get, name, get(name)) for get, name in items]
        for _, _, value in self._held:
            if type(value) is mx.array:
                _become(value, Watched)
        self._edits = Watched.edits

    @classmethod
    def joined(cls, parts: Iterable[Snapshot]) -> Snapshot:
        """The entries of several, to be looked at in one go."""
        made = cls(())
        made._held = [entry for part in parts for entry in part._held]
        made._edits = -1  # nobody has looked yet
        return made

    def holds(self) -> bool:
        """Whether the entries are the same objects, and no array was changed in place.

        They are not after an update, nor inside a gradient with respect to them.
        """
        for get, name, value in self._held:
            if get(name) is not value:
                return False
        return self._edits == Watched.edits or self._unchanged()

    def _unchanged(self) -> bool:
        edits = Watched.edits
        arrays = (value for _, _, value in self._held if isinstance(value, mx.array))
        if not all(type(array) is Watched for array in arrays):
            return False
        self._edits = edits  # they were others
        return True
