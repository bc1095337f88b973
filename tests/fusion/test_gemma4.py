"""Gemma 4's variants: keys that are values too, keys and values of earlier layers, experts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mlxfuse.fusion import patch_model, unpatch_model
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
    experts = {"experts": 3 * (form == "affine4")} if name == "a4b" else {}
    assert {n: k for n, k in found.items() if n != "residual"} == {
        **EXPECTED[name],
        **experts,
        **quantised,
    }
    skipped = {(n, reason) for n, _, reason in report.skipped}
    residual = ("residual", "gemma4_text.DecoderLayer.__call__ is not a body that is known")
    dense = ("experts", "its experts are SwitchLinear") if name == "a4b" and not quantised else ()
    assert skipped == {residual, *filter(None, [dense])}
    assert zoo.apart(zoo.logits(model), want) <= BOUND
    unpatch_model(model)
    assert modules(model) == as_built
    assert contents(model) == before
    assert np.array_equal(zoo.logits(model), want)
