"""mlxfuse beside stock MLX-LM on the CPU, on the same weights, in one run.

    python -m tests.bench.bench_cpu [model.gguf] [--pairs 7]

Each contestant is a process of its own that loads the model once; then they take turns, so
that a machine whose speed drifts slows all alike. Stock MLX-LM runs twice: with float32
weights and with affine 4-bit ones. mlxfuse runs twice where the system has an OpenBLAS: with
it, and by numpy's own. Then all but the latter run again with that OpenBLAS preloaded
(``preload=yes``). Printed: the median tokens/s, and the median over the turns of mlxfuse's
speed divided by that of the faster stock form.
"""

from __future__ import annotations

import argparse
import ctypes.util
import os
import statistics
import subprocess
import sys
import time
from typing import Any

OURS = ("mlxfuse", "mlxfuse by numpy")
STOCK = ("stock float32", "stock affine")
PROMPT, GENERATED = 32, 8


def _stock(model: Any, affine: bool) -> Any:
    import mlx.core as mx
    import mlx.nn as nn
    from mlx.utils import tree_map_with_path

    def plain(_: str, module: nn.Module) -> nn.Module:
        if not isinstance(module, nn.Linear | nn.Embedding):
            return module
        base = nn.Linear if isinstance(module, nn.Linear) else nn.Embedding
        made = base(1, 1, bias=False) if base is nn.Linear else base(1, 1)
        made.update(dict(module.parameters()))
        return made

    is_leaf = nn.Module.is_module
    model.update_modules(tree_map_with_path(plain, model.leaf_modules(), is_leaf=is_leaf))
    if affine:
        nn.quantize(model, group_size=32, bits=4)
        mx.eval(model.parameters())
    return model


def work(contestant: str, path: str) -> None:
    """Load, then for each line on stdin time a prompt and a few decoded tokens."""
    if contestant == "mlxfuse":
        from mlxfuse import blas

        blas.preload()
    import mlx.core as mx
    from mlx_lm.models.cache import make_prompt_cache

    from mlxfuse.loader import load

    model, _ = load(path, dtype="float32")
    if contestant in STOCK:
        model = _stock(model, contestant.endswith("affine"))
    print("ready", flush=True)
    for _line in sys.stdin:
        cache = make_prompt_cache(model)
        start = time.perf_counter()
        mx.eval(model(mx.array([list(range(10, 10 + PROMPT))]), cache))
        prompt = time.perf_counter()
        for token in range(GENERATED):
            mx.eval(model(mx.array([[token + 10]]), cache))
        end = time.perf_counter()
        print(PROMPT / (prompt - start), GENERATED / (end - prompt), flush=True)


def _start(contestant: str, path: str, preload: str | None) -> subprocess.Popen[str]:
    env = os.environ | ({"LD_PRELOAD": preload} if preload else {})
    command = [sys.executable, "-m", __spec__.name, path, "--work", contestant]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=env)


def _turn(process: subprocess.Popen[str]) -> tuple[float, float]:
    assert process.stdin
    assert process.stdout
    process.stdin.write("\n")
    process.stdin.flush()
    prompt, decode = process.stdout.readline().split()
    return float(prompt), float(decode)


def compare(path: str, pairs: int, preload: str | None) -> None:
    ours = OURS if ctypes.util.find_library("openblas") and not preload else OURS[:1]
    names = (*ours, *STOCK)
    running = {name: _start(name, path, preload) for name in names}
    try:
        for process in running.values():
            assert process.stdout
            while process.stdout.readline() not in ("ready\n", ""):
                pass
            _turn(process)  # not counted: first use of every buffer
        turns = [{name: _turn(p) for name, p in running.items()} for _ in range(pairs)]
    finally:
        for process in running.values():
            process.terminate()
            process.wait()
    shown = "yes" if preload else "no"
    for which, kind in enumerate((f"prompt {PROMPT}", f"decode {GENERATED}")):
        for name in names:
            median = statistics.median(t[name][which] for t in turns)
            print(f"preload={shown:3}  {kind:10}  {name:16} {median:8.1f} tokens/s")
        for name in ours:
            ratio = statistics.median(
                t[name][which] / max(t[n][which] for n in STOCK) for t in turns
            )
            label = f"{name} / better stock, median of {pairs}"
            print(f"preload={shown:3}  {kind:10}  {label}: {ratio:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", nargs="?", help="default: the demo model")
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--work", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        work(arguments.work, arguments.model)
        return
    from mlxfuse.hub.resolve import resolve

    path = str(resolve(arguments.model))
    compare(path, arguments.pairs, None)
    if found := ctypes.util.find_library("openblas"):
        compare(path, arguments.pairs, found)


if __name__ == "__main__":
    main()
