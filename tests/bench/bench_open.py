"""How long a GGUF file with a large vocabulary takes to open, beside gguf-py's GGUFReader.

    python -m tests.bench.bench_open [--tokens 262144] [--merges 500000] [--runs 3]

Makes a file of that many tokens, scores, types and merges in a temporary folder, opens it by turns
with both in one process, and prints the medians and their ratio. Exit status 1 below ``BAR``.
What each has done by then: mlxfuse has every string decoded and checked; GGUFReader has one numpy
view per element, nothing decoded.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import gguf as gguf_py
import numpy as np

from mlxfuse.gguf import open_gguf
from tests.gguf import make

BAR = 20.0


def write(path: Path, tokens: int, merges: int) -> None:
    """Random words of 1 to 16 bytes, some not ASCII, as a vocabulary has them."""
    rng = np.random.default_rng(0)
    letters = np.array(list("etaoinshrdlu ĠĊéñ日本語"))
    words = [
        "".join(rng.choice(letters, size))
        for size in rng.integers(1, 8, 4096)  # enough to vary; the rest repeats them
    ]
    make.write(
        path,
        {
            "general.architecture": "gemma",
            "tokenizer.ggml.tokens": [f"{words[i % 4096]}{i % 251:x}" for i in range(tokens)],
            "tokenizer.ggml.scores": np.arange(tokens, dtype="f4"),
            "tokenizer.ggml.token_type": np.ones(tokens, "i4"),
            "tokenizer.ggml.merges": [
                f"{words[i % 4093]} {words[i % 4096]}" for i in range(merges)
            ],
        },
        [make.T("token_embd.weight", "F32", (4, 32))],
    )


def seconds(action: Callable[[], object]) -> float:
    begin = time.perf_counter()
    action()
    return time.perf_counter() - begin


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tokens", type=int, default=262_144)
    parser.add_argument("--merges", type=int, default=500_000)
    parser.add_argument("--runs", type=int, default=3)
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vocabulary.gguf"
        write(path, args.tokens, args.merges)
        print(f"{args.tokens} tokens, {args.merges} merges, {path.stat().st_size / 1e6:.1f} MB")
        ours, theirs = [], []
        for _ in range(args.runs):
            ours.append(seconds(lambda: open_gguf(path).close()))
            theirs.append(seconds(lambda: gguf_py.GGUFReader(path)))
    a, b = statistics.median(ours), statistics.median(theirs)
    print(f"mlxfuse     {a:8.3f} s  (median of {args.runs}; {min(ours):.3f} to {max(ours):.3f})")
    print(
        f"GGUFReader  {b:8.3f} s  (median of {args.runs}; {min(theirs):.3f} to {max(theirs):.3f})"
    )
    print(f"ratio       {b / a:8.1f}    (bar: {BAR:.0f})")
    return int(b / a < BAR)


if __name__ == "__main__":
    raise SystemExit(main())
