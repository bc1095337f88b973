"""What decoding moves: ``python -m tests.bench.bench_traffic [FORMAT ...]``.

x of one row in float16 times a weight of N rows and K columns, on the test bench; MLX's own kernels
for its 4- and 8-bit weights in groups of 64 stand beside. Columns:

* bytes: distinct bytes moved over weight + x + outputs;
* codes: how often each code byte is read by lanes; scales: by SIMD-groups;
* coalescing: fewest 32-byte segments over those that code loads touch;
* x: values of x that lanes read, over weights;
* constant, threadgroup: loads of lanes from the constant address space and from threadgroup memory,
  over weights;
* turns: what a load of a SIMD-group from threadgroup memory takes of 32 banks, on average: 2 is the
  best of loads of 8 bytes;
* SIMD: SIMD-group operations, over outputs.

The second table has the instructions of one iteration of the inner loop in PTX, loads and stores
left out, over weights, and against affine_qmv_fast.

The third has the kernels around the products, for 64 rows or positions: bytes as above, and how
often lanes read each byte of x, residual, q and k and write each byte of the outputs; one dispatch
each. The figures are counts, not times: they do not depend on the machine.
"""

from __future__ import annotations

import itertools
import sys

import mlx.core as mx

from mlxfuse.formats import BY_NAME
from tests import msl
from tests.kernels import traffic
from tests.kernels.variants import MLX, NAMES, norm, quantize, rope
from tests.msl import mlx_kernels, ptx

ROWS = 128
COLUMNS = (576, 640, 896, 2048, 4096, 8192, 14336)
QMV_MULTIPLE = 512  # of K, for affine_qmv_fast: 32 lanes of 16 weights
TILE = 32  # rows of x that affine_qmm_t reads the weight once for
DTYPE = mx.float16


def _figures(found: traffic.Moved) -> str:
    turns = found.counts.threadgroup.bank_conflicts
    return (
        f"{found.code_reads:.2f} | {found.scale_fetches:.2f} | {found.coalescing:.2f} "
        f"| {found.x_values_per_weight(DTYPE):.3f} "
        f"| {found.constant_loads:.2f} | {found.threadgroup_loads:.2f} "
        f"| {f'{turns:.1f} ' if turns else ''}"
    )


def _simd(found: traffic.Moved) -> float:
    outputs = sum(t.distinct_written for t in found.counts.buffers.values()) // DTYPE.size
    return found.counts.simd_operations / outputs


def _print(name: str, measured: list[tuple[int, traffic.Moved]]) -> None:
    """One line for each run of K with the same figures; bytes and SIMD are the most of them."""
    for figures, group in itertools.groupby(measured, key=lambda m: _figures(m[1])):
        found = list(group)
        columns = ", ".join(str(k) for k, _ in found)
        most = max(m.distinct_ratio for _, m in found)
        simd = max(_simd(m) for _, m in found)
        print(f"| {name} | {columns} | {most:.4f} | {figures}| {simd:.2f} |")


def moved(names: list[str]) -> None:
    """The first table."""
    print(
        "| kernel | K | bytes | codes | scales | coalescing | x | constant | threadgroup | turns "
        "| SIMD |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for name in names:
        block = 64 if name in MLX else BY_NAME[name].block_size
        whole = [k for k in COLUMNS if k % block == 0]
        _print(name, [(k, traffic.moved(name, ROWS, k, DTYPE)) for k in whole])
    for name, make, multiple, rows in (
        ("affine_qmv_fast", mlx_kernels.qmv_fast, QMV_MULTIPLE, 1),
        ("affine_qmm_t", mlx_kernels.qmm_t, 64, TILE),
    ):
        for bits in (4, 8):
            cases = [
                (k, make(mx.zeros((rows, k), DTYPE), traffic.affine(ROWS, k, bits)))
                for k in COLUMNS
                if k % multiple == 0
            ]
            moved = [(k, traffic.moved_by(case)) for k, case in cases]
            _print(f"{name} {bits}-bit, M = {rows}", moved)


def loops(names: list[str]) -> None:
    """The second table."""
    try:
        ptx.libdevice()
    except msl.MslSetupError as e:
        print(f"no instruction counts: {e}")
        return
    mlx = traffic.loop_of_mlx(4).instructions
    print("| kernel | instructions per weight | / affine_qmv_fast 4-bit |")
    print("|---|---|---|")
    for name in names:
        found = traffic.loop(name, DTYPE).instructions
        print(f"| {name} | {found:.2f} | {found / mlx:.2f} |")
    for bits in (2, 4, 8):
        found = traffic.loop_of_mlx(bits).instructions
        print(f"| affine_qmv_fast {bits}-bit | {found:.2f} | {found / mlx:.2f} |")


def norms() -> None:
    """The third table."""
    print("| kernel | bytes | read | written |")
    print("|---|---|---|---|")
    cases = [norm(64, k, DTYPE) for k in (576, 2880, 4096, 16384)]
    cases += [norm(64, 4096, DTYPE, added=False, outputs=(o,)) for o in ("y", "int8")]
    cases += [quantize(64, 14336, DTYPE)]
    cases += [rope(d, d, DTYPE, length=64, normed=n) for d, n in ((64, False), (128, True))]
    for case in cases:
        counts = traffic.of_rows(case)
        read = (t.times_read for n, t in counts.buffers.items() if n in traffic.ROWS)
        written = (counts.buffers[n].times_written for n in case.launch.program.outputs)
        ratio = counts.distinct_bytes / case.nbytes
        print(f"| {case} | {ratio:.4f} | {max(read):.2f} | {max(written):.2f} |")


def main(names: list[str]) -> None:
    moved(names)
    print()
    loops(names)
    print()
    norms()


if __name__ == "__main__":
    main(sys.argv[1:] or list(NAMES))
