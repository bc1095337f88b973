"""How much memory a process may still take."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path


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


def budget() -> int:
    """About what a model and its cache may take here, for those that do not ask MLX.

    Macs: two thirds of the memory, the least that Metal recommends. Elsewhere `available`.
    """
    return available() if sys.platform != "darwin" else _physical() * 2 // 3


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
