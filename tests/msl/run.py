"""Launch a compiled kernel on numpy buffers; turn what the runtime found into a readable report."""

from __future__ import annotations

import ctypes
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from .build import Library, load, load_runtime, with_lines
from .counts import Counts, CTraffic
from .errors import MslRunError
from .source import KERNEL_FILE

# By the runtime's enum Kind.
KINDS = (
    "ok",
    "out-of-bounds",
    "data-race",
    "uninitialised-read",
    "divergent-barrier",
    "divergent-simd",
    "undefined-behaviour",
    "read-only-write",
    "threadgroup-memory",
    "launch",
    "internal",
    "fault",
    "unwritten-output",
    "runaway",
    "misaligned",
)  # and "order-dependent", which emulate.py finds
Order = Literal["ascending", "descending", "random"]
ORDERS: tuple[Order, ...] = ("ascending", "descending", "random")
Size = tuple[int, int, int]


@dataclass
class Buffer:
    """A buffer argument. ``use``: ``"in"``, ``"out"`` (starts as NaN) or ``"inout"``."""

    name: str
    array: np.ndarray[Any, Any]
    use: Literal["in", "out", "inout"] = "in"


@dataclass(frozen=True)
class Schedule:
    """How threads are run.

    Attributes:
        order: in which order the threads of a SIMD-group and the SIMD-groups run.
        seed: of the random order.
        threads: host threads (a checked build always uses one).
        seconds: time limit of the launch.
        threadgroup_bytes: threadgroup memory there is; every Mac has 32 KiB.
        flush_denormals: as MLX's Metal kernels do.
    """

    order: Order = "ascending"
    seed: int = 1
    threads: int = 2
    seconds: int = 60
    threadgroup_bytes: int = 32768
    flush_denormals: bool = False


@dataclass(frozen=True)
class Report:
    """What a launch used: threadgroup memory in bytes, SIMD-group operations, fiber switches.

    ``counts`` is what it moved, if that was asked for.
    """

    threadgroup_bytes: int
    exchanges: int
    switches: int
    counts: Counts | None = None


class _Buffer(ctypes.Structure):
    _fields_ = (
        ("ptr", ctypes.c_void_p),
        ("size", ctypes.c_uint64),
        ("name", ctypes.c_char_p),
        ("writable", ctypes.c_uint32),
        ("initialised", ctypes.c_uint32),
    )


class _Options(ctypes.Structure):
    _fields_ = (
        ("order", ctypes.c_uint32),
        ("seed", ctypes.c_uint32),
        ("threads", ctypes.c_uint32),
        ("checked", ctypes.c_uint32),
        ("flush_denormals", ctypes.c_uint32),
        ("tg_limit", ctypes.c_uint32),
        ("seconds", ctypes.c_uint32),
        ("pad", ctypes.c_uint32),
        ("code_lo", ctypes.c_uint64),
        ("code_hi", ctypes.c_uint64),
        ("traffic", ctypes.POINTER(CTraffic)),
    )


class _Report(ctypes.Structure):
    _fields_ = (
        ("kind", ctypes.c_uint32),
        ("tg", ctypes.c_uint32 * 3),
        ("thread", ctypes.c_uint32),
        ("lane", ctypes.c_uint32),
        ("simdgroup", ctypes.c_uint32),
        ("tg_bytes", ctypes.c_uint32),
        ("pc", ctypes.c_uint64),
        ("other_pc", ctypes.c_uint64),
        ("addr", ctypes.c_uint64),
        ("switches", ctypes.c_uint64),
        ("exchanges", ctypes.c_uint64),
        ("tg_barriers", ctypes.c_uint64),
        ("sg_barriers", ctypes.c_uint64),
        ("message", ctypes.c_char * 1024),
    )


_NO_THREAD = 2**32 - 1


def where(library: Library, pc: int) -> str:
    """Source lines of an address, innermost first, without those of the shim."""
    low = load(library.path)[2]
    found = subprocess.run(
        ["addr2line", "-i", "-s", "-e", str(with_lines(library)), hex(pc - low - 1)],
        capture_output=True,
        text=True,
        check=False,
    ).stdout
    lines = [re.sub(r" \(discriminator \d+\)", "", line) for line in found.splitlines()]
    return " <- ".join(x for x in lines if x.startswith(f"{KERNEL_FILE}:")) or "an unknown line"


def _explain(library: Library, report: _Report) -> MslRunError:
    kind = KINDS[report.kind]
    text = f"{kind}: {report.message.decode(errors='replace')}\n  in {library.name}"
    if kind not in ("unwritten-output", "launch", "internal") and report.thread != _NO_THREAD:
        text += (
            f", threadgroup {tuple(report.tg)}, thread {report.thread} "
            f"(simdgroup {report.simdgroup}, lane {report.lane})"
        )
    if report.pc:
        text += f"\n  at {where(library, report.pc)}"
    if report.other_pc:
        text += f"\n  other thread at {where(library, report.other_pc)}"
    return MslRunError(kind, text)


def launch(
    library: Library,
    buffers: Sequence[Buffer],
    grid: Size,
    threadgroup: Size,
    schedule: Schedule | None = None,
    count: bool = False,
) -> Report:
    """Run one dispatch; outputs are written into their arrays.

    Args:
        library: from ``compile_kernel``.
        buffers: by buffer index; arrays are C-contiguous.
        grid: threads along each axis (``dispatchThreads``).
        threadgroup: threads of a threadgroup along each axis.
        schedule: how threads are run.
        count: count what is read and written; needs a build that reports accesses, and
            ``"counted"`` for figures that mean something.

    Raises:
        MslRunError: what was found, with buffer, thread and source line.
    """
    schedule = schedule or Schedule()
    names = library.translation.buffers
    if tuple(b.name for b in buffers) != names:
        raise ValueError(f"buffers {[b.name for b in buffers]}; the kernel takes {list(names)}")
    if len(buffers) > 31:
        raise MslRunError("launch", f"{len(buffers)} buffer arguments; Metal allows 31")
    if count and library.build == "fast":
        raise ValueError("the fast build does not report accesses; count in 'counted'")
    _, entry, low, high = load(library.path)
    arguments = (_Buffer * max(1, len(buffers)))()
    for argument, b in zip(arguments, buffers, strict=False):
        if not b.array.flags.c_contiguous:
            raise ValueError(f"buffer '{b.name}' is not contiguous")
        argument.ptr = b.array.ctypes.data
        argument.size = b.array.nbytes
        argument.name = b.name.encode()
        argument.writable = b.use != "in"
        argument.initialised = b.use != "out"
    options = _Options(
        order=ORDERS.index(schedule.order),
        seed=schedule.seed,
        threads=schedule.threads,
        checked=library.build != "fast",
        flush_denormals=schedule.flush_denormals,
        tg_limit=schedule.threadgroup_bytes,
        seconds=schedule.seconds,
        code_lo=low,
        code_hi=high,
    )
    traffic = (CTraffic * (len(buffers) + 2))()
    if count:
        options.traffic = traffic
    report = _Report()
    sizes = ctypes.c_uint32 * 3
    if load_runtime().msl_run(
        entry,
        arguments,
        len(buffers),
        sizes(*grid),
        sizes(*threadgroup),
        ctypes.byref(options),
        ctypes.byref(report),
    ):
        raise _explain(library, report)
    counts = None
    if count:
        *of_buffers, of_threadgroup, of_tables = (t.copy() for t in traffic)
        counts = Counts(
            buffers=dict(zip(names, of_buffers, strict=True)),
            threadgroup=of_threadgroup,
            tables=of_tables,
            threadgroup_bytes=report.tg_bytes,
            barriers=report.tg_barriers,
            simdgroup_barriers=report.sg_barriers,
            simd_operations=report.exchanges,
        )
    return Report(report.tg_bytes, report.exchanges, report.switches, counts)
