"""Patched models compute what the unpatched do, hold nothing twice and come back as they were."""

from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models import llama
from mlx_lm.tuner.dora import DoRALinear

from mlxfuse.fusion import patch_model, unpatch_model
from mlxfuse.kernels import fallbacks, launches, unavailable
from mlxfuse.kernels.weight import QuantizedWeight
from mlxfuse.loader import load
from mlxfuse.nn.attention import FusedAttention
from mlxfuse.nn.block import FusedBlock
from mlxfuse.nn.mlp import FusedMLP
from mlxfuse.nn.quantized import QuantizedLinear
from tests import msl
from tests.fusion import stock
from tests.fusion.stock import apart
from tests.models import tiny

# One quantised case for each architecture, then K-quants, a fused tensor with biases, dense ones.
# Of the experts gate and up have different formats.
QUANTIZED = ("llama-q4", "qwen2", "qwen3", "gemma2", "gemma3", "phi3")
GEMMA4 = ("gemma4", "gemma4-e4b", "gemma4-a4b")
OTHERS = ("llama-k-quants", "llama-fused-qkv", "llama-biases", "phi3-long", "qwen3moe-k-quants")
ALL = (*QUANTIZED, *GEMMA4, *OTHERS)
# Sums of 96 products in float32, in another order.
BOUND = 4e-6


@pytest.fixture(params=["reference", "emulated"])
def mode(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("MLXFUSE_KERNELS", request.param)
    launches.clear()
    fallbacks.clear()
    if request.param == "reference":
        yield request.param
        return
    with msl.installed(build="fast"):
        yield request.param


def write(path: Path, name: str) -> Path:
    return tiny.write(path / "m.gguf", tiny.build(name, 0))


def logits(model: nn.Module, *counts: int) -> np.ndarray:
    """Of `counts` tokens a call, one call after the other; float32 [tokens, vocabulary]."""
    return stock.logits(model, counts, 256)


def streams(model: nn.Module) -> dict[str, np.ndarray]:
    """Every array of the tree, parameters or not."""
    return {
        name: np.array(value) for name, value in tree_flatten(model) if isinstance(value, mx.array)
    }


def same_arrays(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> None:
    assert a.keys() == b.keys()
    assert all(a[name].tobytes() == b[name].tobytes() for name in b)


@pytest.mark.parametrize("name", ALL)
def test_patched_logits_are_the_unpatched(name: str, mode: str, tmp_path: Path) -> None:
    model, _ = load(write(tmp_path, name), fuse="all")
    # A prompt in tiles, a small batch, one token.
    schedule = (12, 5, 1)
    got = logits(model, *schedule)
    fused = launches["quantized_matmul"]
    unpatch_model(model)
    want = logits(model, *schedule)
    assert apart(got, want) <= BOUND
    assert not fallbacks
    if mode == "emulated" and name in QUANTIZED:
        # Of each call: qkv, o, gate and up, down in a layer, and the head.
        layers = len(model.layers)
        assert fused == 3 * (4 * layers + 1)
        assert launches["quantized_matmul"] - fused == 3 * (
            (4 if name == "phi3" else 7) * layers + 1
        )


@pytest.mark.parametrize("name", ["qwen3moe", "qwen3moe-k-quants"])
def test_experts_of_a_prompt_take_two_products(name: str, tmp_path: Path) -> None:
    """Gate and up with the activation, and down; beside them q, k and v, o, and the head."""
    with pytest.MonkeyPatch.context() as patch, msl.installed(build="fast"):
        patch.setenv("MLXFUSE_KERNELS", "emulated")
        model, _ = load(write(tmp_path, name), fuse="all")
        for experts, attention in ((2, 2), (3, 4)):
            launches.clear()
            logits(model, 34)
            products = (experts + attention) * len(model.layers) + 1
            assert launches["quantized_matmul"] == products
            unpatch_model(model)


@pytest.mark.parametrize("name", QUANTIZED)
def test_the_decode_is_bit_identical_but_for_the_activation(name: str, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch, msl.installed(build="fast"):
        patch.setenv("MLXFUSE_KERNELS", "emulated")
        model, _ = load(write(tmp_path, name), fuse="qkv")
        got = logits(model, 1, 1)
        unpatch_model(model)
        want = logits(model, 1, 1)
        # Capped scores have a kernel of their own.
        assert np.array_equal(got, want) == (name != "gemma2")
        assert apart(got, want) <= BOUND


def test_a_wrong_fusion_is_noticed(mode: str, tmp_path: Path) -> None:
    """Control: gate and up, or k and v, in each other's place."""
    path = write(tmp_path, "qwen3")
    want = logits(load(path, fuse="off")[0], 5, 1)
    for parent, piece in (("mlp", "up"), ("self_attn", "qkv")):
        model, _ = load(path, fuse="all")
        fused = getattr(model.layers[1][parent]._fused, piece)
        parts = fused.weight.parts
        fused.weight = QuantizedWeight((*parts[:-2], parts[-1], parts[-2]))
        assert apart(logits(model, 5, 1), want) > 1000 * BOUND


def test_the_other_activation_types(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLXFUSE_KERNELS", "emulated")
    path = write(tmp_path, "qwen2")
    with msl.installed(build="fast"):
        want = logits(load(path, fuse="off")[0], 5, 1)
        for dtype, bound in (("float16", 5e-3), ("bfloat16", 5e-2)):
            model, _ = load(path, fuse="all", dtype=dtype)
            assert str(model(mx.array([[1]])).dtype) == f"mlx.core.{dtype}"
            assert 1e-5 < apart(logits(model, 5, 1), want) < bound
    assert not fallbacks


@pytest.mark.usefixtures("fresh_buffers")
@pytest.mark.parametrize("name", ["llama-q4", "llama-fused-qkv", "llama-biases", "phi3-long"])
def test_unpatching_gives_the_same_modules_and_bytes(name: str, tmp_path: Path) -> None:
    path = write(tmp_path, name)
    model, _ = load(path, fuse="all")
    unpatch_model(model)
    ids = {path: id(m) for path, m in model.named_modules()}
    classes = {path: type(m) for path, m in model.named_modules()}
    before, bytes_before = streams(model), mx.get_active_memory()
    report = patch_model(model, fuse="all")
    assert {tally.total for tally in report.tallies.values()} == {len(model.layers)}
    assert mx.get_active_memory() <= bytes_before * 1.001
    for module, fused in (
        (model.layers[0], FusedBlock),
        (model.layers[0].self_attn, FusedAttention),
        (model.layers[0].mlp, FusedMLP),
    ):
        assert isinstance(module, fused)
        assert isinstance(module, module._fused.original)
    # While patched, too, nothing has another name or value.
    assert {path: id(m) for path, m in model.named_modules()} == ids
    same_arrays(streams(model), before)
    unpatch_model(model)
    assert {path: type(m) for path, m in model.named_modules()} == classes
    same_arrays(streams(model), before)
    assert mx.get_active_memory() <= bytes_before * 1.001
    unpatch_model(model)  # nothing left to do


def test_patching_twice_changes_nothing(tmp_path: Path) -> None:
    model, _ = load(write(tmp_path, "qwen3"), fuse="all")
    modules = [id(m) for _, m in model.named_modules()]
    assert patch_model(model, fuse="all") is model.load_report.patch
    assert [id(m) for _, m in model.named_modules()] == modules


def test_the_report_says_what_is_mixed(tmp_path: Path) -> None:
    model, _ = load(write(tmp_path, "llama-q4"), fuse="all")
    lines = "qkv 3/3 (3 mixed: q4_0, q8_0), gate/up 3/3, residual 3/3, norm+rope 3/3"
    assert str(model.load_report.patch) == lines
    model, _ = load(write(tmp_path, "gemma3"), fuse="all")
    assert str(model.load_report.patch) == (
        "qkv 7/7, gate/up 7/7, norm+rope 7/7, 1+norm 1/1, norm+add 7/7"
    )
    model, _ = load(write(tmp_path, "gemma4"), fuse="all")
    lines = "qkv 4/4 (3 mixed: q4_0, q8_0), gate/up 4/4, norm+rope 4/4, norm+add 4/4"
    assert str(model.load_report.patch) == lines


def test_the_choice_of_fusions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, "llama-q4")
    for fuse, text in (
        ("auto", f"nothing fused: {unavailable()}"),
        ("off", "nothing fused"),
        ("gate_up", "gate/up 3/3"),
        (["qkv", "gate_up"], "qkv 3/3 (3 mixed: q4_0, q8_0), gate/up 3/3"),
        (
            "residual",
            "residual 3/3",
        ),
    ):
        assert str(load(path, fuse=fuse)[0].load_report.patch) == text
    with pytest.raises(ValueError, match=r"auto, all, off or names: qkv, gate_up, .*; found qvk"):
        load(path, fuse="qvk,gate_up")
    monkeypatch.setenv("MLXFUSE_KERNELS", "emulated")
    assert list(load(path)[0].load_report.patch.tallies) == [
        *("qkv", "gate_up", "residual", "norm_rope")
    ]


class Other(QuantizedLinear):
    pass


def dora(model: nn.Module) -> None:
    model.layers[1].self_attn.k_proj = DoRALinear.from_base(nn.Linear(64, 32))


def subclassed(model: nn.Module) -> None:
    model.layers[1].self_attn.v_proj.__class__ = Other


def aliased(model: nn.Module) -> None:
    model.layers[1].self_attn.q_proj = model.layers[0].self_attn.q_proj


def streamed(model: nn.Module) -> None:
    model.layers[1].self_attn.v_proj = nn.Linear(64, 32, bias=False)


def attention_subclassed(model: nn.Module) -> None:
    attention = model.layers[1].self_attn
    attention.__class__ = type("Attention", (llama.Attention,), {"__module__": llama.__name__})


@pytest.mark.parametrize(
    ("change", "places", "reason"),
    [
        (dora, [1], "its linears are DoRALinear and quantised"),
        (subclassed, [1], "its linears are Other and quantised"),
        (aliased, [0, 1], "q_proj is used in several places"),
        (streamed, [1], "its linears are dense and quantised"),
        (
            attention_subclassed,
            [1],
            "llama.Attention is not the class that its module has under this name",
        ),
    ],
)
def test_what_is_not_certain_is_left_alone(
    change: object, places: list[int], reason: str, tmp_path: Path
) -> None:
    model, _ = load(write(tmp_path, "llama-q4"), fuse="all")
    unpatch_model(model)
    change(model)
    want = logits(model, 3, 1)
    report = patch_model(model, fuse="all")
    found = [s for s in report.skipped if s[0] == "qkv"]
    assert found == [("qkv", f"model.layers.{i}.self_attn", reason) for i in places]
    assert len(report.tallies["qkv"].fused) == 3 - len(places)
    # The additions need o and down only.
    assert len(report.tallies["residual"].fused) == 3
    assert apart(logits(model, 3, 1), want) <= BOUND


def test_another_mlx_lm_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = load(write(tmp_path, "llama-q4"), fuse="all")
    unpatch_model(model)

    def changed(self: nn.Module, x: mx.array) -> mx.array:
        return self.down_proj(self.gate_proj(x) * self.up_proj(x))

    monkeypatch.setattr(llama.MLP, "__call__", changed)
    report = patch_model(model, fuse="all")
    assert not report.tallies["gate_up"].fused
    assert "llama.MLP.__call__ is not a body that is known" in str(report)
