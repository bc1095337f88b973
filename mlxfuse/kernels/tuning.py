"""Which of a kernel's built-in variants runs, where `mlxfuse tune` has measured it."""

from __future__ import annotations

import hashlib
from functools import cache

from ._source import metal_dir


@cache
def source_hash() -> str:
    """Of all Metal sources: 12 digits that change when any of them does."""
    found = hashlib.sha256()
    for path in sorted(metal_dir().iterdir()):
        found.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return found.hexdigest()[:12]
