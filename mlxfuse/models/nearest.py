"""What to tell of a file whose architecture is not in the table; numpy only."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from .architectures import ARCHITECTURES, REFUSED

if TYPE_CHECKING:
    from ..gguf.reader import GGUFFile

_TENSOR = re.compile(r"blk\.\d{1,6}\.([^.]+(?:\.[^.]+)*?)(?:\.weight|\.bias)?")


def missing(name: str) -> str:
    """What is missing for an architecture that is known; empty for others."""
    return f"what is missing: {REFUSED[name]}" if name in REFUSED else ""


def nearest(file: GGUFFile) -> str:
    """Which architecture's layers have the most tensors in common with the file's, and which they
    do not; and where to read how to add one. Empty if the file has no layers.
    """
    found = {match[1] for name in file.tensors if (match := _TENSOR.fullmatch(name))}
    if not found:
        return ""
    tables = {
        arch.name: {name for table in arch.tables for name in table}
        for arch in ARCHITECTURES.values()
    }
    name = min(tables, key=lambda n: (len(tables[n] ^ found), n))
    apart = []
    if extra := sorted(found - tables[name]):
        apart.append("but for " + _some(extra))
    if lacking := sorted(tables[name] - found):
        apart.append("without " + _some(lacking))
    how = ", ".join(apart) or "and no others, though what is done with them may differ"
    return (
        f"its layers have the tensors of {name}, {how}; "
        ".github/CONTRIBUTING.md of the source says how to add an architecture"
    )


def _some(names: list[str]) -> str:
    return ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")
