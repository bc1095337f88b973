"""Dispatches of one decoded token, counted in the graph."""

from collections import Counter
from pathlib import Path

import pytest

from mlxfuse.fusion import unpatch_model
from mlxfuse.loader import load
from tests.dispatches import of_layer
from tests.models import tiny

MATMUL = "quantized_matmul"
# Everything that is neither a multiplication nor next to one.
ELSEWHERE = {"rms_norm", "rope", "scaled_dot_product_attention", "SliceUpdate"}


def linear_part(found: Counter[str]) -> Counter[str]:
    return Counter({name: n for name, n in found.items() if name not in ELSEWHERE})


@pytest.mark.parametrize("name", ["llama-q4", "llama", "qwen2", "qwen3", "phi3"])
def test_the_linear_part_of_a_layer_takes_four(name: str, tmp_path: Path) -> None:
    path = tiny.write(tmp_path / "m.gguf", tiny.build(name, 0))
    model, _ = load(path, fuse="all")
    found = of_layer(model)
    assert linear_part(found) == {MATMUL: 4}
    assert found - linear_part(found) == {
        "rms_norm": 4 if name == "qwen3" else 2,
        "rope": 2,
        "scaled_dot_product_attention": 1,
        # The cache, and longrope's factor on the rotated part of q and k.
        "SliceUpdate": 4 if name == "phi3" else 2,
    }


def test_what_it_takes_unfused(tmp_path: Path) -> None:
    """Control: every fusion that is missing is counted."""
    path = tiny.write(tmp_path / "m.gguf", tiny.build("llama-q4", 0))
    model, _ = load(path, fuse=["qkv", "gate_up"])
    assert linear_part(of_layer(model)) == {MATMUL: 4, "Add": 2}
    unpatch_model(model)
    unfused = linear_part(of_layer(model))
    assert unfused[MATMUL] == 7
    assert unfused.total() - 7 >= 3
    stock = linear_part(of_layer(load(path)[0]))
    assert stock["Matmul"] == 7
    assert stock.total() == unfused.total()


@pytest.mark.parametrize("name", ["gemma2", "gemma3"])
def test_gemmas_norms_keep_the_additions_apart(name: str, tmp_path: Path) -> None:
    path = tiny.write(tmp_path / "m.gguf", tiny.build(name, 0))
    model, _ = load(path, fuse="all")
    found = of_layer(model)
    assert found[MATMUL] == 4
    unpatch_model(model)
    unfused = of_layer(model)
    assert unfused[MATMUL] == 7
    # The activation is in the kernel; everything else is as it was.
    assert found.total() < unfused.total() - 3
