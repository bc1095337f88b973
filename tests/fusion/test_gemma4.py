"""Gemma 4's variants: keys that are values too, keys and values of earlier layers, experts."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache

from mlxfuse.fusion import patch_model, unpatch_model
from mlxfuse.kernels import fallbacks, launches
from mlxfuse.kernels.runtime.backend import backend
from mlxfuse.nn.fused import Run
from mlxfuse.nn.kv.options import KVOptions, compressed, plain_caches
from tests import msl
from tests.fusion import zoo
from tests.fusion.test_zoo import BOUND, contents, modules

PERIODS = ["sliding_attention", "sliding_attention", "full_attention"]
NONE: dict[str, Any] = {"num_kv_shared_layers": 0, "hidden_size_per_layer_input": 0}
VARIANTS: dict[str, dict[str, Any]] = {
    "31b": {
        **NONE,
        "attention_k_eq_v": True,
        "num_key_value_heads": 4,
        "num_global_key_value_heads": 1,
        "layer_types": PERIODS,
        "num_hidden_layers": 3,
    },
    "e4b": {
        "layer_types": [*PERIODS[:1], *PERIODS, *PERIODS[1:]],
        "num_hidden_layers": 6,
        "hidden_size_per_layer_input": 64,
        "final_logit_softcapping": 4.0,
    },
    "a4b": {
        **NONE,
        "attention_k_eq_v": True,
        "num_global_key_value_heads": 1,
        "layer_types": PERIODS,
        "num_hidden_layers": 3,
        "enable_moe_block": True,
        "top_k_experts": 2,
    },
}
EXPECTED = {
    "31b": {"qkv": 3, "gate_up": 3, "norm_rope": 3},
    "e4b": {"qkv": 4, "gate_up": 6, "norm_rope": 6},
    "a4b": {"qkv": 3, "gate_up": 3, "norm_rope": 3},
}


def build(name: str, form: str = "float32", **own: Any) -> Any:
    return zoo.build("gemma4_text", form, **{**VARIANTS[name], **own})


@pytest.fixture
def reference(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("MLXFUSE_KERNELS", "reference")
    with zoo.uncompiled():
        yield


@pytest.mark.usefixtures("reference")
@pytest.mark.parametrize("form", ["float32", "affine4"])
@pytest.mark.parametrize("name", VARIANTS)
def test_patched_and_back(name: str, form: str) -> None:
    model = build(name, form)
    want, as_built, before = zoo.logits(model), modules(model), contents(model)
    report = patch_model(model, fuse="all")
    found = {n: len(t.fused) for n, t in report.tallies.items()}
    quantised = {"embedding": 1 + (name == "e4b")} if form == "affine4" else {}
    experts = (
        dict.fromkeys(("experts", "experts_sum"), 3 * (form == "affine4")) if name == "a4b" else {}
    )
    assert {n: k for n, k in found.items() if n != "post_norm"} == {
        **EXPECTED[name],
        **experts,
        **quantised,
    }
    assert len(report.tallies["post_norm"].fused) == len(model.layers)
    skipped = {(n, reason) for n, _, reason in report.skipped}
    assert skipped == {(n, "its experts are SwitchLinear") for n in experts if not quantised}
    assert zoo.apart(zoo.logits(model), want) <= BOUND
    unpatch_model(model)
    assert modules(model) == as_built
    assert contents(model) == before
    assert np.array_equal(zoo.logits(model), want)


@pytest.mark.parametrize("name", ["e4b", "a4b"])
def test_decoded_by_the_kernels(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLXFUSE_KERNELS", "emulated")
    with zoo.uncompiled():
        model = build(name, "affine4")
        want = zoo.logits(model)
        report = patch_model(model, fuse="all")
        launches.clear()
        fallbacks.clear()
        with msl.installed(build="fast"):
            got = zoo.logits(model)
    assert zoo.apart(got, want) <= BOUND
    joined = sum(len(report.tallies[kind].fused) for kind in ("qkv", "gate_up"))
    assert launches["quantized_matmul"] >= zoo.DECODED * joined
    assert launches["norm_rope"] == (1 + zoo.DECODED) * len(model.layers)
    assert not fallbacks


@pytest.mark.usefixtures("reference")
def test_only_layers_that_are_read_keep_what_they_fetch() -> None:
    """Compressed keys and values are attended to where they lie, or handed to later layers."""
    model = build("e4b")
    patch_model(model, fuse="all")
    read = [bool(layer.self_attn._fused.read) for layer in model.layers]
    assert read == [False, False, True, True, False, False]
    seen = {}
    caches = compressed(plain_caches(model), KVOptions(16, 16, rotate=False))
    for i, cache in enumerate(caches):
        fetch = cache.update_and_fetch
        cache.update_and_fetch = lambda k, v, i=i, fetch=fetch: seen.setdefault(i, fetch(k, v))
    ids = mx.array([[3, 1, 4, 1, 5]])
    got = model(ids, cache=caches)
    assert set(seen) == {2, 3}
    want = model(ids, cache=make_prompt_cache(model))
    assert zoo.apart(np.array(got), np.array(want)) <= BOUND
    # Control: a layer that needs what another did not keep says so.
    model.layers[3].self_attn._fused.read = False
    with pytest.raises(ValueError, match="received no shared_kv"):
        model(ids, cache=compressed(plain_caches(model), KVOptions()))


@pytest.mark.usefixtures("reference")
def test_an_update_of_a_linear_is_used() -> None:
    model = build("31b")
    patch_model(model, fuse="all")
    before = zoo.logits(model)
    linear = model.layers[2].self_attn.k_proj
    linear.weight = 1.5 * linear.weight[::-1]
    changed = zoo.logits(model)
    assert zoo.apart(changed, before) > 1e-2
    unpatch_model(model)
    assert np.array_equal(zoo.logits(model), changed)


def test_a_kept_graph_sees_an_update(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Metal, where parts of a layer are graphs that are built once."""
    monkeypatch.setenv("MLXFUSE_KERNELS", "reference")
    model = build("31b", "affine4", num_hidden_layers=1)
    want = zoo.logits(model)
    patch_model(model, fuse="all")
    monkeypatch.setattr(Run, "of", classmethod(lambda cls, x: cls(backend(), True)))
    attention = model.layers[0].self_attn
    assert zoo.apart(zoo.logits(model), want) <= BOUND
    assert set(attention._fused.kept) == {"enter", "leave"}
    attention.o_proj.scales = 2 * attention.o_proj.scales
    changed = zoo.logits(model)
    assert zoo.apart(changed, want) > 1e-2
    unpatch_model(model)
    assert zoo.apart(changed, zoo.logits(model)) <= BOUND


@pytest.mark.usefixtures("reference")
def test_a_gate_that_has_changed_is_used() -> None:
    """The gate of a layer's own input, and what is given, are multiplied in one dispatch."""
    model = build("e4b", "affine4")
    patch_model(model, fuse="all")
    assert all(layer._fused.gate is not None for layer in model.layers)
    before = zoo.logits(model)
    gate = model.layers[1].per_layer_input_gate
    gate.scales = gate.scales[::-1] * 2
    changed = zoo.logits(model)
    assert zoo.apart(changed, before) > 1e-3
    unpatch_model(model)
    assert np.array_equal(zoo.logits(model), changed)


@pytest.mark.parametrize("name", ["31b", "e4b", "a4b"])
def test_dispatches(name: str) -> None:
    """Of a layer with keys and values of its own, and of one without; and of the rest."""
    model = build(name, "affine4")
    report = patch_model(model, fuse="all")
    own = sum(layer.self_attn.has_kv for layer in model.layers)
    own_layer, layer = {"31b": (10, 0), "e4b": (13, 11), "a4b": (15, 0)}[name]
    # The embedding and its scale, the first norm, the last one, the head and its cap; of inputs of
    # layers their rows, their scale, the product and its scale, the norm, and a sum with a scale.
    rest = 6 + 7 * (name == "e4b")
    count = own * own_layer + (len(model.layers) - own) * layer + rest
    assert (report.dispatches or (0, 0))[1] == count


def test_a_router_that_has_changed_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the kernels, which choose experts in one dispatch, and norm what they read in one."""
    monkeypatch.setenv("MLXFUSE_KERNELS", "emulated")
    with zoo.uncompiled(), msl.installed(build="fast", lint=False):
        model = build("a4b", "affine4", num_hidden_layers=1, layer_types=PERIODS[:1])
        patch_model(model, fuse="all")
        x, router = mx.array([[1, 2, 3]]), model.layers[0].router
        launches.clear()
        before = model(x)
        assert launches["route"] == 1
        for change in ("scale", "per_expert_scale", "proj"):
            if change == "proj":
                router.proj.weight = router.proj.weight[::-1]
            else:
                setattr(router, change, getattr(router, change)[::-1] * 1.5)
            got = model(x)
            assert not mx.allclose(got, before, atol=1e-3), change
            before = got
        unpatch_model(model)
        assert zoo.apart(np.array(got), np.array(model(x))) <= BOUND
        patch_model(model, fuse="all")
        launches.clear()
        router.config.top_k_experts = 1
        got = model(x)
        assert launches["route"] == 0
        unpatch_model(model)
        assert zoo.apart(np.array(got), np.array(model(x))) <= BOUND
