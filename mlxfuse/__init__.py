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
    PatchError,
    UnsupportedError,
)

if TYPE_CHECKING:
    from .fusion import PatchReport, patch_model, register_detector, unpatch_model
    from .loader import load

__version__ = "0.1.0"

__all__ = [
    "DownloadError",
    "GGUFError",
    "KernelError",
    "MLXFuseError",
    "ModelRefError",
    "PatchError",
    "PatchReport",
    "UnsupportedError",
    "__version__",
    "load",
    "patch_model",
    "register_detector",
    "unpatch_model",
]

# Public name -> the module that defines it; resolved on first use (PEP 562).
_LAZY = {
    "load": "loader",
    "PatchReport": "fusion",
    "patch_model": "fusion",
    "register_detector": "fusion",
    "unpatch_model": "fusion",
}


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
