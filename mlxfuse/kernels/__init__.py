from ._kernel import (
    Prepared,
    assumed,
    assuming_metal,
    counts,
    disabled,
    fallbacks,
    launches,
    opaque,
    ready,
    summary,
    unavailable,
    wanted,
)

__all__ = [
    "Prepared",
    "assumed",
    "assuming_metal",
    "counts",
    "disabled",
    "fallbacks",
    "launches",
    "opaque",
    "ready",
    "summary",
    "unavailable",
    "wanted",
]
