"""Relayout and upload of one matrix, beside a plain copy of as many bytes, for each format.

``python -m tests.bench.bench_relayout``: GB/s of the file's bytes, medians of interleaved runs,
all into fresh memory.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from statistics import median

import mlx.core as mx
import numpy as np

from mlxfuse.formats import FORMATS, Format
from mlxfuse.gguf.relayout import relayout
from mlxfuse.models.streams import allocate

ROWS, COLUMNS, REPEATS = 8192, 4096, 7


def upload(data: np.ndarray, format: Format, pool: ThreadPoolExecutor) -> None:
    streams = allocate(format, ROWS, COLUMNS)
    relayout(data, format, {n: np.asarray(a) for n, a in streams.items()}, pool)


def seconds(function: Callable[..., object], *arguments: object) -> float:
    mx.clear_cache()
    start = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - start


def main() -> None:
    threads = os.cpu_count() or 1
    print(f"{'format':8} {'relayout':>9} {'copy':>6}  GB/s, {threads} threads against 1; ratio")
    with ThreadPoolExecutor(threads) as pool:
        for format in FORMATS.values():
            if not format.kernel:
                continue
            shape = (ROWS, format.row_bytes(COLUMNS))
            data = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)

            runs = [
                (seconds(upload, data, format, pool), seconds(data.copy)) for _ in range(REPEATS)
            ]
            done, copied = (data.nbytes / 1e9 / median(times) for times in zip(*runs, strict=True))
            print(f"{format.name:8} {done:9.2f} {copied:6.2f} {done / copied:5.2f}", flush=True)


if __name__ == "__main__":
    main()
