"""Run GGUF files in MLX at the file's own precision, with fused Metal kernels.

Importing this package is cheap: mlx, mlx-lm and transformers are imported when
``load`` is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .errors import (
    DownloadError,
    GGUFError,
    KernelError,
    MLXFuseError,
    ModelRefError,
    UnsupportedError,
)

if TYPE_CHECKING:
    from .load import load

__version__ = "0.1.0"

__all__ = [
    "DownloadError",
    "GGUFError",
    "KernelError",
    "MLXFuseError",
    "ModelRefError",
    "UnsupportedError",
    "__version__",
    "load",
]

# Public name -> the module that defines it; resolved on first use (PEP 562).
_LAZY = {"load": "load"}


def __getattr__(name: str) -> object:
    module = _LAZY.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    from . import blas

    blas.preload()  # before mlx is imported
    value = getattr(import_module(f".{module}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
