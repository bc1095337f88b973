"""Relayout of one matrix beside a plain copy of its bytes by as many threads, for each format.

``python -m tests.bench.bench_relayout``: GB/s of the file's bytes, medians of runs that take turns.

* load: into MLX arrays made for it, as loading a file does, and the copy likewise. The matrix is
  so large that what is freed goes back to the system: both pay for every page again.
* mapped: into the arrays of the run before, so that there is nothing but the work itself.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from statistics import median

import mlx.core as mx
import numpy as np

from mlxfuse.formats import FORMATS, Format
from mlxfuse.gguf.relayout import relayout
from mlxfuse.models.streams import allocate

ROWS, COLUMNS, REPEATS = 20480, 8192, 5
THREADS = os.cpu_count() or 1

Arrays = dict[str, np.ndarray]


def streams(format: Format) -> Arrays:
    return {n: np.asarray(a) for n, a in allocate(format, ROWS, COLUMNS).items()}


def plain(format: Format) -> Arrays:
    array = mx.zeros((ROWS, format.row_bytes(COLUMNS) // 4), mx.uint32)
    mx.eval(array)
    return {"bytes": np.asarray(array).view(np.uint8)}


def copy(data: np.ndarray, _: Format, out: Arrays, pool: ThreadPoolExecutor) -> None:
    def rows(start: int) -> None:
        np.copyto(out["bytes"][start : start + step], data[start : start + step])

    step = -(-ROWS // THREADS)
    list(pool.map(rows, range(0, ROWS, step)))


def measure(format: Format, pool: ThreadPoolExecutor) -> list[float]:
    """GB/s: load and its copy, mapped and its copy."""
    shape = (ROWS, format.row_bytes(COLUMNS))
    data = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    kinds: list[tuple[Callable[[Format], Arrays], Callable[..., None]]]
    kinds = [(streams, relayout), (plain, copy)]
    seconds: list[list[float]] = [[], [], [], []]
    for _ in range(REPEATS + 1):
        for i, (make, work) in enumerate(kinds):
            mx.clear_cache()
            start = time.perf_counter()
            out = make(format)
            work(data, format, out, pool)
            loaded = time.perf_counter()
            work(data, format, out, pool)
            seconds[i].append(loaded - start)
            seconds[2 + i].append(time.perf_counter() - loaded)
            del out
    return [data.nbytes / 1e9 / median(times[1:]) for times in seconds]


def main(names: list[str]) -> None:
    print(f"GB/s, {THREADS} threads")
    print("format     load   copy  ratio   mapped   copy  ratio")
    with ThreadPoolExecutor(THREADS) as pool:
        for format in FORMATS.values():
            if format.kernel and (not names or format.name in names):
                load, copied, mapped, again = measure(format, pool)
                print(
                    f"{format.name:8} {load:6.2f} {copied:6.2f} {load / copied:6.2f} "
                    f"{mapped:8.2f} {again:6.2f} {mapped / again:6.2f}",
                    flush=True,
                )


if __name__ == "__main__":
    main(sys.argv[1:])
