"""Weights that are changed in place after patching, and copies of a patched model."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models.cache import KVCache, make_prompt_cache

from mlxfuse.fusion import patch_model, unpatch_model
from mlxfuse.kernels import fallbacks
from mlxfuse.loader import load
from mlxfuse.nn.fused import FusedModule
from mlxfuse.nn.kv.cache import CompressedKVCache
from mlxfuse.nn.snapshot import Snapshot, Watched
from tests.fusion import zoo
from tests.models import tiny

OPERATORS: dict[str, Callable[[Any], Any]] = {
    "__setitem__": lambda w: w.__setitem__(0, 3),
    "__iadd__": lambda w: w.__iadd__(1),
    "__isub__": lambda w: w.__isub__(1),
    "__imul__": lambda w: w.__imul__(2),
    "__itruediv__": lambda w: w.__itruediv__(2),
    "__imod__": lambda w: w.__imod__(2),
    "__ipow__": lambda w: w.__ipow__(2),
}


@pytest.mark.parametrize("operator", OPERATORS)
def test_a_change_in_place_is_noticed(operator: str) -> None:
    held = {"w": mx.arange(6.0) + 2, "other": mx.ones(2)}
    snapshot = Snapshot([(held.get, "w"), (held.get, "other")])
    other = Snapshot([(held.get, "other")])
    before = held["w"].tolist()
    assert snapshot.holds()
    OPERATORS[operator](held["w"])
    assert held["w"].tolist() != before
    assert not snapshot.holds()
    assert not snapshot.holds()
    assert other.holds()  # another array's change is not its own
    held["other"] = mx.ones(2)
    assert not other.holds()


def test_every_operator_in_place_is_counted() -> None:
    """MLX has no other method that changes an array."""
    in_place = {n for n in dir(mx.array) if n.startswith("__i") and n[3:4].islower()}
    in_place -= {"__init__", "__init_subclass__", "__int__", "__index__", "__invert__", "__iter__"}
    assert {"__imul__", "__ior__"} <= in_place
    for name in (*in_place, "__setitem__"):
        assert name in vars(Watched), name


def test_several_are_looked_at_in_one_go() -> None:
    """A replaced entry of any of them is noticed, and a change in place before they were joined."""
    layers = [{"weight": mx.ones(4)}, {"weight": mx.zeros(4)}]
    parts = [Snapshot([(layer.get, "weight")]) for layer in layers]
    assert Snapshot.joined(parts).holds()
    for layer in layers:
        own, joined = layer["weight"], Snapshot.joined(parts)
        layer["weight"] = mx.array(own)
        assert not joined.holds()
        layer["weight"] = own
        assert joined.holds()
    layers[1]["weight"] += 1
    assert parts[0].holds()
    assert not parts[1].holds()
    assert not Snapshot.joined(parts).holds()
    assert not joined.holds()


def test_a_watched_array_is_as_any_other(tmp_path: Path) -> None:
    array = mx.arange(4, dtype=mx.float16)
    held = {"w": array}
    snapshot = Snapshot([(held.get, "w")])
    assert held["w"] is array
    assert isinstance(array, mx.array)
    assert type(array + 1) is mx.array
    for made in (copy.deepcopy(array), copy.copy(array), pickle.loads(pickle.dumps(array))):
        assert type(made) is mx.array
        assert made.tolist() == [0, 1, 2, 3]
        made *= 2
    assert array.tolist() == [0, 1, 2, 3]
    assert snapshot.holds()
    mx.save_safetensors(str(tmp_path / "a.safetensors"), held)
    assert mx.load(str(tmp_path / "a.safetensors"))["w"].tolist() == [0, 1, 2, 3]


PLACES = (
    *("self_attn.q_proj", "self_attn.v_proj", "self_attn.o_proj", "input_layernorm"),
    *("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "self_attn.k_norm"),
)


def module_at(model: nn.Module, place: str) -> nn.Module:
    module = model.layers[0]
    for name in place.split("."):
        module = module[name]
    return module


@pytest.mark.parametrize("form", ["float32", "affine1"])
@pytest.mark.parametrize("place", PLACES)
def test_weights_changed_in_place_are_used(place: str, form: str) -> None:
    """Also those without a kernel, of which the joined rows are in an array of their own."""
    got, want = (zoo.build("qwen3", "float32", num_hidden_layers=1) for _ in range(2))
    if form != "float32":
        for model in (got, want):
            nn.quantize(model, 64, 1)
    patch_model(got, fuse="all")
    old = zoo.logits(got)
    for model in (got, want):
        module = module_at(model, place)
        array = module.scales if "scales" in module else module.weight
        factors = 1 + mx.arange(len(array))  # a norm would undo a single one
        array *= factors.reshape(-1, *[1] * (array.ndim - 1))
    new = zoo.logits(want)
    assert zoo.apart(old, new) > 1e-3
    assert zoo.apart(zoo.logits(got), new) < 1e-5
    # Patched anew, it is fused with the weights as they are.
    fallbacks.clear()
    patch_model(got, fuse="all")
    assert zoo.apart(zoo.logits(got), new) < 1e-5
    reasons = [reason for _, reason in fallbacks]
    assert "its arrays are not those that were fused" not in reasons


def test_biases_changed_in_place_are_used() -> None:
    got, want = (zoo.build("qwen2", "affine4", num_hidden_layers=1) for _ in range(2))
    patch_model(got, fuse="all")
    for model in (got, want):
        model.layers[0].self_attn.k_proj.bias[...] = mx.arange(
            model.layers[0].self_attn.k_proj.bias.size, dtype=mx.float32
        )
        model.layers[0].self_attn.v_proj.bias += 1
    assert zoo.apart(zoo.logits(got), zoo.logits(want)) < 1e-5


def fused(model: nn.Module) -> int:
    return sum(isinstance(module, FusedModule) for module in model.modules())


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("name", ["llama-q4", "qwen2moe", "qwen35", "gemma4"])
def test_a_copy_is_a_model_of_its_own(name: str, how: str, tmp_path: Path) -> None:
    model, _ = load(tiny.write(tmp_path / "m.gguf", tiny.build(name, 0)), fuse="all")
    before, want = fused(model), zoo.logits(model)
    assert before
    other = COPIES[how](model)
    assert fused(other) == 0
    assert zoo.apart(zoo.logits(other), want) < 1e-5
    unpatch_model(other)
    assert fused(model) == before
    # It can be patched, changed and unpatched without the original.
    patch_model(other, fuse="all")
    assert fused(other) == before
    assert zoo.apart(zoo.logits(other), want) < 1e-5
    norm = other.layers[0].post_attention_layernorm
    norm.weight *= 1 + mx.arange(norm.weight.size)
    assert zoo.apart(zoo.logits(other), want) > 1e-3
    assert np.array_equal(zoo.logits(model), want)
    unpatch_model(model)
    assert (fused(model), fused(other)) == (0, before)
    # Nothing of the original stays with the copy's report.
    for candidate in other.load_report.patch.fused:
        candidate.undo()
    assert fused(other) == before


@pytest.mark.parametrize("how", COPIES)
def test_a_copy_has_the_models_own_caches(how: str) -> None:
    model = zoo.build("llama", "affine4")
    patch_model(model, fuse="off", kv_bits=8)
    assert type(make_prompt_cache(model)[0]) is CompressedKVCache
    other = COPIES[how](model)
    assert type(make_prompt_cache(other)[0]) is KVCache
    patch_model(other, kv_bits=4)
    assert make_prompt_cache(other)[0].k_bits == 4
    unpatch_model(other)
    assert type(make_prompt_cache(other)[0]) is KVCache
    assert make_prompt_cache(model)[0].k_bits == 8
