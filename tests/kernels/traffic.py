"""What rows of x times a quantised weight move, on the test bench: ours beside MLX's own."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import mlx.core as mx

from mlxfuse.kernels.runtime import kernel as _kernel
from tests import msl
from tests.kernels.variants import Variant, capture, product, segment
from tests.msl.instructions import largest_loop
from tests.msl.mlx_kernels import Affine, Case, qmv_fast

ROWS = ("x", "residual", "q", "k")  # inputs of which a norm kernel reads each value once
SLOTS = 4  # rows of W that a SIMD-group multiplies at once, here and in affine_qmv_fast


@dataclass(frozen=True)
class Moved:
    """Figures of one product ``[M, K] x [N, K]``, M mostly 1.

    Attributes:
        codes: traffic of each stream of code bits, ``scales`` of each stream of scales.
        least: bytes of weight, x, outputs and, if there is one, the codebook.
        counts: of the whole launch.
        weights: N K.
    """

    counts: msl.Counts
    codes: tuple[msl.Traffic, ...]
    scales: tuple[msl.Traffic, ...]
    least: int
    weights: int

    @property
    def x(self) -> msl.Traffic:
        return self.counts.buffers["x"]

    @property
    def distinct_ratio(self) -> float:
        """Distinct bytes moved over the fewest possible."""
        return self.counts.distinct_bytes / self.least

    @property
    def code_reads(self) -> float:
        """How often lanes read a code byte, in the worst stream."""
        return max(t.times_read for t in self.codes)

    @property
    def scale_fetches(self) -> float:
        """How often SIMD-groups read a scale byte, in the worst stream."""
        return max(t.times_fetched for t in self.scales)

    @property
    def coalescing(self) -> float:
        """Of code loads, in 32-byte segments, in the worst stream."""
        return min(t.coalescing for t in self.codes)

    @property
    def constant_loads(self) -> float:
        """Loads of single lanes from the constant address space, over weights."""
        return self.counts.tables.loads / self.weights

    @property
    def threadgroup_loads(self) -> float:
        """Loads of single lanes from threadgroup memory, over weights."""
        return self.counts.threadgroup.loads / self.weights

    @property
    def x_loads_per_weight(self) -> float:
        return self.x.loads / self.weights

    def x_values_per_weight(self, dtype: mx.Dtype) -> float:
        """Values of x that lanes read, over weights."""
        return self.x.read_bytes / dtype.size / self.weights


def launch_of(name: str, rows: int, columns: int, dtype: mx.Dtype) -> _kernel.Launch:
    """The vector kernel's dispatch."""
    return product(name, rows, columns, dtype).launch


def moved(
    name: str, rows: int, columns: int, dtype: mx.Dtype = mx.float16, *, many: int = 1
) -> Moved:
    """What ``many`` rows of x take by default: our vector kernel, batches or tiles."""
    launch = product(name, rows, columns, dtype, many).launch
    with msl.installed(), msl.counting() as found:
        _kernel.run(launch)
    (counts,) = found
    held = segment(name, rows, columns)
    grid = sum(t.distinct_read for n, t in counts.buffers.items() if n.startswith("grid"))
    others = ("x", "size", "out0", "grid")
    streams = {n: t for n, t in counts.buffers.items() if not n.startswith(others)}
    codes = [n for n in streams if n.startswith(("codes", "high", "signs"))]
    return Moved(
        counts,
        tuple(streams[n] for n in codes),
        tuple(t for n, t in streams.items() if n not in codes),
        held.nbytes + grid + many * (columns + rows) * dtype.size,
        rows * columns,
    )


@dataclass(frozen=True)
class Loop:
    """One iteration of a kernel's inner loop, in PTX.

    Attributes:
        instructions: without loads and stores, over the weights that a lane multiplies.
        load_bytes: that a lane loads, over the same.
    """

    instructions: float
    load_bytes: float


def _loop(source: str, name: str, weights: int) -> Loop:
    found = largest_loop(source, name)
    return Loop(found.instructions / weights, found.load_bytes / weights)


def loop(name: str, dtype: mx.Dtype = mx.float16) -> Loop:
    """Our vector kernel's."""
    launch = launch_of(name, 256, 2048, dtype)
    captured = capture(launch)
    unit = segment(name, 8, 2048).unit
    return _loop(captured.source, captured.name, SLOTS * unit)


@functools.cache
def loop_of_mlx(bits: int) -> Loop:
    """affine_qmv_fast's: two 32-bit words of codes for each lane and row, of 2 bits one."""
    case = qmv_fast(mx.zeros((1, 2048), mx.float16), affine(8, 2048, bits))
    return _loop(case.source, case.name, SLOTS * (16 if bits == 2 else 64 // bits))


@functools.cache
def affine(rows: int, columns: int, bits: int = 4, dtype: mx.Dtype = mx.float16) -> Affine:
    """A weight in MLX's format, groups of 64."""
    return Affine(*mx.quantize(mx.zeros((rows, columns), dtype), 64, bits), 64, bits)


def moved_by(case: Case) -> Moved:
    """A kernel of MLX; MLX's arguments of 4 bytes each count as moved."""
    y, report = case.run("counted", count=True)
    assert report.counts is not None
    buffers = report.counts.buffers
    return Moved(
        report.counts,
        (buffers["w"],),
        (buffers["scales"], buffers["biases"]),
        case.weight.nbytes + case.x.nbytes + y.nbytes,
        y.shape[1] * case.x.shape[1],
    )


def of_rows(variant: Variant) -> msl.Counts:
    """What a norm kernel moves.

    That each value is loaded and stored once is asserted; the weight is loaded for each row.
    """
    launch = variant.launch
    with msl.installed(), msl.counting() as found:
        _kernel.run(launch)
    (counts,) = found
    for name, buffer in counts.buffers.items():
        if name in ROWS:
            assert buffer.times_read == 1.0, name
        elif name in launch.program.outputs:
            assert (buffer.times_written, buffer.read_bytes) == (1.0, 0), name
    return counts


def norm_ratio(variant: Variant) -> float:
    """Distinct bytes a norm kernel moves over those of its inputs and outputs."""
    return of_rows(variant).distinct_bytes / variant.nbytes
