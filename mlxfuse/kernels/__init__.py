from ._kernel import (
    assumed,
    assuming_metal,
    counts,
    fallbacks,
    launches,
    opaque,
    summary,
    unavailable,
    wanted,
)

__all__ = [
    "assumed",
    "assuming_metal",
    "counts",
    "fallbacks",
    "launches",
    "opaque",
    "summary",
    "unavailable",
    "wanted",
]
