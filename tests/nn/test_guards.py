"""Guards by place: what is another class, an adapter, shared, or of another type is not fused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.tuner.lora import LoRALinear

from mlxfuse.formats import BY_NAME
from mlxfuse.fusion import patch_model
from mlxfuse.kernels import fallbacks
from mlxfuse.kernels.runtime.backend import backend
from mlxfuse.kernels.weight import Part, QuantizedWeight
from mlxfuse.nn.join_linears import join, single
from mlxfuse.nn.kv.options import KVOptions, compressed, plain_caches
from mlxfuse.nn.quantized import Place, QuantizedLinear
from tests.fusion.stock import apart, logits, make
from tests.kernels.weights import random_blocks, segment

BOUND = 1e-5

# place -> the fusion that it is part of, in a dense and in a quantised model
PLACES = {
    "self_attn.q_proj": "qkv",
    "self_attn.v_proj": "qkv",
    "self_attn.o_proj": "residual",
    "mlp.gate_proj": "gate_up",
    "mlp.up_proj": "gate_up",
    "mlp.down_proj": "residual",
}


def doubled(linear: nn.Module) -> nn.Module:
    """A subclass of its class, which does something else."""

    def call(self: nn.Module, x: mx.array) -> mx.array:
        return 2 * type(linear).__call__(self, x)

    made: nn.Module = type(linear).__new__(type("Doubled", (type(linear),), {"__call__": call}))
    vars(made).update(vars(linear))
    dict.update(made, linear)
    return made


def adapted(linear: nn.Module) -> nn.Module:
    made = LoRALinear.from_base(linear, r=2)
    made.lora_b = 0.1 * mx.random.normal(made.lora_b.shape, key=mx.random.key(1))
    return made


CHANGES: dict[str, Callable[[nn.Module], nn.Module]] = {"subclass": doubled, "adapter": adapted}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("form", ["dense", "affine4"])
@pytest.mark.parametrize("place", PLACES)
def test_another_linear_gives_what_it_gave(place: str, form: str, change: str) -> None:
    model = make("llama", form, num_hidden_layers=1)
    parent, name = place.split(".")
    before = logits(model, (3, 1))
    module = model.layers[0][parent]
    module[name] = CHANGES[change](module[name])
    model.eval()
    want = logits(model, (3, 1))
    assert apart(before, want) > 1e-3
    report = patch_model(model, fuse="all")
    assert apart(logits(model, (3, 1)), want) < BOUND
    claimed = {path for c in report.fused for path in c.claims}
    assert "model.layers.0.mlp.gate_proj" in claimed or "model.layers.0.self_attn.q_proj" in claimed
    # What an adapter adds is added behind a product, but not before an activation.
    fused = change == "adapter" and PLACES[place] != "gate_up"
    assert (f"model.layers.0.{place}" in claimed) == fused


@pytest.mark.parametrize("child", ["gate_proj", "up_proj", "down_proj"])
def test_other_experts_run_as_they_are(child: str) -> None:
    sizes = {"num_local_experts": 4, "num_experts_per_tok": 2}
    model = make("mixtral", "affine4", num_hidden_layers=1, **sizes)
    experts = model.layers[0].block_sparse_moe.switch_mlp

    def call(self: Any, x: mx.array, ids: mx.array, **more: Any) -> mx.array:
        return 2 * kind.__call__(self, x, ids, **more)

    kind = type(experts[child])
    other = kind.__new__(type("Doubled", (kind,), {"__call__": call}))
    vars(other).update(vars(experts[child]))
    dict.update(other, experts[child])
    experts[child] = other
    want = logits(model, (3, 1))
    report = patch_model(model, fuse="all")
    assert apart(logits(model, (3, 1)), want) < BOUND
    name = "experts_sum" if child == "down_proj" else "experts"
    assert name not in {c.name for c in report.fused}


def test_experts_that_are_replaced_later_are_used() -> None:
    sizes = {"num_local_experts": 4, "num_experts_per_tok": 2}
    got, want, other = (make("mixtral", "affine4", num_hidden_layers=1, **sizes) for _ in range(3))
    patch_model(got, fuse="all")
    assert "FusedMoE" in repr(type(got.layers[0].block_sparse_moe))
    for model in (got, want):
        down = other.layers[0].block_sparse_moe.switch_mlp.down_proj
        down.scales = 2 * down.scales
        model.layers[0].block_sparse_moe.switch_mlp = other.layers[0].block_sparse_moe.switch_mlp
    assert apart(logits(got, (3, 1)), logits(want, (3, 1))) < BOUND


@pytest.mark.parametrize("training", [False, True])
def test_a_sum_over_experts_is_of_their_type(training: bool) -> None:
    """Also where they are not fused, with scores of a wider type."""
    sizes = {"num_local_experts": 4, "num_experts_per_tok": 2}
    model = make("mixtral", "affine4", mx.float16, num_hidden_layers=1, **sizes)
    patch_model(model, fuse="all")
    experts = model.layers[0].block_sparse_moe.switch_mlp
    experts.train(training)
    x, ids = mx.ones((1, 128), mx.float16), mx.array([[0, 2]])
    scores = mx.array([[0.25, 0.75]])
    assert experts(x, ids, scores, cast=True).dtype == mx.float16
    assert experts(x, ids, scores).dtype == mx.float32
    assert mx.allclose(
        experts(x, ids, scores, cast=True).astype(mx.float32),
        experts(x, ids, scores),
        rtol=2e-3,
        atol=1e-4,
    )


def test_dense_linears_of_different_types_are_not_joined() -> None:
    model = make("llama", "dense", num_hidden_layers=1)
    attention = model.layers[0].self_attn
    attention.k_proj.weight = attention.k_proj.weight.astype(mx.float16)
    want = logits(model, (3, 1))
    report = patch_model(model, fuse="all")
    assert "qkv" not in {c.name for c in report.fused}
    assert [skip.reason for skip in report.skipped if skip.name == "qkv"] == [
        "its linears have different types"
    ]
    assert np.array_equal(logits(model, (3, 1)), want)
    assert attention.k_proj.weight.dtype == mx.float16


def test_views_of_one_weight_in_another_order_are_not_the_whole() -> None:
    fmt = BY_NAME["Q4_0"]
    parts = segment(random_blocks(fmt, 10, 64), fmt)
    whole = QuantizedWeight((Part(parts, 0, 4), Part(parts, 4, 6)))
    first, second = whole.split()
    parent = nn.Module()
    parent.a = QuantizedLinear(first, place=Place(whole, 0))
    parent.b = QuantizedLinear(second, place=Place(whole, 1))
    x = mx.random.normal((1, 3, 64), key=mx.random.key(2))
    for names in (("a", "b"), ("b", "a")):
        found = join(parent, names).split(x, backend())
        assert found is not None
        for name, part in zip(names, found, strict=True):
            assert part.shape == parent[name](x).shape
            assert mx.allclose(part, parent[name](x), atol=1e-5)
    assert join(parent, ("a", "b")).weight is whole
    assert join(parent, ("b", "a")).weight is not whole


def test_a_residual_of_another_type_promotes() -> None:
    """As x and the residual do without the kernel, in which all is of x's type."""
    fmt = BY_NAME["Q4_0"]
    parent = nn.Module()
    parent.o = QuantizedLinear(QuantizedWeight.whole(segment(random_blocks(fmt, 8, 64), fmt)))
    projection = single(parent, "o")
    x = mx.random.normal((1, 64), key=mx.random.key(0)).astype(mx.float16)
    residual = mx.full((1, 8), 4097.0)  # float16 has no such number
    assert projection.added(x, residual, backend()) is None
    same = projection.added(x, residual.astype(mx.float16), backend())
    assert same is not None
    assert same.dtype == mx.float16


CACHED = {
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8},
    "gemma2": {"head_dim": 32},
    "qwen3": {},
}


@pytest.mark.parametrize("name", CACHED)
def test_a_patched_model_with_compressed_caches(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With sinks, soft caps and windows: as its own code over the same caches."""
    model = make(name, "affine4", **CACHED[name])
    for layer in model.layers:
        if "sinks" in layer.self_attn:
            sinks = layer.self_attn.sinks
            layer.self_attn.sinks = mx.linspace(1, 3, sinks.size).astype(sinks.dtype)
    options = KVOptions.parse("k8v8")

    def run() -> np.ndarray:
        cache = compressed(plain_caches(model), options)
        tokens = mx.array(np.random.RandomState(1).randint(0, 200, (1, 24)))
        rows = [model(tokens[:, :20], cache=cache)[0]]
        rows += [model(tokens[:, i : i + 1], cache=cache)[0] for i in range(20, 24)]
        return np.array(mx.concatenate(rows).astype(mx.float32))

    want = run()
    patch_model(model, fuse="all")
    assert apart(run(), want) < 1e-4
    if name == "gpt_oss":  # control: they take part
        for layer in model.layers:
            layer.self_attn.sinks = layer.self_attn.sinks - 20
        assert apart(run(), want) > 1e-3


def test_a_cache_that_is_compressed_otherwise_is_refused() -> None:
    from mlxfuse.errors import UnsupportedError

    model = make("llama")
    made = compressed(plain_caches(model), KVOptions.parse("k8v4"))
    assert compressed(made, KVOptions.parse("k8v4")) == made
    for other in ("k8v8", "k4v4", "k8v16"):
        with pytest.raises(UnsupportedError, match=f"compressed as k8v4, not as {other}"):
            compressed(made, KVOptions.parse(other))


def test_one_rotation_is_used_with_one_offset_and_with_many(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And in several types: what is prepared is of all that its launch depends on."""
    from tests import msl

    monkeypatch.setenv("MLXFUSE_KERNELS", "emulated")
    model = make("llama", "affine4", num_hidden_layers=1)
    patch_model(model, fuse="norm_rope")
    rotation = model.layers[0].self_attn._fused.rotation
    q, k = mx.random.normal((2, 1, 128)), mx.random.normal((2, 1, 64))
    rope = model.layers[0].self_attn.rope
    fallbacks.clear()
    with msl.installed(build="fast"):
        for dtype in (mx.float32, mx.float16, mx.float32):
            for offset in (5, mx.array([5, 9]), 3, mx.array([1, 0])):
                got = rotation(q.astype(dtype), k.astype(dtype), offset, backend())
                for x, heads, y in zip((q, k), (4, 2), got, strict=True):
                    x = x.astype(dtype).reshape(2, 1, heads, -1).transpose(0, 2, 1, 3)
                    want = rope(x, offset=offset)
                    assert y.dtype == dtype
                    assert mx.abs(y - want).max().item() < (1e-5 if dtype == mx.float32 else 1e-2)
    assert not fallbacks


def test_one_projection_is_used_with_several_types_and_shapes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from tests import msl

    monkeypatch.setenv("MLXFUSE_KERNELS", "emulated")
    fmt = BY_NAME["Q4_0"]
    parent = nn.Module()
    parent.o = QuantizedLinear(QuantizedWeight.whole(segment(random_blocks(fmt, 8, 64), fmt)))
    projection = single(parent, "o")
    x = mx.random.normal((1, 2, 64), key=mx.random.key(0))
    residual = mx.random.normal((1, 2, 8), key=mx.random.key(1))
    want = residual + parent.o(x)
    with msl.installed(build="fast"):
        for dtype, bound in ((mx.float32, 1e-5), (mx.float16, 1e-2), (mx.float32, 1e-5)):
            for given in (x, x.reshape(2, 1, 64)):
                r = residual.reshape(*given.shape[:2], 8).astype(dtype)
                got = projection.added(given.astype(dtype), r, backend())
                assert (got.dtype, got.shape) == (dtype, r.shape)
                assert mx.allclose(got.reshape(want.shape), want, atol=bound)
                (plain,) = projection.split(given.astype(dtype), backend())
                assert mx.allclose(plain + r, got, atol=bound)
