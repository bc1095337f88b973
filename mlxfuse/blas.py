"""Which BLAS multiplies matrices on MLX's CPU back-end, and how to get a fast one.

MLX's Linux wheel is linked against the reference BLAS, some 25 times slower than
OpenBLAS. A system OpenBLAS or MKL that is in the process's global symbol scope before
MLX is imported takes the reference one's place for all of MLX; where there is none,
``nn.cpu`` multiplies with numpy, whose wheel carries an OpenBLAS of its own.
``python -m tests.bench.bench_cpu`` measures both.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import functools
import sys

from . import env

# A symbol that only this library has -> its name.
_MARKS = {"openblas_get_config": "openblas", "MKL_Get_Version": "mkl"}


def preload() -> str | None:
    """Put a system OpenBLAS in MLX's place for its BLAS; returns its file name, if any.

    Does nothing once MLX is loaded (its symbols are bound), on macOS (MLX uses
    Accelerate there), or under ``MLXFUSE_CPU_BLAS=0``.
    """
    if sys.platform != "linux" or "mlx.core" in sys.modules or env.get("MLXFUSE_CPU_BLAS") == "0":
        return None
    if in_use() != "reference":
        return None
    found = ctypes.util.find_library("openblas")
    if found is None:
        return None
    try:
        ctypes.CDLL(found, mode=ctypes.RTLD_GLOBAL)
    except OSError:
        return None
    in_use.cache_clear()
    return found


@functools.cache
def in_use() -> str:
    """The BLAS that MLX's CPU back-end calls: accelerate, openblas, mkl or reference."""
    if sys.platform == "darwin":
        return "accelerate"
    everywhere = ctypes.CDLL(None)
    return next((name for mark, name in _MARKS.items() if hasattr(everywhere, mark)), "reference")


def numpy_is_faster() -> bool:
    """True where numpy's own BLAS beats MLX's CPU matmul and is not turned off."""
    return env.get("MLXFUSE_CPU_BLAS") != "0" and in_use() == "reference"
