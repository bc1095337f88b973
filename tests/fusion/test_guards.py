"""Each guard of a fusion is needed, and each number of a module reaches the kernel's arguments."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.models import gemma3_text, rope_utils
from mlx_lm.tuner.dora import DoRALinear

from mlxfuse.errors import NotFusible
from mlxfuse.fusion import unpatch_model
from mlxfuse.fusion.candidates import Tree
from mlxfuse.fusion.certify import certify
from mlxfuse.fusion.checks import Reference
from mlxfuse.fusion.forms import _rope_options, attention_form, norm_options, rotation
from mlxfuse.fusion.report import Check
from mlxfuse.kernels.norm.norm_rope import RopeOptions, norm_rope
from mlxfuse.loader import load
from mlxfuse.nn.join_linears import check_experts, check_joinable, cut, join, single
from tests.fusion.stock import make
from tests.models import tiny


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(NotFusible) as reason:
        call()
    return str(reason.value)


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
SU = {
    "rope_type": "longrope",
    "original_max_position_embeddings": 16,
    "short_factor": [1.0] * 8,
    "long_factor": [1.0 + i for i in range(8)],
}
ROPES = {
    "scale": lambda: nn.RoPE(16, scale=0.25),
    "base": lambda: nn.RoPE(16, base=300.0),
    "traditional": lambda: nn.RoPE(16, traditional=True),
    "dims": lambda: nn.RoPE(8),
    "frequencies": lambda: rope_utils.initialize_rope(16, 300.0, False, LLAMA3, 256),
    "mscale of yarn": lambda: rope_utils.initialize_rope(16, 300.0, False, YARN, 256),
    "traditional yarn": lambda: rope_utils.initialize_rope(16, 300.0, True, YARN, 256),
    "mscale of longrope": lambda: rope_utils.initialize_rope(16, 300.0, False, SU, 256),
}


@pytest.mark.parametrize("name", ROPES)
def test_every_number_of_a_rotation_reaches_the_kernel(name: str) -> None:
    rope = ROPES[name]()
    q, k = (mx.random.normal((1, 5, n * 16), key=mx.random.key(n)) for n in (4, 2))
    got = norm_rope(q, k, 7, RopeOptions(heads=4, kv_heads=2, **_rope_options(rope)))
    for given, rotated in ((q, got[0]), (k, got[1])):
        heads = given.reshape(1, 5, -1, 16).transpose(0, 2, 1, 3)
        assert mx.allclose(rotated, rope(heads, offset=7), atol=1e-5)
        plain = nn.RoPE(16)(heads, offset=7)
        assert not mx.allclose(rotated, plain, atol=1e-2)  # control: the default does otherwise


def test_the_numbers_of_a_norm_are_its_own() -> None:
    assert norm_options(nn.RMSNorm(8, eps=0.25)) == {"eps": 0.25, "offset": 0.0}
    assert norm_options(gemma3_text.RMSNorm(8, eps=0.5)) == {"eps": 0.5, "offset": 1.0}
    assert "LayerNorm" in refusal(lambda: norm_options(nn.LayerNorm(8)))


def test_heads_of_different_sizes_are_not_rotated_together() -> None:
    module = make("llama").layers[0].self_attn
    form = attention_form(module, certify(type(module), "attention"))
    rotation(module, form)
    form.rows = form.rows[0], form.rows[1] * 2, form.rows[2]
    assert refusal(lambda: rotation(module, form)) == "its heads of q and k have different sizes"
    module.q_proj = DoRALinear.from_base(module.q_proj)
    form = attention_form(module, certify(type(module), "attention"))
    assert refusal(lambda: rotation(module, form)) == "its linears are DoRALinear and dense"


def test_one_array_that_is_shared_is_enough() -> None:
    model = make("llama", "affine4")
    mlp = model.layers[0].mlp
    names = ("gate_proj", "up_proj")
    Tree.of(model).check_alone(mlp, names)
    mlp.gate_proj.scales = model.layers[1].mlp.gate_proj.scales
    reason = "gate_proj shares its weight with another module"
    assert refusal(lambda: Tree.of(model).check_alone(mlp, names)) == reason
    Tree.of(model).check_alone(mlp, names, arrays=False)


class Doubled(nn.QuantizedLinear):
    def __call__(self, x: mx.array) -> mx.array:
        return 2 * super().__call__(x)


def holder(*linears: nn.Module) -> nn.Module:
    parent = nn.Module()
    for name, linear in zip("abc", linears, strict=False):
        parent[name] = linear
    return parent


def quantized(rows: int = 32, columns: int = 64, **how: object) -> nn.QuantizedLinear:
    return nn.QuantizedLinear(columns, rows, bias=False, **{"group_size": 32, "bits": 4, **how})


def doubled() -> nn.Module:
    linear = quantized()
    linear.__class__ = Doubled
    return linear


def adapted() -> nn.Module:
    return DoRALinear.from_base(quantized())


def half(linear: nn.Linear) -> nn.Linear:
    linear.set_dtype(mx.float16)
    return linear


@pytest.mark.parametrize("odd", [doubled, adapted])
def test_subclasses_and_adapters_are_left_alone(odd: Callable[[], nn.Module]) -> None:
    name = type(odd()).__name__
    assert name in refusal(lambda: single(holder(odd()), "a"))
    assert name in refusal(lambda: cut(holder(odd()), "a", (16, 16)))
    assert name in refusal(lambda: check_joinable([quantized(), odd()]))


def test_what_cannot_be_joined() -> None:
    dense = nn.Linear(64, 32, bias=False)
    check_joinable([quantized(), quantized(16)])
    different = "its linears have different"
    for linears, reason in (
        ([dense, half(nn.Linear(64, 32, bias=False))], f"{different} types"),
        ([dense, nn.Linear(32, 32, bias=False)], f"{different} inputs"),
        ([quantized(), quantized(columns=128)], f"{different} inputs"),
        ([dense, quantized()], "its linears are dense and quantised"),
    ):
        assert refusal(lambda linears=linears: check_joinable(linears)) == reason
    biased = nn.QuantizedLinear(64, 32, bias=True, group_size=32, bits=4)
    biased.bias = biased.bias.astype(mx.float16)
    assert refusal(lambda: check_joinable([biased, quantized()])) == f"{different} types"
    assert "SwitchLinear" not in refusal(lambda: check_experts([dense, dense]))


def test_a_bias_cannot_be_added_by_a_dense_matrix() -> None:
    single(holder(nn.Linear(64, 32, bias=False)), "a")
    reason = refusal(lambda: single(holder(nn.Linear(64, 32)), "a"))
    assert reason == "a is dense with a bias, which cannot add it"


def test_rows_stay_in_the_order_that_was_asked_for(tmp_path: Path) -> None:
    """Views of one whole weight in another order are not that weight."""
    path = tiny.write(tmp_path / "m.gguf", tiny.build("llama-q4", 0))
    model, _ = load(path, fuse="all")
    unpatch_model(model)
    mlp = model.layers[0].mlp
    gate, up = (mlp[name].weight.parts for name in ("gate_proj", "up_proj"))
    assert join(mlp, ["gate_proj", "up_proj"]).weight is mlp.gate_proj.place.whole
    assert join(mlp, ["up_proj", "gate_proj"]).weight.parts == (*up, *gate)


@pytest.mark.parametrize(
    ("dtype", "error", "typical", "within"),
    [
        (mx.float32, 1e-3, 0.0, False),
        (mx.float32, 1e-5, 1e-5, True),
        (mx.float16, 1.0, 1e-3, True),
        (mx.float16, 1.0, 0.5, False),
        (mx.float32, float("nan"), 0.0, False),
    ],
)
def test_a_check_takes_the_largest_error_in_float32(
    dtype: mx.Dtype, error: float, typical: float, within: bool
) -> None:
    """In shorter types the typical one: near-equal experts change places by a rounding."""
    reference = Reference(mx.zeros((1, 1), dtype))
    assert reference.within(Check(error, typical, 1.0, 1.0)) is within
