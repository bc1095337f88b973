"""Kernels: functions of MLX arrays, each with its Metal source and its meaning in MLX operations.

Nothing here knows of models or modules; that is ``nn``.
"""

from .kv.codes import KVCodes, PackedCodes, pack_codes
from .runtime.backend import (
    Backend,
    backend,
    counts,
    disabled,
    fallbacks,
    launches,
    summary,
    unavailable,
    using,
)
from .runtime.kernel import Prepared

__all__ = [
    "Backend",
    "KVCodes",
    "PackedCodes",
    "Prepared",
    "backend",
    "counts",
    "disabled",
    "fallbacks",
    "launches",
    "pack_codes",
    "summary",
    "unavailable",
    "using",
]
