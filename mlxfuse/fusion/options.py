"""Which fusions are wanted, and where."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

from .. import env
from ..kernels import unavailable
from .candidates import DETECTORS

# Not a detector's: made of what is fused, if ``act_quant`` asks for it.
LATER = ("int8",)


@dataclass(frozen=True)
class Choice:
    """Names of fusions, and those of them that are off at some paths.

    names  in the order they are reported.
    off    (name, pattern of paths, who says so).
    tuned  leave out what `mlxfuse tune` has measured to be slower.
    """

    names: tuple[str, ...]
    off: tuple[tuple[str, str, str], ...] = ()
    tuned: bool = False

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
        ValueError: no such fusion.
    """
    items = _items(fuse)
    off = [_entry(item[1:], "fuse") for item in items if item.startswith("-")]
    off += [_entry(item, "MLXFUSE_DISABLE") for item in _items(env.get("MLXFUSE_DISABLE"))]
    items = [item for item in items if not item.startswith("-")] or ["auto"]
    if items == ["off"] or (items == ["auto"] and unavailable() is not None):
        return Choice((), tuple(off))
    if items in (["auto"], ["all"]):
        return Choice(tuple(DETECTORS), tuple(off), items == ["auto"])
    only = [_entry(item, "fuse") for item in items]
    wanted = {name for name, _, _ in only}
    names = tuple(name for name in DETECTORS if name in wanted)
    return Choice(names, tuple(off))


def _items(given: str | Iterable[str]) -> list[str]:
    items = given.split(",") if isinstance(given, str) else given
    return [item.strip() for item in items if item.strip()]


def _entry(item: str, source: str) -> tuple[str, str, str]:
    """``name`` or ``name:pattern``."""
    name, _, pattern = item.partition(":")
    if name not in (*DETECTORS, *LATER):
        also = "auto, all, off or " if source == "fuse" else ""
        raise ValueError(f"{source} is {also}of {', '.join(DETECTORS)}; found {name}")
    return name, pattern or "*", source
