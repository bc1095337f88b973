"""What was read off the kernels' text without a GPU, to stand beside what a Mac measures.

``static.json`` has a row for each program of `mlxfuse bench kernels`. A checkout's
``python -m tests.bench.bench_static --golden`` writes it, with the compiler of another GPU and an
emulation that counts. Every row has a digest of the text that it was read off, and is used for no
other text.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from ..kernels.runtime.kernel import Launch
from ..kernels.runtime.source import header

TABLE = Path(__file__).with_name("static.json")

# Of one GPU core, in bytes and threads: github.com/philipturner/metal-benchmarks, measured on M1
# and M2 and not Apple's figures; later GPUs share one memory among the three.
REGISTER_FILE, THREADGROUP_MEMORY, THREADS = 208 << 10, 60 << 10, 3072

NOTES = (
    "Static figures are of another GPU's compiler and of an emulation, for one small launch: "
    "registers, bytes of stack, and bytes spilled where a thread has 128 registers; the threads "
    "that a GPU core holds at once; pieces of 32 bytes that loads and stores touch, over the "
    "fewest that hold as much; barriers; loads from constant tables for 1,000 bytes read.",
    "MLX does not tell what Metal made of a program (registers, occupancy), and it keeps the "
    "compiler's messages only of a program that Metal refuses. `first_ms` is a program's first "
    "launch, which compiles it unless macOS kept it from an earlier run.",
)

# What is no reason for a kernel to be slower than its floor.
_SLOW = 1.15  # of the floor
_LEAST_THREADS = 512
_LIMITS = {"stack": 0, "spilled": 0, "table_loads": 1.0, "loads": 4.0, "stores": 1.1}
_NAMES = {
    "stack": "bytes of stack",
    "spilled": "bytes spilled",
    "table_loads": "loads from tables for 1,000 bytes",
    "loads": "times the fewest pieces loaded",
    "stores": "times the fewest pieces stored",
}


def digest(launch: Launch) -> str:
    """12 digits that change with the text that Metal compiles, but for MLX's own part of it."""
    p = launch.program
    text = repr((header(p.parts), p.inputs, p.outputs, p.body, launch.template))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def resident(registers: int, memory: int, threads: int) -> int:
    """Threads that a GPU core holds at once, of threadgroups of ``threads``.

    Args:
        registers: of 32 bits, of a thread.
        memory: bytes of a threadgroup.
    """
    groups = min(
        REGISTER_FILE // (4 * registers * threads),
        THREADGROUP_MEMORY // memory if memory else THREADS,
        THREADS // threads,
    )
    return threads * groups


@cache
def table() -> dict[str, dict[str, Any]]:
    """Digest of a program's text -> its row of ``static.json``, with its name as ``program``."""
    found: dict[str, dict[str, Any]] = json.loads(TABLE.read_text("utf-8"))
    return {row["text"]: {"program": name, **row} for name, row in found.items()}


def figures(launches: Iterable[Launch]) -> list[dict[str, Any]]:
    """A row for each dispatch; of a text that nobody has read, only its digest."""
    found = []
    for launch in launches:
        text = digest(launch)
        row = table().get(text, {"program": None, "text": text})
        if row["program"] is not None:
            held = resident(row["registers"], row["memory"], row["threads"])
            row = {**row, "resident": held, "occupancy": held / THREADS}
        found.append(row)
    return found


def reasons(row: Mapping[str, Any]) -> list[str]:
    """What in a dispatch's figures would make it slower than its floor."""
    found = [
        f"{row[name]:.3g} {_NAMES[name]}" for name, most in _LIMITS.items() if row[name] > most
    ]
    if row["resident"] < _LEAST_THREADS:
        found.append(f"{row['resident']} threads to a core")
    return found


def judge(dispatches: Iterable[Mapping[str, Any]], floor_ratio: float | None) -> str:
    """What a measured time says of the figures.

    Args:
        dispatches: of `figures`.
        floor_ratio: the kernel's time over that of its floor; None without one.
    """
    rows = list(dispatches)
    if any(row["program"] is None for row in rows):
        return "no figures of this text"
    why = "; ".join(dict.fromkeys(reason for row in rows for reason in reasons(row)))
    if floor_ratio is None:
        return f"no floor to compare with; figures: {why or 'nothing that slows it'}"
    if floor_ratio <= _SLOW:
        return f"faster than its figures: {why}" if why else "as its figures say"
    return f"slow, as its figures say: {why}" if why else "SLOWER than its figures explain"
