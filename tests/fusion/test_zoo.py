"""`patch_model` on every class that mlx-lm ships: the surgery, on the reference path."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models import qwen3

from mlxfuse.fusion import emit, patch_model, unpatch_model
from mlxfuse.kernels import fallbacks, launches
from mlxfuse.nn import join_linears as joining
from mlxfuse.nn.activations import GATED
from tests import msl
from tests.fusion import zoo
from tests.fusion.configs import CONFIGS, USED

BOUND = 1e-5  # Sums of up to 128 products in float32, in another order, through 4 layers.
CASES = [(name, form) for name in CONFIGS for form in zoo.forms(name)]
# With norms of heads, soft caps, geglu, one matrix for q, k and v, experts, sinks and biases.
EMULATED = ("llama", "qwen3", "gemma2", "phi3", "qwen3_moe", "gpt_oss", "qwen2_moe", "ministral3")
EMULATED += ("granite",)  # which multiplies what it adds
GOLDEN = zoo.GOLDEN.read_text().splitlines()
NEW = "run `python -m tests.fusion.zoo --golden` and read the difference"


@pytest.fixture(autouse=True)
def reference(monkeypatch: pytest.MonkeyPatch, fresh_buffers: None) -> Iterator[None]:
    monkeypatch.setenv("MLXFUSE_KERNELS", "reference")
    with zoo.uncompiled():
        yield


def modules(model: nn.Module) -> dict[str, tuple[int, type]]:
    return {path: (id(m), type(m)) for path, m in model.named_modules()}


def contents(model: nn.Module) -> dict[str, tuple[mx.Dtype, tuple[int, ...], bytes]]:
    """Type, shape and bytes of every parameter, by its name."""
    return {
        name: (a.dtype, a.shape, np.array(a).tobytes())
        for name, a in tree_flatten(model.parameters())
    }


def live(limit: int = 0) -> int:
    """Bytes that arrays take; what is only waiting to be collected does not count."""
    if mx.get_active_memory() > limit:
        gc.collect()
    return mx.get_active_memory()


def examine(name: str, form: str) -> None:
    """Everything that must hold for one class; raises AssertionError."""
    model = zoo.build(name, form)
    want = zoo.logits(model)
    assert np.isfinite(want).all()
    assert want.std() > 0.05, "logits this flat would hide a wrong module"
    as_built, before = modules(model), contents(model)
    held = live()
    assert zoo.zoo_line(name, form, zoo.patch_all(model, form)) in GOLDEN, NEW
    unpatch_model(model)
    assert modules(model) == as_built, "unpatching leaves other modules"
    report = patch_model(model, fuse="all")
    assert live(held) <= held, "a weight is held twice"
    patched = modules(model)
    assert patch_model(model, fuse="all") is report
    assert modules(model) == patched, "patching twice changes something"
    assert zoo.apart(zoo.logits(model), want) <= BOUND, "the patched logits differ"
    unpatch_model(model)
    assert modules(model) == as_built, "unpatching leaves other modules"
    assert contents(model) == before, "unpatching leaves other parameters"
    assert np.array_equal(zoo.logits(model), want)
    assert live(held) <= held, "unpatching leaves something behind"
    if name in zoo.LOADED and form in ("float32", "affine4"):
        stock, fused = patch_model(model, fuse="all").dispatches or (0, 0)
        assert 0 < fused <= stock, "a token takes more dispatches"


@pytest.mark.parametrize(
    ("name", "form"),
    [
        pytest.param(
            *case, marks=[pytest.mark.slow] * (case[1] == "float32" and case[0] not in zoo.LOADED)
        )
        for case in CASES
    ],
)
def test_patched_and_back(name: str, form: str) -> None:
    examine(name, form)


@pytest.mark.parametrize("name", EMULATED)
def test_patched_kernels(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tokens that are decoded go through the Metal source."""
    monkeypatch.setenv("MLXFUSE_KERNELS", "emulated")
    model = zoo.build(name, "affine4", num_hidden_layers=2)
    want = zoo.logits(model)
    report = patch_model(model, fuse="all")
    launches.clear()
    fallbacks.clear()
    with msl.installed(build="fast"):
        got = zoo.logits(model)
    assert zoo.apart(got, want) <= BOUND
    kinds = ("qkv", "gate_up", "experts", "activation")
    matmuls = sum(len(tally.fused) for kind, tally in report.tallies.items() if kind in kinds)
    assert launches["quantized_matmul"] >= zoo.DECODED * matmuls > 0
    assert not fallbacks


# Of a recurrence without any attention or MLP nothing is fused that these tokens go through.
REST = sorted(zoo.LOADED - {*EMULATED, "mamba"})


@pytest.mark.slow
@pytest.mark.parametrize("name", REST)
def test_patched_kernels_of_every_architecture(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLXFUSE_KERNELS", "emulated")
    model = zoo.build(name, "affine4")
    want = zoo.logits(model)
    patch_model(model, fuse="all")
    launches.clear()
    fallbacks.clear()
    with msl.installed(build="fast"):
        got = zoo.logits(model)
    assert zoo.apart(got, want) <= BOUND
    assert launches.total() > 0
    assert not fallbacks


def test_the_golden_file_has_every_class_once() -> None:
    lines = [line.split(":")[0] for line in GOLDEN if line.startswith("mlx-lm")]
    assert sorted(lines) == sorted(f"mlx-lm {name} {form}" for name, form in CASES), NEW
    assert len(CONFIGS) >= 60
    assert len(USED) == 31


def test_every_architectures_class_is_tried_in_four_bits() -> None:
    assert len(zoo.LOADED) == 59
    assert [n for n in zoo.LOADED if (n, "affine4") not in CASES] == []


def test_fusions_of_gguf_files_are_those_of_the_golden_file() -> None:
    assert [line for line in GOLDEN if line.startswith("gguf")] == list(zoo.gguf_lines()), NEW


def test_a_wrong_fused_module_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Control: another activation."""
    monkeypatch.setitem(GATED, "swiglu", GATED["geglu_tanh"])
    with pytest.raises(AssertionError, match="the patched logits differ"):
        examine("qwen3", "float32")


def test_a_lost_fusion_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Control: mlx-lm computes something else in a new version."""
    monkeypatch.setattr(qwen3.MLP, "__call__", lambda self, x: self.down_proj(self.up_proj(x)))
    with pytest.raises(AssertionError, match="read the difference"):
        examine("qwen3", "float32")


def test_more_dispatches_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Control: the model's own code is counted as less than what is fused."""
    monkeypatch.setattr("mlxfuse.fusion.patch.per_token", lambda model: (40, 41))
    with pytest.raises(AssertionError, match="more dispatches"):
        examine("qwen3", "float32")


def test_a_weight_held_twice_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Control: the originals of a joined matrix are kept."""
    monkeypatch.setattr(joining, "_hand_back", lambda *arguments, **options: None)
    with pytest.raises(AssertionError, match="a weight is held twice"):
        examine("llama", "float32")


def test_an_incomplete_undo_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Control: the class stays the fused one."""
    monkeypatch.setattr(emit, "release", lambda module: None)
    with pytest.raises(AssertionError, match="unpatching leaves other modules"):
        examine("qwen3", "float32")
