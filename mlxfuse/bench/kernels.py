"""`mlxfuse bench kernels`: each kernel beside its own address floor and beside MLX's operation."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import mlx.core as mx

from .. import env
from ..doctor import sample
from ..errors import KernelError
from ..formats import BY_NAME
from ..kernels import _kernel, self_test, unavailable
from ..kernels._kernel import Launch
from ..kernels.dequantize import dequantize
from ..kernels.quantized_matmul import quantized_matmul
from ..kernels.rms_norm import rms_norm
from ..kernels.weight import QuantizedWeight, Segment
from .arms import nearest_bits
from .machine import environment
from .measure import alternate, seconds

SHAPES = ((4096, 4096), (14336, 4096))
ROWS = (1, 4)
# Bytes that are read before an array is read again: more than any cache of a Mac's chip.
_COLD = 256 << 20

Runner = Callable[[Launch], list[mx.array]]


@dataclass(frozen=True, slots=True)
class Case:
    """What is timed.

    name   of the format and the shape, and of MLX's operation it is beside.
    calls  of the public function, with the same sizes on different arrays.
    mlx    MLX's operation, likewise.
    """

    name: str
    calls: Sequence[Callable[[], object]]
    mlx: Sequence[Callable[[], mx.array]]


def _copies(segment: Segment, cold: int) -> list[Segment]:
    count = max(1, min(64, math.ceil(cold / segment.nbytes)))
    copies = [{n: mx.array(a) for n, a in segment.arrays.items()} for _ in range(count)]
    mx.eval(copies)
    return [replace(segment, arrays=arrays) for arrays in copies]


def matmul_cases(shapes: Sequence[tuple[int, int]], cold: int) -> Iterator[Case]:
    """Every format, every shape, one row of x and a few; beside MLX's affine weights."""
    for format in BY_NAME.values():
        if not format.kernel:
            continue
        bits = nearest_bits(format.bits_per_weight)
        for n, k in shapes:
            weights = [QuantizedWeight.whole(s) for s in _copies(sample(format, n, k), cold)]
            dense = mx.random.normal((n, k), key=mx.random.key(1)).astype(mx.float16)
            affine = [mx.quantize(dense, group_size=64, bits=bits) for _ in weights]
            mx.eval(affine)
            for rows in ROWS:
                x = mx.random.normal((rows, k), key=mx.random.key(2)).astype(mx.float16)
                yield Case(
                    f"{format.name} {n}x{k}, {rows} row{'s' * (rows > 1)} (MLX: affine{bits}g64)",
                    [partial(quantized_matmul, x, weight) for weight in weights],
                    [partial(_affine, x, arrays, bits) for arrays in affine],
                )


def _affine(x: mx.array, arrays: Sequence[mx.array], bits: int) -> mx.array:
    weight, scales, biases = arrays
    return mx.quantized_matmul(x, weight, scales, biases, transpose=True, group_size=64, bits=bits)


def dequantize_cases(shapes: Sequence[tuple[int, int]], cold: int) -> Iterator[Case]:
    """Whole matrices, as before a long prompt; beside mx.dequantize of MLX's 4 bits."""
    n, k = shapes[0]
    dense = mx.random.normal((n, k), key=mx.random.key(1)).astype(mx.float16)
    for name in ("Q4_0", "Q4_K", "Q6_K", "Q8_0"):
        segments = _copies(sample(BY_NAME[name], n, k), cold)
        affine = [mx.quantize(dense, group_size=64, bits=4) for _ in segments]
        mx.eval(affine)
        yield Case(
            f"{name} {n}x{k} (MLX: affine4g64)",
            [partial(dequantize, s, None, mx.float16) for s in segments],
            [partial(mx.dequantize, *arrays, group_size=64, bits=4) for arrays in affine],
        )


def norm_cases(shapes: Sequence[tuple[int, int]], cold: int) -> Iterator[Case]:
    """With the residual that is added before; beside an addition and mx.fast.rms_norm."""
    columns = shapes[0][1]
    weight = mx.ones(columns, mx.float16)
    for rows in (1, 512):
        x, residual = mx.random.normal((2, rows, columns)).astype(mx.float16)
        yield Case(
            f"{rows}x{columns}, residual (MLX: add, rms_norm)",
            [partial(rms_norm, x, weight, 1e-5, residual=residual)] * 16,
            [partial(_added_norm, x, residual, weight)] * 16,
        )


def _added_norm(x: mx.array, residual: mx.array, weight: mx.array) -> mx.array:
    return mx.fast.rms_norm(x + residual, weight, 1e-5)


REGISTRY = (matmul_cases, dequantize_cases, norm_cases)


def bench_kernels(
    *,
    repetitions: int,
    pause: float = 0.0,
    shapes: Sequence[tuple[int, int]] = SHAPES,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Compare, then time, every kernel; everything as plain data, ready for JSON.

    Raises:
        KernelError: there is no Metal device, or a kernel's result is wrong: nothing is timed.
    """
    reason = unavailable()
    if reason is None and env.get("MLXFUSE_KERNELS") == "emulated":
        reason = "emulated kernels would measure the emulation"
    if reason is not None:
        raise KernelError(f"kernels are timed on a Metal device only: {reason}")
    say("measuring the machine's bandwidth")
    found: dict[str, Any] = {
        "bench": "kernels",
        "environment": environment(),
        "repetitions": repetitions,
        "pause": pause,
        "rows": [],
    }
    for cases in REGISTRY:
        for case in cases(shapes, _COLD):
            say(f"timing {case.name}")
            row = measure(case, repetitions, pause=pause)
            row["share"] = row["gb_s"] * 1e9 / found["environment"]["bandwidth"]
            found["rows"].append(row)
    return found


def measure(
    case: Case,
    repetitions: int,
    *,
    pause: float = 0.0,
    emulated: bool = False,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Any]:
    """One row: the kernel, its floor and MLX's operation, in turns; times of one launch.

    Raises:
        KernelError: the kernel's result is not the reference's.
    """
    recorded = [r for call in case.calls for r in self_test.calls(call)]
    kernel, arguments = recorded[0]
    if wrong := self_test.compare(kernel, arguments, emulated=emulated):
        raise KernelError(f"{kernel.name}, {case.name} is not timed: {wrong}")
    launches = [k.launch(*a) for k, a in recorded]
    run: Runner = partial(_kernel.run, emulated=emulated)
    turns = {"kernel": lambda: mx.eval([run(launch) for launch in launches])}
    (call, *_) = arguments
    if getattr(call, "kind", "") == "vector":
        floors = [k.launch(replace(a[0], floor=True)) for k, a in recorded]
        turns["floor"] = lambda: mx.eval([run(launch) for launch in floors])
    turns["mlx"] = lambda: mx.eval([operation() for operation in case.mlx])
    for turn in turns.values():
        turn()
    timed = {name: partial(seconds, turn, clock) for name, turn in turns.items()}
    taken = alternate(timed, repetitions, pause=pause)
    each = {name: statistics.median(times) / len(launches) for name, times in taken.items()}
    moved = nbytes(launches[0])
    return {
        "kernel": kernel.name,
        "case": case.name,
        "variant": getattr(call, "variant", "") or "default",
        "bytes": moved,
        "median_ns": each["kernel"] * 1e9,
        "floor_ns": each["floor"] * 1e9 if "floor" in each else None,
        "mlx_ns": each["mlx"] * 1e9,
        "gb_s": moved / each["kernel"] / 1e9,
        "floor_ratio": each["kernel"] / each["floor"] if "floor" in each else None,
        "mlx_ratio": each["kernel"] / each["mlx"],
        "samples_ns": [round(s * 1e9 / len(launches)) for s in taken["kernel"]],
    }


def nbytes(launch: Launch) -> int:
    """Of all inputs and outputs."""
    outputs = zip(launch.shapes, launch.dtypes, strict=True)
    return sum(a.nbytes for a in launch.arrays) + sum(math.prod(s) * d.size for s, d in outputs)
