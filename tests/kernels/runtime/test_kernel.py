"""What decides between Metal, the emulated Metal source and the reference."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlxfuse import KernelError
from mlxfuse.formats import BY_NAME
from mlxfuse.kernels import unavailable
from mlxfuse.kernels.matmul import quantized_matmul
from mlxfuse.kernels.matmul.dequantize import KERNEL, dequantize
from mlxfuse.kernels.matmul.product import Call, Epilogue
from mlxfuse.kernels.norm import norm_rope
from mlxfuse.kernels.runtime import backend as _backend
from mlxfuse.kernels.runtime import kernel as _kernel
from mlxfuse.kernels.runtime import source as _source
from mlxfuse.kernels.runtime.kernel import Launch, Prepared
from mlxfuse.kernels.weight import QuantizedWeight

from ..weights import random_blocks, segment

WEIGHT = segment(random_blocks(BY_NAME["Q4_1"], 4, 64), BY_NAME["Q4_1"])


def test_auto_falls_back_and_counts_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLXFUSE_KERNELS", "auto")
    monkeypatch.setattr(mx.metal, "is_available", lambda: False)
    key = ("dequantize", "this MLX has no Metal device")
    before = _kernel.fallbacks[key], _kernel.launches["dequantize"]
    got = dequantize(WEIGHT)
    assert (_kernel.fallbacks[key], _kernel.launches["dequantize"]) == (before[0] + 1, before[1])
    assert mx.array_equal(got, KERNEL.reference(WEIGHT, None, mx.float32)[0])


def test_metal_raises_instead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLXFUSE_KERNELS", "metal")
    monkeypatch.setattr(mx.metal, "is_available", lambda: False)
    with pytest.raises(KernelError, match="dequantize cannot run on Metal: this MLX has no Metal"):
        dequantize(WEIGHT)


def test_reference_counts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLXFUSE_KERNELS", "reference")
    before = _kernel.fallbacks.copy(), _kernel.launches.copy()
    dequantize(WEIGHT)
    assert (_kernel.fallbacks, _kernel.launches) == before


def test_an_unknown_mode_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLXFUSE_KERNELS", "fast")
    with pytest.raises(KernelError, match="auto, metal, reference, emulated; found 'fast'"):
        dequantize(WEIGHT)


def test_a_disabled_program_is_not_run(kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLXFUSE_KERNELS", "metal" if kernels == "metal" else "emulated")
    program = KERNEL.launch(WEIGHT, None, mx.float32).program
    before = _kernel.launches["dequantize"]
    dequantize(WEIGHT)
    assert _kernel.launches["dequantize"] == before + 1
    monkeypatch.setitem(_kernel.disabled, program, "its self-test failed")
    if kernels != "metal":
        dequantize(WEIGHT)
        assert _kernel.launches["dequantize"] == before + 1
        assert _kernel.fallbacks["dequantize", "its self-test failed"] > 0


def test_a_header_holds_only_what_a_variant_uses() -> None:
    text = _source.header(("formats.h:Q4_1", "dequantize.metal"))
    assert "using Q4_1=" in text
    assert text.index("struct Nibbles") < text.index("using Q4_1=")
    assert "Q4_K" not in text
    assert "//" not in text
    assert len(text) < 4000
    files = (p for p in _source.metal_dir().iterdir() if p.suffix in (".metal", ".h"))
    assert len(text) < len("".join(p.read_text(encoding="ascii") for p in files)) / 20
    with pytest.raises(KernelError, match="has no section 'Q9_0'"):
        _source.header(("formats.h:Q9_0",))


def test_what_is_left_of_a_text_means_the_same() -> None:
    """Spaces go only where nothing grows together."""
    squeezed = _source._squeeze(
        "#define TWICE (2)\n"
        "  const uint a = b + +c - -d;  // two signs are not one operator\n\n"
        "Vec<Vec<T> > f(unsigned int x, thread float* y) const { return *y / *x; }\n"
    )
    assert squeezed == (
        "#define TWICE (2)\n"
        "const uint a=b+ +c- -d;\n"
        "Vec<Vec<T> >f(unsigned int x,thread float*y)const{return*y/ *x;}\n"
    )


def test_missing_sources_say_where_they_were_expected(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(_source, "_PACKAGE", tmp_path / "mlxfuse")
    with pytest.raises(KernelError, match=r"Metal sources are missing: expected .*; reinstall"):
        _source.metal_dir()


def test_the_bench_is_found_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLXFUSE_KERNELS", "emulated")
    monkeypatch.setenv("MLXFUSE_BENCH", "tests.nothing")
    _backend.emulated.cache_clear()
    with pytest.raises(KernelError, match=r"needs the test bench .* tests\.nothing .*pip install"):
        dequantize(WEIGHT)
    monkeypatch.setenv("MLXFUSE_BENCH", "tests")  # a package that is no bench
    with pytest.raises(KernelError, match="module tests cannot be used"):
        dequantize(WEIGHT)
    monkeypatch.delenv("MLXFUSE_BENCH")
    assert isinstance(_backend.backend(), _backend.Emulated)


def test_emulated_in_a_checkout() -> None:
    """As the README says; nothing is loaded by its path."""
    code = (
        "import mlx.core as mx\n"
        "from mlxfuse.kernels.norm.quantize_int8 import quantize_int8\n"
        "print(quantize_int8(mx.arange(32.0)[None]).codes.tolist()[0][-1])\n"
        "from mlxfuse.kernels import launches; print(launches)\n"
    )
    environment = {**os.environ, "MLXFUSE_KERNELS": "emulated"}
    environment.pop("PYTHONPATH", None)
    found = subprocess.run(
        [sys.executable, "-c", code], check=True, cwd=_source.checkout(), text=True,
        env=environment, capture_output=True,
    )  # fmt: skip
    assert found.stdout.split("\n")[:2] == ["127", "Counter({'quantize_int8': 1})"]


def test_a_backend_is_of_its_thread() -> None:
    counted: Counter[str] = Counter()
    with _backend.using(_backend.Counting(counted)):
        dequantize(WEIGHT)
        assert counted == {"dequantize": 1}
        with ThreadPoolExecutor(1) as pool:
            other = pool.submit(_backend.backend).result()
        assert not isinstance(other, _backend.Counting)
        with _backend.using(_backend.METAL):
            assert _backend.backend() is _backend.METAL
        assert isinstance(_backend.backend(), _backend.Counting)
    assert not isinstance(_backend.backend(), _backend.Counting)


def test_while_counting_a_refusal_is_a_fallback(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where it would raise: a count is no run."""
    monkeypatch.setenv("MLXFUSE_KERNELS", "metal")
    monkeypatch.setattr(_backend, "_no_device", lambda: None)
    with pytest.raises(KernelError, match="results are float16, bfloat16 or float32"):
        dequantize(WEIGHT, dtype=mx.float64)
    before = _kernel.fallbacks.copy()
    with _backend.using(_backend.Counting(Counter())):
        dequantize(WEIGHT, dtype=mx.float64)
    assert _kernel.fallbacks == before


def test_kernels_do_not_run_where_the_default_device_is_the_cpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MLXFUSE_KERNELS", "auto")
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.cpu))
    assert unavailable() == "MLX's default device is the CPU"
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    assert unavailable() is None
    assert _backend.backend() is _backend.METAL
    monkeypatch.setenv("MLXFUSE_KERNELS", "metal")
    assert _backend.backend().strict


def matmul_call(m: int, **more: Any) -> Call[mx.array]:
    weight = QuantizedWeight.whole(WEIGHT)
    x = mx.random.normal((1, m, 64), key=mx.random.key(m))
    return Call(x, weight, Epilogue(residual=more.get("residual")))


def launches_to_prepare() -> list[tuple[Launch, Prepared, list[str]]]:
    """Launches, the same prepared, and the names of the inputs that change."""
    residual = mx.ones((1, 2, 4))
    call = matmul_call(2, residual=residual)
    prepared = quantized_matmul.prepare(call.x, call.weight, call.epilogue)
    q, k, offset = mx.ones((1, 3, 64)), mx.ones((1, 3, 32)), mx.array(7)
    rope = norm_rope.RopeOptions(heads=2, kv_heads=1, dims=32, base=1e4)
    turned = norm_rope.prepare(q, k, offset, rope)
    assert prepared is not None
    assert turned is not None
    found = norm_rope._Call(q, k, offset, rope)
    return [
        (quantized_matmul._launch(call), prepared, ["x", "residual"]),
        (norm_rope._launch(found), turned, ["q", "k", "offset"]),
    ]


@pytest.mark.parametrize("which", [0, 1], ids=["quantized_matmul", "norm_rope"])
def test_a_prepared_launch_is_handed_over_as_any(
    which: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On Metal: the same program, grid, types and inputs, at every call."""
    seen: list[dict[str, Any]] = []

    def factory(**what: Any) -> Any:
        def launch(**how: Any) -> list[mx.array]:
            seen.append({**what, **how})
            return [mx.zeros(s, d) for s, d in zip(how["output_shapes"], how["output_dtypes"],
                                                   strict=True)]  # fmt: skip

        return launch

    monkeypatch.setattr(mx.fast, "metal_kernel", factory)
    launch, prepared, free = launches_to_prepare()[which]
    for turn in range(3):
        places = [launch.program.inputs.index(name) for name in free]
        new = [launch.arrays[i] + turn for i in places]
        arrays = list(launch.arrays)
        for i, array in zip(places, new, strict=True):
            arrays[i] = array
        seen.clear()
        with _backend.using(_backend.METAL):
            launch.dispatch(arrays, factory)
            prepared(*new)
        want, got = seen
        for name in want:
            if name == "inputs":
                assert all(map(mx.array_equal, got[name], want[name]))
                assert [got[name][i] is a for i, a in zip(places, new, strict=True)]
            elif name == "output_shapes":
                assert list(map(math.prod, got[name])) == list(map(math.prod, want[name]))
            else:
                assert got[name] == want[name], name
