"""`mlxfuse bench kernels`: each kernel beside its own address floor and beside MLX's operation."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import mlx.core as mx

from .. import env
from ..errors import KernelError
from ..kernels import unavailable
from ..kernels.matmul.product import Call
from ..kernels.runtime import kernel as _kernel
from ..kernels.runtime import self_test
from ..kernels.runtime.kernel import Launch, Recorded
from . import static
from .cases import Case, Sizes, cases
from .floor import floor
from .machine import environment
from .measure import alternate, seconds

_MESSAGES = 20_000  # characters that are kept of a compiler's messages


def bench_kernels(
    *,
    repetitions: int,
    pause: float = 0.0,
    sizes: Sizes = Sizes(),  # noqa: B008 (frozen)
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Compare, then time, every kernel; everything as plain data, ready for JSON.

    ``rows`` has what was timed, with the static figures of each dispatch and what the time says
    of them. ``refused`` has what does not compile or is wrong, with the compiler's messages or
    how the result differs: it is not timed.

    Raises:
        KernelError: there is no Metal device.
    """
    on_device("kernels are timed")
    say("measuring the machine's bandwidth")
    found: dict[str, Any] = {
        "bench": "kernels",
        "environment": environment(),
        "repetitions": repetitions,
        "pause": pause,
        "notes": list(static.NOTES),
        "rows": [],
        "refused": [],
    }
    for case in cases(sizes):
        say(f"timing {case.name}")
        row, failure = measure(case, repetitions, pause=pause)
        if failure:
            found["refused"].append({**row, "failure": failure})
            continue
        row["share"] = row["gb_s"] * 1e9 / found["environment"]["bandwidth"]
        found["rows"].append(row)
    return found


def on_device(what: str) -> None:
    """
    Raises:
        KernelError: there is no Metal device that ``what`` can be done on.
    """
    reason = unavailable()
    if reason is None and env.get("MLXFUSE_KERNELS") == "emulated":
        reason = "emulated kernels would measure the emulation"
    if reason is not None:
        raise KernelError(f"{what} on a Metal device only: {reason}")


def measure(
    case: Case,
    repetitions: int,
    *,
    pause: float = 0.0,
    emulated: bool = False,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[dict[str, Any], str]:
    """One row: the kernel, its floor and MLX's operation, in turns; times of one launch.

    Also why there are no times: the compiler's messages, or how the result differs from the
    reference's; else an empty text.
    """
    recorded = [r for call in case.ours for r in self_test.calls(call)]
    kernel, arguments = recorded[0]
    dispatches = static.figures(kernel.launch(*arguments).chain())
    row: dict[str, Any] = {
        "kernel": kernel.name,
        "case": case.name,
        "mlx": case.against,
        "variant": getattr(arguments[0], "variant", "") or "default",
        "programs": dispatches,
    }
    small = kernel.launch(*kernel.small(*arguments))
    try:
        first = seconds(lambda: self_test.attempt(small, emulated=emulated), clock)
    except KernelError as error:
        return row, str(error)[:_MESSAGES]
    if wrong := self_test.compare(kernel, arguments, emulated=emulated):
        return row, wrong
    times = _times(case, recorded, repetitions, pause, emulated, clock)
    times["estimate"] = static.judge(dispatches, times["floor_ratio"])
    return {**row, "first_ms": first * 1e3, **times}, ""


def _times(
    case: Case,
    recorded: list[Recorded],
    repetitions: int,
    pause: float,
    emulated: bool,
    clock: Callable[[], float],
) -> dict[str, Any]:
    """Of one launch, in turns."""
    launches = [k.launch(*a) for k, a in recorded]
    floors = [f for r in recorded for f in floors_of(r)]

    def run(launches: list[Launch]) -> None:
        mx.eval([_kernel.run(launch, emulated=emulated) for launch in launches])

    turns: dict[str, Callable[[], object]] = {"kernel": partial(run, launches)}
    if floors:
        turns["floor"] = partial(run, floors)
    turns["mlx"] = lambda: mx.eval([operation() for operation in case.mlx])
    for turn in turns.values():
        turn()
    timed = {name: partial(seconds, turn, clock) for name, turn in turns.items()}
    taken = alternate(timed, repetitions, pause=pause)
    each = {name: statistics.median(times) / len(launches) for name, times in taken.items()}
    moved = nbytes(recorded[0])
    return {
        "bytes": moved,
        "median_ns": each["kernel"] * 1e9,
        "floor_ns": each["floor"] * 1e9 if "floor" in each else None,
        "mlx_ns": each["mlx"] * 1e9,
        "gb_s": moved / each["kernel"] / 1e9,
        "floor_ratio": each["kernel"] / each["floor"] if "floor" in each else None,
        "mlx_ratio": each["kernel"] / each["mlx"],
        "samples_ns": [round(s * 1e9 / len(launches)) for s in taken["kernel"]],
    }


def floors_of(recorded: Recorded) -> list[Launch]:
    """The kernel's own loads without its arithmetic; where it does little, all bytes of its
    dispatches moved once; none where it computes more than it reads.
    """
    kernel, arguments = recorded
    call = arguments[0]
    if not isinstance(call, Call):
        return [floor(launch) for launch in kernel.launch(*arguments).chain()]
    return [] if call.kind in ("prompt", "grouped") else [kernel.launch(replace(call, floor=True))]


def nbytes(recorded: Recorded) -> int:
    """Of all inputs and outputs of its dispatches; of experts, the chosen ones."""
    kernel, arguments = recorded
    call, total = arguments[0], 0
    for launch in kernel.launch(*arguments).chain():
        outputs = zip(launch.shapes, launch.dtypes, strict=True)
        total += sum(a.nbytes for a in launch.arrays)
        total += sum(math.prod(s) * d.size for s, d in outputs)
    if isinstance(call, Call) and call.experts is not None:
        experts = call.weight.experts or 1
        total -= call.weight.nbytes // experts * max(0, experts - call.experts.ids.size)
    return total
