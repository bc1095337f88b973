"""Host time to build the graph of one decoded token: patched models beside stock MLX-LM.

    python -m tests.bench.bench_host [CLASS ...] [--layers 16] [--pairs 40] [--profile]

Nothing is computed. Both graphs are built while `mx.export_function` traces, where a Metal kernel
can be called without a GPU at its true price; what MLX does with the finished trace is not timed.
`mx.fast`'s operations, which on a CPU are built from many others, are one cheap operation each in
both models. That is less than they cost on a GPU, so a model that has more of them, stock, is
made to look faster than it is. Weights are 4-bit, sizes tiny: neither changes host time. The
models take turns; printed are the medians and the median of the ratios of neighbours.
"""

from __future__ import annotations

import argparse
import copy
import cProfile
import gc
import pstats
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.models.cache import make_prompt_cache

from mlxfuse.fusion import patch_model
from mlxfuse.kernels import _kernel
from tests.fusion import zoo

CLASSES = ("llama", "qwen3")


@contextmanager
def opaque() -> Iterator[None]:
    """Kernels are wanted, as on Metal; `mx.fast`'s operations are as cheap as any can be."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_kernel, "_unavailable", lambda mode: None)
        patch.setenv("MLXFUSE_KERNELS", "metal")
        patch.setattr(mx.fast, "rms_norm", lambda x, weight, eps: mx.multiply(x, weight))
        patch.setattr(mx.fast, "rope", lambda x, *_, **options: mx.negative(x))
        patch.setattr(
            mx.fast, "scaled_dot_product_attention", lambda q, k, v, **options: mx.negative(q)
        )
        yield


def _again(state: list[Any]) -> list[Any]:
    """The caches with arrays of their own: writing to one changes the array that holds it."""
    copies = [copy.copy(cache) for cache in state]
    for cache in copies:
        for name, value in vars(cache).items():
            if isinstance(value, mx.array):
                setattr(cache, name, mx.array(value))
    return copies


class Subject:
    """A model that has read a prompt.

    Attributes:
        profile: of the builds, if it was asked for.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.state = make_prompt_cache(model)
        mx.eval(model(mx.array([[1, 2, 3]]), cache=self.state))
        self.profile: cProfile.Profile | None = None

    def seconds(self) -> float:
        """To build the graph of the next token, within `opaque`."""
        state, took = _again(self.state), 0.0

        def build(token: mx.array) -> mx.array:
            nonlocal took
            if self.profile:
                self.profile.enable()
            start = time.perf_counter()
            logits = self.model(token, cache=state)
            took = time.perf_counter() - start
            if self.profile:
                self.profile.disable()
            return logits

        gc.disable()
        try:
            mx.export_function(lambda record: None, build, mx.array([[1]]))
        finally:
            gc.enable()
        return took


def subjects(name: str, layers: int) -> tuple[Subject, Subject]:
    """Stock and patched."""
    stock, ours = (zoo.build(name, "affine4", num_hidden_layers=layers) for _ in range(2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLXFUSE_KERNELS", "reference")
        patch_model(ours, fuse="all")
        return Subject(stock), Subject(ours)


def compare(stock: Subject, ours: Subject, pairs: int) -> tuple[float, float, float]:
    """Median seconds of each, and the median of ours over stock's."""
    with opaque():
        for subject in (stock, ours):
            subject.seconds()
            subject.seconds()
        turns = [(stock.seconds(), ours.seconds()) for _ in range(pairs)]
    return (
        statistics.median(a for a, _ in turns),
        statistics.median(b for _, b in turns),
        statistics.median(b / a for a, b in turns),
    )


def _main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("classes", nargs="*", default=CLASSES, metavar="CLASS")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--pairs", type=int, default=40)
    parser.add_argument("--profile", action="store_true", help="where the patched model spends it")
    arguments = parser.parse_args()
    print("| class | stock, us a layer | patched, us a layer | patched / stock |")
    print("| --- | --- | --- | --- |")
    for name in arguments.classes:
        stock, ours = subjects(name, arguments.layers)
        *medians, ratio = compare(stock, ours, arguments.pairs)
        cells = [f"{1e6 * s / arguments.layers:.1f}" for s in medians]
        print(f"| {name} | {' | '.join(cells)} | {ratio:.2f} |")
        if arguments.profile:
            ours.profile = cProfile.Profile()
            with opaque():
                for _ in range(arguments.pairs):
                    ours.seconds()
            pstats.Stats(ours.profile).sort_stats("tottime").print_stats(30)


if __name__ == "__main__":
    _main()
