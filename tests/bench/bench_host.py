"""Host time to build the graph of one decoded token: patched models beside stock MLX-LM.

    python -m tests.bench.bench_host [CLASS ...] [--layers 16] [--pairs 40] [--kv-bits k8v4]
                                     [--profile]

Nothing is computed. An opaque operation stands for each of our kernels, as they cannot be called
without a GPU; where one is called outside of a graph that is kept, the price of a kernel's call is
added. It can be measured while `mx.export_function` traces. `mx.fast`'s operations, which on a CPU
are built from many others, are one cheap operation each in both models. That is less than they
cost on a GPU, so a model that has more of them, stock, is made to look faster than it is. Weights
are 4-bit, sizes tiny: neither changes host time. With ``--kv-bits`` the patched model has
compressed caches and stock still plain ones. The models take turns; printed are the medians
of the thread's own CPU time and the median of the ratios of neighbours.
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
from mlxfuse.kernels.runtime import backend as _backend
from mlxfuse.kernels.runtime import kernel as _kernel
from mlxfuse.kernels.runtime import self_test as _self_test
from mlxfuse.kernels.runtime.source import header
from tests.fusion import zoo

CLASSES = ("llama", "qwen3")
_PROMPT = 200  # tokens, of which compressed caches have sealed some


class Opaque:
    """Stands in for kernels that MLX would call on Metal.

    Attributes:
        calls: outside of the graphs that are kept.
    """

    def __init__(self) -> None:
        self.calls = 0
        self._zeros: dict[tuple[Any, ...], mx.array] = {}

    def kernel(self, *, inputs: list[mx.array], output_shapes: Any, output_dtypes: Any, **_: Any):
        self.calls += 1
        keys = zip(output_shapes, output_dtypes, strict=True)
        return mx.depends([self._zero(key) for key in keys], inputs)

    def _zero(self, key: tuple[Any, ...]) -> mx.array:
        if key not in self._zeros:
            self._zeros[key] = mx.zeros(*key)
            mx.eval(self._zeros[key])
        return self._zeros[key]

    @contextmanager
    def installed(self) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(_backend, "_no_device", lambda: None)
            patch.setattr(_kernel, "_compiled", lambda program, factory: self.kernel)
            patch.setenv("MLXFUSE_KERNELS", "metal")
            patch.setattr(_self_test, "check", lambda recorded: {})
            patch.setattr(mx.fast, "rms_norm", lambda x, weight, eps: mx.multiply(x, weight))
            patch.setattr(mx.fast, "rope", lambda x, *_, **options: mx.negative(x))
            patch.setattr(
                mx.fast, "scaled_dot_product_attention", lambda q, k, v, **options: mx.negative(q)
            )
            yield


def price() -> float:
    """Seconds that the call of a kernel takes: with the text of the vector kernel, 8 inputs."""
    arrays = [mx.zeros((8, 8)) for _ in range(7)]
    mx.eval(arrays)
    kernel = mx.fast.metal_kernel(
        name="priced",
        input_names=[f"x{i}" for i in range(8)],
        output_names=["out"],
        source="out[0] = x0[0];" * 20,
        header=header(
            (
                "formats.h:Affine",
                "quantized_matmul.metal:vector",
                "quantized_matmul.metal:vector_tile",
            )
        ),
    )
    took = []

    def trace(x: mx.array) -> list[mx.array]:
        found = []
        for _ in range(200):
            start = time.thread_time()
            found += kernel(
                inputs=[*arrays, x],
                output_shapes=[(1, 64)],
                output_dtypes=[mx.float16],
                grid=(64, 1, 1),
                threadgroup=(64, 1, 1),
                template=[("T", mx.float16)],
            )
            took.append(time.thread_time() - start)
        return found

    for _ in range(3):
        mx.export_function(lambda record: None, trace, mx.zeros((1, 64)))
    return statistics.median(took)


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
        mx.eval(model(mx.zeros((1, _PROMPT), mx.int32), cache=self.state))
        self.profile: cProfile.Profile | None = None

    def seconds(self, opaque: Opaque, call: float) -> float:
        """To build the graph of the next token; ``call`` is the `price`."""
        state, token = _again(self.state), mx.array([[1]])
        opaque.calls = 0
        gc.disable()
        try:
            if self.profile:
                self.profile.enable()
            start = time.thread_time()
            self.model(token, cache=state)
            took = time.thread_time() - start
            if self.profile:
                self.profile.disable()
        finally:
            gc.enable()
        return took + opaque.calls * call


def subjects(name: str, layers: int, kv_bits: str | None = None) -> tuple[Subject, Subject]:
    """Stock and patched."""
    own = {"num_hidden_layers": layers, "head_dim": 64}
    stock, ours = (zoo.build(name, "affine4", **own) for _ in range(2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLXFUSE_KERNELS", "reference")
        patch_model(ours, fuse="all", kv_bits=kv_bits)
        return Subject(stock), Subject(ours)


def compare(stock: Subject, ours: Subject, pairs: int) -> tuple[float, float, float]:
    """Median seconds of each, and the median of ours over stock's."""
    opaque, call = Opaque(), price()
    with opaque.installed():
        for subject in (stock, ours):
            for _ in range(3):
                subject.seconds(opaque, call)
        turns = [(stock.seconds(opaque, call), ours.seconds(opaque, call)) for _ in range(pairs)]
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
    parser.add_argument("--kv-bits", help="of the patched model's caches, for example k8v4")
    parser.add_argument("--profile", action="store_true", help="where the patched model spends it")
    arguments = parser.parse_args()
    print("| class | stock, us a layer | patched, us a layer | patched / stock |")
    print("| --- | --- | --- | --- |")
    for name in arguments.classes:
        stock, ours = subjects(name, arguments.layers, arguments.kv_bits)
        *medians, ratio = compare(stock, ours, arguments.pairs)
        cells = [f"{1e6 * s / arguments.layers:.1f}" for s in medians]
        print(f"| {name} | {' | '.join(cells)} | {ratio:.2f} |")
        if arguments.profile:
            ours.profile = cProfile.Profile()
            opaque = Opaque()
            with opaque.installed():
                for _ in range(arguments.pairs):
                    ours.seconds(opaque, 0.0)
            pstats.Stats(ours.profile).sort_stats("tottime").print_stats(30)


if __name__ == "__main__":
    _main()
