"""Self-tests: which variants a model uses, that a wrong one is found, what is remembered."""

import dataclasses
import json
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlxfuse.fusion import patch_model
from mlxfuse.fusion.patch import try_every_length, unpatch_model
from mlxfuse.kernels import fallbacks, launches
from mlxfuse.kernels.runtime import backend as _backend
from mlxfuse.kernels.runtime import kernel as _kernel
from mlxfuse.kernels.runtime import self_test
from mlxfuse.loader import load
from mlxfuse.nn.quantized import QuantizedLinear
from tests import msl
from tests.fusion import zoo
from tests.kernels import variants
from tests.models import tiny


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("MLXFUSE_CACHE", str(tmp_path / "cache"))
    with msl.installed(build="fast"):
        yield tmp_path / "cache" / "self-tests.json"
    _kernel.disabled.clear()
    _backend.trials.clear()
    self_test._tried.clear()


def recorded(path: Path, name: str, lengths: tuple[int, ...]) -> list[self_test.Recorded]:
    model, _ = load(tiny.write(path / "m.gguf", tiny.build(name, 0)), fuse="all")

    def run() -> None:
        for length in lengths:
            model(mx.zeros((1, length), mx.int32))

    return self_test.calls(run)


def test_a_models_variants(tmp_path: Path) -> None:
    found = recorded(tmp_path, "llama-q4", (1, 5, 33, 300))
    programs = {kernel.launch(*arguments).program for kernel, arguments in found}
    matmuls = [p for p in programs if p.op == "quantized_matmul"]
    # For 1, 5 and 33 rows: qkv, gate and up, o and down (two formats) with residual, the head.
    assert len(matmuls) == 3 * 5
    assert sum("residual" in p.inputs for p in matmuls) == 3 * 2
    assert sum(len(p.outputs) == 3 for p in matmuls) == 3
    assert sum("Gated<Silu>" in p.body for p in matmuls) == 3
    # Whole weights of three formats for 300 rows, and the looked up rows.
    assert sum(p.op == "dequantize" for p in programs) == 4


@pytest.mark.parametrize("name", ["llama-q4", "llama-fused-qkv", "gemma3", "llama-k-quants"])
def test_the_kernels_pass(name: str, tmp_path: Path, own_cache: Path) -> None:
    found = recorded(tmp_path, name, (1, 3, 33))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert self_test.check(found, emulated=True) == {}
    assert set(json.loads(own_cache.read_text()).values()) == {""}
    assert own_cache.parent.stat().st_mode & 0o777 == 0o700


def wrong(kernel: _kernel.Kernel, factor: float) -> _kernel.Kernel:
    """Whose reference gives other values, so that the kernel's look wrong."""
    reference = kernel.reference
    return dataclasses.replace(kernel, reference=lambda *a: [factor * y for y in reference(*a)])


@pytest.mark.parametrize("factor", [1.001, float("nan")])
def test_a_wrong_kernel_is_disabled(factor: float, tmp_path: Path, own_cache: Path) -> None:
    found = recorded(tmp_path, "llama", (1,))
    matmul, arguments = next(c for c in found if c[0].name == "quantized_matmul")
    program = matmul.launch(*arguments).program
    with pytest.warns(RuntimeWarning, match="quantized_matmul failed its self-test") as caught:
        disabled = self_test.check([(wrong(matmul, factor), arguments)] * 2, emulated=True)
    assert len(caught) == 1
    assert list(disabled) == [program]
    assert "largest error" in disabled[program]
    # It is remembered, without a second warning, and such calls run as reference.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert self_test.check([(matmul, arguments)], emulated=True) == disabled
    fallbacks.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLXFUSE_KERNELS", "emulated")
        matmul(*matmul.small(*arguments))
    assert fallbacks["quantized_matmul", disabled[program]] == 1
    # It is not stored: the next process tries it again, and stores that it passed.
    assert not own_cache.exists()
    _kernel.disabled.clear()
    assert self_test.check([(matmul, arguments)], emulated=True) == {}
    assert len(json.loads(own_cache.read_text())) == 1
    # A failure that an older version stored is as none.
    own_cache.write_text(json.dumps(dict.fromkeys(json.loads(own_cache.read_text()), "wrong")))
    assert self_test.check([(matmul, arguments)], emulated=True) == {}
    # Another MLX is tried anew.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(self_test, "version", lambda name: "0.99")
        assert self_test.check([(matmul, arguments)], emulated=True) == {}
    assert len(json.loads(own_cache.read_text())) == 2


NORMS = list(variants.norms())


@pytest.mark.parametrize("variant", NORMS, ids=str)
def test_the_norm_kernels_pass(variant: variants.Variant) -> None:
    """On small cases, whose arguments differ from the ones that were recorded."""
    found = [(variant.kernel, variant.arguments)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert self_test.check(found, emulated=True) == {}
    # Control: every output is looked at.
    for i in range(len(variant.launch.shapes)):

        def reference(*arguments: Any, i: int = i) -> list[mx.array]:
            outputs = variant.kernel.reference(*arguments)
            outputs[i] = (outputs[i].astype(mx.float32) * 1.05).astype(outputs[i].dtype)
            return outputs

        off = dataclasses.replace(variant.kernel, reference=reference)
        found = self_test.compare(off, variant.arguments, emulated=True)
        assert found.startswith("largest error") or found.endswith("of the words differ")


# What MLX says of a source that does not compile, and of a threadgroup that is too large.
NO_LIBRARY = """[metal::Device] Unable to build metal library from source
program_source:12:5: warning: unused variable 'q'
program_source:34:9: error: use of undeclared identifier 'simd_shuffle_rotate'
program_source:40:1: note: expanded from here
program_source:41:7: error: no matching function for call to 'f'
"""
TOO_LARGE = "Thread group size (1024) is greater than  the maximum allowed threads per group (448)."


def planted(error: Exception | None) -> Any:
    """A stand-in for `mx.fast.metal_kernel`: its products are wrong, or raise."""

    def factory(**what: Any) -> Any:
        kernel = msl.metal_kernel(**what)

        def launch(**how: Any) -> list[mx.array]:
            if what["name"] != "mlxfuse_quantized_matmul":
                return kernel(**how)
            if error is not None:
                raise error
            return [1.01 * y for y in kernel(**how)]

        return launch

    return factory


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (None, r"largest error [\d.e-]+, largest value [\d.]+, in mlx.core.float32"),
        (
            RuntimeError(NO_LIBRARY),
            r"program_source:34:9: error: use of undeclared identifier 'simd_shuffle_rotate'; "
            r"program_source:41:7: error: no matching function for call to 'f'",
        ),
        (ValueError(TOO_LARGE), re.escape(TOO_LARGE)),
        (MemoryError(), "MemoryError"),
    ],
    ids=["wrong", "does not compile", "too large", "no memory"],
)
def test_a_planted_fault_ends_in_a_working_model(
    error: Exception | None,
    reason: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    own_cache: Path,
) -> None:
    """On Metal, for which the emulated source stands, with prepared launches and kept graphs."""
    path = tiny.write(tmp_path / "m.gguf", tiny.build("qwen3", 0))
    model, _ = load(path, fuse="all")
    unpatch_model(model)
    tokens = mx.array([[3, 14, 15]])
    want = model(tokens)
    monkeypatch.setattr(_backend, "_no_device", lambda: None)
    monkeypatch.setattr(mx.fast, "metal_kernel", planted(error))
    mx.disable_compile()
    try:
        with pytest.warns(RuntimeWarning, match="quantized_matmul failed its self-test"):
            report = patch_model(model, fuse="all")
        assert list(report.disabled) == ["quantized_matmul"]
        assert re.fullmatch(reason, report.disabled["quantized_matmul"])
        assert "quantized_matmul is not used: " in str(report)
        assert set(json.loads(own_cache.read_text()).values()) == {""}
        fallbacks.clear()
        launches.clear()
        # What three rows need is tried now, and has the same fault.
        with pytest.warns(RuntimeWarning, match="quantized_matmul failed its self-test"):
            found = model(tokens)
        assert zoo.apart(np.array(found), np.array(want)) < 1e-5
        assert not launches["quantized_matmul"]
        assert launches["norm_rope"]
        assert all(re.fullmatch(reason, why) for op, why in fallbacks if op == "quantized_matmul")
        assert fallbacks.total()
        # Control: without the self-test's verdict, the fault reaches the model.
        _kernel.disabled.clear()
        _backend.trials.clear()
        if error is None:
            assert zoo.apart(np.array(model(tokens)), np.array(want)) > 1e-3
        else:
            with pytest.raises(type(error)):
                mx.eval(model(tokens))
    finally:
        mx.enable_compile()


def test_references_are_computed_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where float32 products are not TF32."""
    (variant, *_) = variants.norms()
    seen = []

    def reference(*arguments: Any) -> list[mx.array]:
        seen.append(mx.default_stream(mx.default_device()))
        return variant.kernel.reference(*arguments)

    streams = []
    real = mx.stream
    monkeypatch.setattr(mx, "stream", lambda where: streams.append(where) or real(where))
    kernel = dataclasses.replace(variant.kernel, reference=reference)
    assert self_test.compare(kernel, variant.arguments, emulated=True) == ""
    assert seen
    assert streams == [mx.cpu]


@pytest.mark.parametrize("text", ["", "[]", '{"a": 1}', "\xff", "[" * 100000])
def test_a_bad_file_of_results_is_as_none(text: str, tmp_path: Path, own_cache: Path) -> None:
    own_cache.parent.mkdir(parents=True)
    own_cache.write_bytes(text.encode("latin-1"))
    assert self_test.check(recorded(tmp_path, "llama", (1,)), emulated=True) == {}
    assert set(json.loads(own_cache.read_text()).values()) == {""}


def test_patching_runs_them_where_there_is_metal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own_cache: Path
) -> None:
    model, _ = load(tiny.write(tmp_path / "m.gguf", tiny.build("llama", 0)), fuse="all")
    assert "self-test" not in model.load_report.seconds
    unpatch_model(model)
    seen = []
    monkeypatch.setattr(_backend, "_no_device", lambda: None)
    monkeypatch.setattr(self_test, "check", lambda found: seen.extend(found) or {})
    report = patch_model(model)
    assert str(report) == "qkv 3/3, gate/up 3/3, residual 3/3, norm+rope 3/3"
    assert report.self_test_seconds > 0
    assert {k.name for k, _ in seen} == {"dequantize", "norm_rope", "quantized_matmul"}
    assert len({k.launch(*a).program for k, a in seen}) == 2 + 4
    # For ranks, all that there are; 192 rows are two tiles of float32.
    try_every_length(model, report)
    assert len({k.launch(*a).program for k, a in seen}) == 3 + 8 * 4
    assert isinstance(model.layers[0].self_attn.o_proj, QuantizedLinear)
    monkeypatch.setenv("MLXFUSE_KERNELS", "emulated")
    unpatch_model(model)
    seen.clear()
    patch_model(model)
    assert not seen


def test_compressed_keys_and_values(own_cache: Path) -> None:
    found = [(v.kernel, v.arguments) for v in variants.compressed()]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert self_test.check(found, emulated=True) == {}
    results = json.loads(own_cache.read_text())
    assert len(results) == len(found) == 7
    # A wrong code in one group of 25, and a wrong merging dispatch, are seen and remembered.
    own_cache.unlink()
    quantize, attention = (
        next(c for c in found if c[0].name == name) for name in ("quantize_kv", "compressed_sdpa")
    )

    def flipped(*arguments: Any) -> list[mx.array]:
        (rows,) = quantize[0].reference(*arguments)
        return [rows ^ (mx.arange(rows.shape[-1], dtype=mx.uint32) % 25 == 3)]

    wrong_rows = dataclasses.replace(quantize[0], reference=flipped), quantize[1]
    with pytest.warns(RuntimeWarning, match="failed its self-test"):
        disabled = self_test.check(
            [wrong_rows, (wrong(attention[0], 1.01), attention[1])], emulated=True
        )
    assert [p.op for p in disabled] == ["quantize_kv", "compressed_sdpa"]
    assert "words differ" in next(iter(disabled.values()))
    first, second = attention[0].launch(*attention[1]).chain()
    changed = dataclasses.replace(first, then=lambda outputs: dataclasses.replace(
        second, program=dataclasses.replace(second.program, body=second.program.body + "//")
    ))  # fmt: skip
    assert self_test._key(changed) != self_test._key(first)


def test_a_result_is_of_all_that_it_depends_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine, MLX, the Metal source, and what MLX compiles of it."""
    (variant, *_) = variants.norms()
    launch = variant.launch
    key = self_test._key(launch)
    assert self_test._key(variant.launch) == key
    x, *rest = launch.arrays
    small = x.reshape(-1)[:4]
    changed = [
        dataclasses.replace(launch, template=(("T", mx.bfloat16),)),
        dataclasses.replace(launch, arrays=(x.astype(mx.bfloat16), *rest)),
        dataclasses.replace(launch, arrays=(x[None], *rest)),
        dataclasses.replace(launch, arrays=(small.reshape(*[1] * (x.ndim - 1), -1), *rest)),
    ]
    keys = [self_test._key(each) for each in changed]
    real = self_test.header
    for name, value in (
        ("header", lambda parts: real(parts) + "\n"),
        ("version", lambda package: "0.99"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(self_test, name, value)
            keys.append(self_test._key(launch))
    for name in ("device_name", "architecture"):
        with monkeypatch.context() as patch:
            patch.setattr(mx.metal, "is_available", lambda: True)
            patch.setattr(mx, "device_info", lambda name=name: {name: "another"})
            keys.append(self_test._key(launch))
    with monkeypatch.context() as patch:
        patch.setattr(self_test.platform, "platform", lambda: "macOS-27")
        keys.append(self_test._key(launch))
    assert len({key, *keys}) == len(keys) + 1


def test_inputs_in_constant_memory_are_a_variant(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """MLX binds fewer than 8 elements in another address space."""
    found = recorded(tmp_path, "llama-q4", (1, 9))
    rows = [c for c in found if c[0].name == "dequantize" and c[1][1] is not None]
    assert {arguments[1].size for _, arguments in rows} == {1, 9}
    tried = []
    monkeypatch.setattr(
        self_test, "compare", lambda kernel, small, **_: tried.append(small[1].size) or ""
    )
    self_test.check(rows, emulated=True)
    assert tried == [1, 8]


def test_small_cases_use_experts_from_the_first_to_the_last(tmp_path: Path) -> None:
    found = recorded(tmp_path, "qwen3moe", (1,))
    products = [c for c in found if c[0].name == "quantized_matmul" and c[1][0].experts is not None]
    assert products
    for kernel, (call,) in products:
        (small,) = kernel.small(call)
        ids = np.array(small.experts.ids).reshape(-1)
        assert ids.min() == 0
        assert len(set(ids.tolist())) == min(ids.size, call.weight.experts)
        assert ids.max() >= call.weight.experts * (ids.size - 1) // ids.size
