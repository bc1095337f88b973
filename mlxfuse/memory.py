"""How much memory a process may still take."""

from __future__ import annotations

import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from . import env
from .errors import MLXFuseError


def available() -> int:
    """Bytes that can be allocated without swapping, as far as the system tells.

    Linux: ``MemAvailable``, or what the control group leaves if that is less. Elsewhere half of
    the physical memory.
    """
    try:
        meminfo = Path("/proc/meminfo").read_text()
    except OSError:
        return _physical() // 2
    found = re.search(r"^MemAvailable:\s*(\d+) kB", meminfo, re.MULTILINE)
    free = int(found[1]) * 1024 if found else 0
    group = _cgroup()
    return free if group is None else min(free, group)


@dataclass(frozen=True, slots=True)
class Machine:
    """What a model can use.

    kernels   matrices stay as they are in the file, where their type has a kernel.
    budget    bytes that weights, caches and temporaries may take together.
    physical  bytes of memory.
    """

    kernels: bool
    budget: int
    physical: int


def machine() -> Machine:
    """This machine, without asking MLX; or the Mac with the memory that ``MLXFUSE_MEMORY`` says.

    Raises:
        MLXFuseError: ``MLXFUSE_MEMORY`` is no number of GB.
    """
    if told := env.get("MLXFUSE_MEMORY"):
        size = int(told) if told.isdecimal() and len(told) < 7 else 0
        if not size:
            raise MLXFuseError(f"MLXFUSE_MEMORY is {told!a}; expected a Mac's memory in GB, as 64")
        return mac(size << 30)
    if sys.platform == "darwin":
        return mac(_physical())
    return Machine(False, available(), _physical())


def mac(physical: int) -> Machine:
    """A Mac with so many bytes: Metal recommends two thirds up to 36 GB, above three quarters."""
    large = physical > 36 << 30
    return Machine(True, physical * 3 // 4 if large else physical * 2 // 3, physical)


def _physical() -> int:
    return int(os.sysconf("SC_PHYS_PAGES")) * int(os.sysconf("SC_PAGE_SIZE"))


def _cgroup(root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """What the version 2 control group at ``root`` leaves, page cache not counted; else None."""
    try:
        limit = (root / "memory.max").read_text().strip()
        used = re.search(r"^anon (\d+)", (root / "memory.stat").read_text(), re.MULTILINE)
    except OSError:
        return None
    if limit == "max" or used is None:
        return None
    return max(0, int(limit) - int(used[1]))
