"""Every environment variable that mlxfuse reads, and nothing else reads them.

Values are read at call time, so a test or a script may change them.
"""

from __future__ import annotations

import os
from pathlib import Path

# name -> (default, meaning); the README's table is generated from this.
VARIABLES: dict[str, tuple[str, str]] = {
    "MLXFUSE_CACHE": ("", "cache folder (default: ~/.cache/mlxfuse, ~/Library/Caches/mlxfuse)"),
    "MLXFUSE_CPU_BLAS": ("1", "0: on CPU use only MLX's own matmul, not numpy's BLAS"),
    "MLXFUSE_KERNELS": (
        "auto",
        "auto, metal (raise instead of falling back), reference, or emulated (a checkout only)",
    ),
}


def get(name: str) -> str:
    """The value of a variable of the table, or its default."""
    return os.environ.get(name, VARIABLES[name][0])


def cache_dir() -> Path:
    """The user's cache folder for mlxfuse; it is not created here."""
    chosen = get("MLXFUSE_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    if os.uname().sysname == "Darwin":
        return Path.home() / "Library" / "Caches" / "mlxfuse"
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "mlxfuse"
