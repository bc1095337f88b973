"""What a GPU will do with the kernels' text, without one: static figures of every program.

    python -m tests.bench.bench_static [FORMAT ...] [--golden]

The first table is of programs, ours and MLX's own where they compile on the bench:

* registers, bytes of stack, and bytes spilled where a thread has 128 registers: by ``ptxas``, see
  `tests.msl.registers`; threadgroup memory, and the threads that one GPU core holds of it at once;
* for one small launch, counted: aligned pieces of 32 bytes that loads and stores of SIMD-groups
  touch over the fewest that hold as much, barriers that a threadgroup waits at, loads from
  constant tables by each lane for each thousand bytes that the launch reads.

The second is of attention at real lengths: threadgroups, and how often over the cores of GPUs with
10, 20, 40 and 80 cores are filled, and rows computed over rows wanted.

``--golden`` writes what `mlxfuse bench kernels --report` puts beside a Mac's times, and
`test_static.py` compares with; a text that has not changed is not read again.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import mlx.core as mx

from mlxfuse.bench.cases import Sizes, cases
from mlxfuse.bench.static import TABLE, digest, resident
from mlxfuse.files import write_text
from mlxfuse.formats import BY_NAME, Format
from mlxfuse.kernels.kv.compressed_sdpa import compressed_sdpa, quantized_sdpa
from mlxfuse.kernels.kv.scheme import KVScheme, KVSide
from mlxfuse.kernels.kv.sdpa_call import Scores
from mlxfuse.kernels.matmul.product import Call, Epilogue
from mlxfuse.kernels.matmul.quantized_matmul import KERNEL
from mlxfuse.kernels.runtime import kernel as _kernel
from mlxfuse.kernels.runtime.kernel import Launch
from mlxfuse.kernels.runtime.self_test import calls
from mlxfuse.kernels.weight import Part, QuantizedWeight
from tests import msl
from tests.kernels.traffic import affine
from tests.kernels.variants import capture, segment
from tests.msl import mlx_kernels
from tests.msl.registers import registers

CORES = (10, 20, 40, 80)
HALF = mx.float16
GOLDEN_FORMATS = ("Q4_K", "MXFP4")
_DIMS = (64, 128, 256, 512)
REPORTED = Sizes(((32, 4096),), (64, 8, 16, 512), (32, 8, 128), (96,), (1, 4, 33), 0)
"""As small as they can be to run the programs of the sizes that `mlxfuse bench kernels` has."""


@dataclass(frozen=True)
class Figures:
    """Of one program; ``None`` where nothing was run."""

    registers: int
    stack: int
    spilled: int
    memory: int | None = None
    threads: int | None = None
    loads: float | None = None
    stores: float | None = None
    barriers: float | None = None
    table_loads: float | None = None


def threadgroups(launch: Launch) -> int:
    """Of one dispatch."""
    return math.prod(-(-g // t) for g, t in zip(launch.grid, launch.threadgroup, strict=True))


def attention(
    rows: int,
    dim: int = 128,
    bits: tuple[int, int] = (8, 4),
    *,
    tokens: int = 96,
    kv_heads: int = 1,
) -> Launch:
    """A decoded token's, with first and last tokens; ``rows`` queries share a KV head."""
    scheme = KVScheme(*(KVSide(dim, b, 64, rotate=True) for b in bits), HALF)
    heads = min(rows, 16)
    queries = rows // heads
    new = mx.zeros((1, kv_heads, queries, dim), HALF)
    plain = mx.zeros((1, kv_heads, 64, 2 * dim), HALF)
    packed = mx.zeros((1, kv_heads, tokens, scheme.row_words), mx.uint32)
    ((kernel, arguments),) = calls(
        lambda: compressed_sdpa(
            mx.zeros((1, heads * kv_heads, queries, dim), HALF),
            *(scheme, packed, tokens, plain, 40),
            sink=plain[:, :, :4],
            sink_length=4,
            fresh=(new, new),
            scores=Scores(1.0),
        )
    )
    launch: Launch = kernel.launch(*arguments)
    return launch


def quantized_attention(rows: int, bits: int) -> Launch:
    """A decoded token's over arrays of `mx.quantize`, as mlx-lm's caches hold them."""
    held = mx.quantize(mx.zeros((1, 1, 96, 128), HALF), group_size=64, bits=bits)
    ((kernel, arguments),) = calls(
        lambda: quantized_sdpa(
            *(mx.zeros((1, rows, 1, 128), HALF), held, held, 96),
            group_size=64,
            bits=bits,
            scores=Scores(1.0, causal=False),
        )
    )
    launch: Launch = kernel.launch(*arguments)
    return launch


def product(name: str, rows: int, *, gated: bool = False, variant: str = "") -> Launch:
    """``rows`` rows of x times a weight; gate and up at once where ``gated``."""
    parts = [Part(segment(name, 32, 512), 0, 32) for _ in range(1 + gated)]
    call = Call(
        mx.zeros((rows, 512), HALF),
        QuantizedWeight(tuple(parts)),
        Epilogue(activation="swiglu" if gated else None),
        variant=variant,
    )
    return KERNEL.launch(call)


def programs(formats: list[Format]) -> Iterator[tuple[str, Launch]]:
    """Each program of `bench kernels`, and what its sizes leave out."""
    seen = set()
    for case in cases(REPORTED, formats):
        for kernel, arguments in calls(case.ours[0]):
            for launch in kernel.launch(*arguments).chain():
                key = launch.program, launch.template
                if key not in seen:
                    seen.add(key)
                    name = f"{kernel.name} {case.name} {' '.join(launch.program.outputs)}"
                    yield name, launch
    for format in formats:
        for rows in (2, 4, 8):
            yield f"quantized_matmul {format.name} batch of {rows}", product(format.name, rows)
            gated = product(format.name, rows, gated=True)
            yield f"quantized_matmul {format.name} swiglu batch of {rows}", gated
        for rows, columns in ((16, 32), (64, 64), (128, 64), (192, 32)):
            name = f"quantized_matmul {format.name} tiles of {rows} x {columns}"
            yield name, product(format.name, rows, variant=f"tiles{columns}")
        gated = product(format.name, 64, gated=True, variant="tiles64")
        yield f"quantized_matmul {format.name} swiglu tiles of 64 x 64", gated
    for dim in _DIMS:
        for rows in (1, 4, 8, 32):
            yield f"compressed_sdpa k8v4 {dim} rows {rows}", attention(rows, dim)
    for bits, rows in ((8, 1), (8, 4), (8, 8), (4, 4)):
        launch = quantized_attention(rows, bits)
        yield f"compressed_sdpa mlx-lm's {bits} bits 128 rows {rows}", launch


def figures(launch: Launch, *, run: bool = True) -> Figures:
    """Of one dispatch.

    Raises:
        MslSetupError: without ``ptxas`` or libdevice.
    """
    captured = capture(launch)
    found = registers(captured.source, captured.name)
    own = found.registers, found.stack, found.spilled
    if not run:
        return Figures(*own)
    with msl.installed(lint=False), msl.counting() as counted:
        _kernel.run(replace(launch, then=None, extra=0))
    return Figures(*own, *_counted(counted[0], launch))


def _counted(counts: msl.Counts, launch: Launch) -> tuple[Any, ...]:
    buffers = counts.buffers.values()
    loads = [sum(getattr(b, n) for b in buffers) for n in ("short_segments", "short_ideal")]
    stores = [sum(getattr(b, n) for b in buffers) for n in ("store_segments", "store_ideal")]
    read = sum(b.distinct_read for b in buffers)
    return (
        counts.threadgroup_bytes,
        math.prod(launch.threadgroup),
        loads[0] / max(loads[1], 1),
        stores[0] / max(stores[1], 1),
        counts.barriers / threadgroups(launch),
        1000 * counts.tables.loads / max(read, 1),
    )


def mlx_programs() -> Iterator[tuple[str, Figures]]:
    """MLX's own product kernels."""
    for make, rows in ((mlx_kernels.qmv_fast, 1), (mlx_kernels.qmm_t, 32)):
        for bits in (4, 8):
            case = make(mx.zeros((rows, 512), HALF), affine(64, 512, bits))
            found = registers(case.source, case.name)
            own = Figures(found.registers, found.stack, found.spilled)
            yield f"MLX's {case.name} {bits}-bit, M = {rows}", own


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}" if isinstance(value, float) else str(value)


def print_programs(formats: list[Format]) -> None:
    """The first table."""
    names = ("registers", "stack", "spilled", "memory", "resident")
    counted = ("loads", "stores", "barriers", "table loads")
    print(f"| program | {' | '.join((*names, *counted))} |")
    print("|---" * (1 + len(names) + len(counted)) + "|")
    for name, launch in programs(formats):
        f = figures(launch)
        assert f.memory is not None
        assert f.threads is not None
        held = resident(f.registers, f.memory, f.threads)
        own = (f.registers, f.stack, f.spilled, f.memory, held)
        row = (*own, f.loads, f.stores, f.barriers, f.table_loads)
        print(f"| {name} | {' | '.join(map(_cell, row))} |", flush=True)
    for name, f in mlx_programs():
        row = (f.registers, f.stack, f.spilled, *[None] * 6)
        print(f"| {name} | {' | '.join(map(_cell, row))} |")


def print_launches() -> None:
    """The second table: attention of 8 KV heads, as in an 8B model."""
    print("| launch | threadgroups | " + " | ".join(f"waves, {c} cores" for c in CORES))
    print("|---" * (2 + len(CORES)) + "|")
    for rows in (1, 4, 8, 32):
        used = figures(attention(rows)).registers
        for tokens in (512, 4096, 32768, 131072):
            launch = attention(rows, tokens=tokens, kv_heads=8)
            threads, groups = math.prod(launch.threadgroup), threadgroups(launch)
            held = resident(used, 8192 if rows > 4 else 2112, threads) // threads
            waves = (f"{groups / (held * cores):.2f}" for cores in CORES)
            print(f"| {rows} rows, {tokens} tokens | {groups} | {' | '.join(waves)} |")


Table = dict[str, dict[str, Any]]


def golden(
    before: Table, formats: list[Format], keep: Callable[[Table], None] = lambda table: None
) -> Table:
    """The table anew: name -> figures, and the digest of the text that they were read off.

    Args:
        before: the table so far; what was read off a text that is still the same stays.
        formats: what is read anew where its text changed; of others, what was there stays.
        keep: gets what there is whenever a row has been read, which may take minutes for all.
    """
    every = dict(programs([f for f in BY_NAME.values() if f.kernel]))
    wanted = {name for name, _ in programs(formats)}
    found = {}
    for name, launch in every.items():
        row = before.get(name, {})
        if row.get("text") != digest(launch) and name in wanted:
            print(name, flush=True)
            read = asdict(figures(launch))
            rounded = {k: round(v, 3) for k, v in read.items() if v is not None}
            row = {"text": digest(launch), **rounded}
            keep(found | {name: row})
        if row:
            found[name] = row
    return found


def write(table: Table) -> None:
    """One line for each program."""
    lines = (f"{json.dumps(k)}: {json.dumps(v, sort_keys=True)}" for k, v in sorted(table.items()))
    write_text(TABLE, "{\n" + ",\n".join(lines) + "\n}\n", 0o644)


def _main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("formats", nargs="*", metavar="FORMAT")
    parser.add_argument("--golden", action="store_true", help=f"write {TABLE.name}")
    arguments = parser.parse_args()
    wanted = arguments.formats or [f.name for f in BY_NAME.values() if f.kernel]
    formats = [BY_NAME[name] for name in wanted]
    if arguments.golden:
        before = json.loads(TABLE.read_text("utf-8"))
        write(golden(before, formats, lambda table: write({**before, **table})))
        return
    print_programs(formats)
    print()
    print_launches()


if __name__ == "__main__":
    _main()
