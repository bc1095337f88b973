"""The tiles that Metal 4's tensor operations multiply, with a stand-in for those operations."""

from __future__ import annotations

import itertools
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import pytest

from mlxfuse.kernels.matmul import shapes
from mlxfuse.kernels.matmul.product import Call, Epilogue, Experts
from mlxfuse.kernels.matmul.quantized_matmul import KERNEL, tile_shape
from mlxfuse.kernels.runtime import kernel as _kernel
from mlxfuse.kernels.runtime import self_test, source
from mlxfuse.kernels.weight import Part, QuantizedWeight
from tests import msl

from ..variants import capture, segment


def product(
    names: tuple[str, ...], rows: int, n: int, k: int, dtype: mx.Dtype = mx.float16, **end: Any
) -> Call[mx.array]:
    """``rows`` rows of x by ``n`` rows of each format's weight."""
    weight = QuantizedWeight(tuple(Part(segment(f, n, k), 0, n) for f in names))
    x = mx.random.normal((rows, k), key=mx.random.key(rows)).astype(dtype)
    call = Call(x, weight, Epilogue(**end), variant="tensor")
    call.check()
    return call


def experts(names: tuple[str, ...], rows: int, count: int, **end: Any) -> Call[mx.array]:
    """Rows sorted by their experts, of which the second has none and the last one a single row."""
    parts = tuple(Part(segment(f, count * 40, 512, count), 0, 40) for f in names)
    ids = mx.minimum(mx.arange(rows) // 35, count - 2)
    ids = mx.where(ids == 1, 0, ids)
    ids = mx.concatenate([ids[:-1], mx.array([count - 1])])
    x = mx.random.normal((rows, 512), key=mx.random.key(7)).astype(mx.float16)
    which = Experts(ids, sorted=True)
    call = Call(x, QuantizedWeight(parts), Epilogue(**end), which, variant="tensor")
    call.check()
    return call


BIAS = mx.random.normal((70,), key=mx.random.key(1))
CALLS = {
    "one tile, K no multiple of a step": lambda: product(("Q4_0",), 9, 40, 96),
    "odd sizes": lambda: product(("Q4_K",), 45, 97, 512, bias=mx.ones(97)),
    "two rows of tiles": lambda: product(("Q8_0",), 131, 33, 64),
    "bfloat16": lambda: product(("Q6_K",), 33, 70, 256, mx.bfloat16, bias=BIAS),
    "gated": lambda: product(("Q4_K", "Q6_K"), 70, 45, 256, activation="swiglu"),
    "experts": lambda: experts(("Q4_K",), 111, 4),
    "gated experts": lambda: experts(("Q4_0", "Q8_0"), 81, 4, activation="geglu"),
}


@pytest.mark.parametrize(
    ("name", "build"),
    [*zip(CALLS, itertools.cycle(["fast", "checked"])), ("gated experts", "checked")],
)
def test_products_are_right(name: str, build: str) -> None:
    call = CALLS[name]()
    assert call.kind == ("grouped" if "experts" in name else "prompt")
    parts = KERNEL.launch(call).program.parts
    assert any(part.startswith("tensor_tiles.h") for part in parts)
    with msl.installed(build=build):
        assert self_test.compare(KERNEL, (call,), emulated=True) == ""


@pytest.mark.parametrize(
    ("there", "instead"),
    [
        ("lane/4&4", "lane/4&2"),  # another row of a piece
        ("e/8*16", "e/8*8"),
        ("group%2*width", "group/2*width"),
    ],
)
def test_a_wrong_index_is_seen(there: str, instead: str, monkeypatch: pytest.MonkeyPatch) -> None:
    call = CALLS["odd sizes"]()
    launch = KERNEL.launch(call)
    real = source.header(launch.program.parts)
    if there not in real:
        pytest.skip(f"{there} is not in the source")
    monkeypatch.setattr(_kernel, "header", lambda parts: real.replace(there, instead))
    _kernel._compiled.cache_clear()
    with msl.installed(build="fast", lint=False):
        assert self_test.compare(KERNEL, (call,), emulated=True)
    _kernel._compiled.cache_clear()


def test_the_text_is_metal_4s() -> None:
    found = capture(KERNEL.launch(CALLS["gated experts"]()))
    assert msl.check(found.source, found.name, 400) == ()


def test_tiles_fit() -> None:
    """Whole pieces of 16 for each pair of SIMD-groups, in the memory that there is."""
    for rows in (1, 32, 33, 64, 65, 128, 300):
        cut = tile_shape(replace(CALLS["odd sizes"](), x=mx.zeros((rows, 512), mx.float16)))
        assert cut.rows % (8 * cut.groups) == 0
        assert cut.columns == 64
        assert cut.nbytes(2) <= 32 << 10
        assert cut.rows >= min(rows, 128)


@pytest.mark.parametrize(
    ("architecture", "system", "there"),
    [
        ("applegpu_g17s", "26.2", True),
        ("applegpu_g18d", "27.0.1", True),
        ("applegpu_g17s", "26.1", False),
        ("applegpu_g16d", "26.2", False),
        ("applegpu_g17p", "26.2", False),  # an A19
        ("applegpu_g18p", "26.2", True),
        ("something else", "26.2", False),
        ("applegpu_g17s", "", False),
    ],
)
def test_only_matrix_units_are_offered(
    architecture: str, system: str, there: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To `mlxfuse tune`, which measures it; without that nothing runs it anywhere."""
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(mx, "device_info", lambda: {"architecture": architecture})
    monkeypatch.setattr(shapes, "platform", SimpleNamespace(mac_ver=lambda: (system, (), "")))
    caches = (shapes.generation, shapes.tensors)
    for cache in caches:
        cache.cache_clear()
    try:
        prompt, single = CALLS["odd sizes"](), product(("Q4_K",), 45, 40, 512, mx.float32)
        assert ("tensor" in prompt.variants) is there
        assert "tensor" not in single.variants
        assert replace(prompt, variant="").usual != "tensor"
        assert ("tensor" in CALLS["experts"]().variants) is there
        assert replace(CALLS["experts"](), variant="").usual == "tiles"
    finally:
        for cache in caches:
            cache.cache_clear()
