"""Speed of dequantisation against gguf-py: ``python -m tests.bench.bench_dequantize [TYPE ...]``.

MB/s of GGUF bytes read, one thread, median of alternated runs on a 2048 x 2048 tensor; ours writes
to a fresh array each time, as gguf-py does.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable

import gguf
import gguf.quants
import numpy as np

from mlxfuse.formats import BY_NAME
from mlxfuse.gguf.blocks import dequantize

SHAPE = (2048, 2048)
RUNS = 7


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def main(names: list[str]) -> None:
    print("| type | ours MB/s | gguf-py MB/s | ratio | ours Mweights/s |")
    print("|---|---|---|---|---|")
    rng = np.random.default_rng(0)
    for name in names:
        format = BY_NAME[name]
        # Bytes under 0x70 keep every float16 scale finite.
        data = rng.integers(0, 0x70, (SHAPE[0], format.row_bytes(SHAPE[1])), dtype=np.uint8)
        qtype = gguf.GGMLQuantizationType[name]
        ours, theirs = [], []
        for run in range(RUNS + 1):
            pair = (
                seconds(lambda: dequantize(data, format, SHAPE)),  # noqa: B023
                seconds(lambda: gguf.quants.dequantize(data, qtype)),  # noqa: B023
            )
            if run:  # the first warms both up
                ours.append(pair[0])
                theirs.append(pair[1])
        a, b = statistics.median(ours), statistics.median(theirs)
        ratio = statistics.median(t / o for o, t in zip(ours, theirs, strict=True))
        print(
            f"| {name} | {data.size / a / 1e6:.0f} | {data.size / b / 1e6:.0f} | {ratio:.1f} "
            f"| {SHAPE[0] * SHAPE[1] / a / 1e6:.0f} |"
        )


if __name__ == "__main__":
    main(sys.argv[1:] or ["F16", "Q4_0", "Q4_1", "Q5_0", "Q8_0", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS"])
