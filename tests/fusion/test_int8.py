"""Int8 activations in models of mlx-lm: which norms and linears, and what it costs in accuracy."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlxfuse import PatchError, patch_model, unpatch_model
from mlxfuse.kernels import fallbacks, launches
from tests import msl
from tests.dispatches import of_layer
from tests.fusion.stock import apart, logits, make
from tests.fusion.test_stock import BOUND, MOE


@pytest.fixture(autouse=True)
def counters() -> None:
    launches.clear()
    fallbacks.clear()


@pytest.mark.parametrize("mode", ["reference", "emulated"])
def test_int8_activations(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLXFUSE_KERNELS", mode)
    model = make("llama", "affine4")
    want = logits(model, (3, 1))
    with msl.installed(build="fast"):
        report = patch_model(model, fuse="all", act_quant="on")
        got = logits(model, (3, 1))
        ran = dict(launches)
        # The switch counts at every call.
        monkeypatch.setenv("MLXFUSE_DISABLE", "int8")
        floats = logits(model, (3, 1))
        monkeypatch.setenv("MLXFUSE_DISABLE", "residual, int8:*")
        assert np.array_equal(logits(model, (3, 1)), floats)
        monkeypatch.delenv("MLXFUSE_DISABLE")
        assert np.array_equal(logits(model, (3, 1)), got)
    assert len(report.tallies["int8"].fused) == report.tallies["int8"].total == 8
    assert not [s for s in report.skipped if s.name == "int8"]
    assert 1e-3 < apart(got, want) < 0.1
    assert apart(floats, want) <= BOUND
    if mode == "emulated":
        assert {op: n for op, n in ran.items() if op not in ("dequantize", "norm_rope")} == {
            "rms_norm": 8,
            "quantize_int8": 8,
            "int8_matmul": 16,
        }
    unpatch_model(model)
    assert np.array_equal(logits(model, (3, 1)), want)
    assert patch_model(model, fuse="all").tallies.get("int8") is None
    with pytest.raises(ValueError, match="act_quant is auto, on or off; found 'yes'"):
        patch_model(model, act_quant="yes")


@pytest.mark.parametrize(
    ("name", "kind", "fuse", "reason"),
    [
        ("llama", "affine4", "all,-qkv", "what reads it has no kernel or is not fused"),
        ("llama", "mxfp4", "all", "int8 activations: mxfp4 is no scale"),
        ("llama", "affine4", "all,-int8:*.o", "switched off by fuse"),
    ],
)
def test_norms_whose_readers_need_floats(name: str, kind: str, fuse: str, reason: str) -> None:
    model = make(name, kind)
    want = logits(model)
    report = patch_model(model, fuse=fuse, act_quant="on")
    found = [s.reason for s in report.skipped if s.name == "int8"]
    tally = report.tallies["int8"]
    assert len(found) + len(tally.fused) == tally.total == 8
    assert found
    assert all(r.startswith(reason) for r in found)
    if not tally.fused:
        assert apart(logits(model), want) <= BOUND


def test_without_fusions_there_are_none() -> None:
    """And it is told: a comparison would be one of the model with itself."""
    model = make("llama", "affine4")
    report = patch_model(model, fuse="off", act_quant="on")
    assert [s.reason for s in report.skipped] == ["no addition of the layer is fused"] * 2
    assert (len(report.tallies["int8"].fused), report.tallies["int8"].total) == (0, 2)
    with pytest.raises(PatchError, match=r"int8 of model\.layers\.0: no addition"):
        patch_model(model, fuse="off", act_quant="on", strict=True)
    assert "int8" not in patch_model(model, fuse="off", strict=True).tallies  # the control


class Heard(nn.Module):
    """In the place of a router, what it is given."""

    def __init__(self, router: nn.Module) -> None:
        super().__init__()
        self.router, self.seen = router, []

    def __call__(self, x: mx.array) -> mx.array:
        self.seen.append(x)
        y: mx.array = self.router(x)
        return y


# Of a layer: the norms and the last linears that read what is rounded.
NORMS = ("input_layernorm", "post_attention_layernorm")
SHARED = {**MOE, "shared_expert_intermediate_size": 64}


@pytest.mark.parametrize("mode", ["reference", "emulated"])
def test_a_norm_gives_floats_and_int8_in_one_dispatch(
    mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The router has the floats of the norm alone; experts and shared expert take int8."""
    monkeypatch.setenv("MLXFUSE_KERNELS", mode)
    model = make("qwen2_moe", "affine4", num_hidden_layers=1, **SHARED)
    layer = model.layers[0]
    layer.post_attention_layernorm.weight = mx.random.normal((128,))
    want = logits(model, (3, 1))
    layer.mlp.gate = heard = Heard(layer.mlp.gate)
    with msl.installed(build="fast"):
        report = patch_model(model, fuse="all,-int8:*.o,-int8:*.input_*", act_quant="on")
        paths = [c.path.removeprefix("model.layers.0.") for c in report.fused if c.name == "int8"]
        assert paths == ["mlp.shared_expert.down", "post_attention_layernorm"]
        launches.clear()
        got = logits(model, (3, 1))
        if mode == "emulated":
            # Gate and up of the experts and of the shared one, and down of the latter, twice.
            assert (launches["rms_norm"], launches["int8_matmul"]) == (2, 6)
        monkeypatch.setenv("MLXFUSE_DISABLE", "int8")
        alone = logits(model, (3, 1))
        monkeypatch.delenv("MLXFUSE_DISABLE")
    int8, floats = heard.seen[:2], heard.seen[2:]
    for a, b in zip(int8, floats, strict=True):
        # MLX's own norm adds up in another order than the kernel does.
        assert (
            np.array_equal(a, b) if mode == "reference" else apart(np.array(a), np.array(b)) < 1e-6
        )
    assert 1e-4 < apart(got, want) < 0.1
    assert apart(alone, want) <= BOUND
    assert of_layer(model)["rms_norm"] == 2
