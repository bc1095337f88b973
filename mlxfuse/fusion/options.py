"""Which fusions are wanted, and where."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

from .. import env
from ..errors import FusionNameError
from ..kernels import unavailable
from .candidates import DETECTORS

# Not a detector's: made of what is fused, if ``act_quant`` asks for it.
LATER = ("int8",)


@dataclass(frozen=True)
class Choice:
    """Names of fusions, and those of them that are off at some paths.

    names    in the order they are reported.
    off      (name, pattern of paths, who says so).
    tuned    leave out what `mlxfuse tune` has measured to be slower.
    nothing  why there are no names although they were asked for; empty if they were not.
    """

    names: tuple[str, ...]
    off: tuple[tuple[str, str, str], ...] = ()
    tuned: bool = False
    nothing: str = ""

    def __bool__(self) -> bool:
        return bool(self.names)

    def refusal(self, name: str, path: str) -> str | None:
        """Why a fusion is not wanted at a path, or None."""
        for wanted, pattern, source in self.off:
            if wanted == name and fnmatchcase(path, pattern):
                return f"switched off by {source}"
        return None


def chosen(fuse: str | Iterable[str]) -> Choice:
    """What ``fuse`` and ``MLXFUSE_DISABLE`` ask for.

    Raises:
        FusionNameError: no such fusion.
        TypeError: ``fuse`` is neither text nor texts.
    """
    items = _items(fuse)
    off = [_entry(item[1:], "fuse") for item in items if item.startswith("-")]
    off += [_entry(item, "MLXFUSE_DISABLE") for item in _items(env.get("MLXFUSE_DISABLE"))]
    items = [item for item in items if not item.startswith("-")] or ["auto"]
    if items == ["off"]:
        return Choice((), tuple(off))
    if items == ["auto"] and (reason := unavailable()) is not None:
        return Choice((), tuple(off), nothing=reason)
    if items in (["auto"], ["all"]):
        return Choice(tuple(DETECTORS), tuple(off), items == ["auto"])
    only = [_entry(item, "fuse") for item in items]
    wanted = {name for name, _, _ in only}
    names = tuple(name for name in DETECTORS if name in wanted)
    return Choice(names, tuple(off))


def _items(given: str | Iterable[str]) -> list[str]:
    items = given.split(",") if isinstance(given, str) else given
    if not isinstance(items, Iterable) or not all(isinstance(item, str) for item in items):
        raise TypeError(
            "fuse is auto, all, off or names of fusions, as one text with commas or several; "
            f"found {given!r}"
        )
    return [item.strip() for item in items if item.strip()]


def _entry(item: str, source: str) -> tuple[str, str, str]:
    """``name`` or ``name:pattern``."""
    name, _, pattern = item.partition(":")
    if name not in (*DETECTORS, *LATER):
        also = "auto, all, off or " if source == "fuse" else ""
        names = ", ".join((*DETECTORS, *LATER))
        raise FusionNameError(f"{source} takes {also}names: {names}; found {name or repr(item)}")
    return name, pattern or "*", source
