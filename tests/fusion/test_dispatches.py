"""Dispatches of one decoded token, counted in the graph."""

from collections import Counter
from pathlib import Path

import mlx.core as mx
import pytest
from mlx_lm.models import llama, qwen3

from mlxfuse.fusion import patch_model, unpatch_model
from mlxfuse.fusion.dispatches import dispatches, per_token
from mlxfuse.loader import load
from tests import dispatches as command
from tests.dispatches import of_layer, stock
from tests.models import tiny

MATMUL = "quantized_matmul"
LAYER = {
    "rms_norm": 2,
    MATMUL: 4,
    "norm_rope": 1,
    "SliceUpdate": 2,
    "scaled_dot_product_attention": 1,
}


@pytest.mark.parametrize("name", ["llama-q4", "llama", "qwen2", "qwen3", "phi3"])
def test_a_layer_of_a_gguf_file_takes_ten(name: str, tmp_path: Path) -> None:
    path = tiny.write(tmp_path / "m.gguf", tiny.build(name, 0))
    model, _ = load(path, fuse="all")
    assert of_layer(model) == LAYER


@pytest.mark.parametrize("module", [llama, qwen3])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_layer_of_mlx_lm_takes_ten(module: object, bits: int) -> None:
    model = stock(module, bits)
    before = of_layer(model)
    assert before["QuantizedMatmul"] == 7
    assert before.total() == (19 if module is qwen3 else 17)
    report = patch_model(model, fuse="all")
    assert of_layer(model) == LAYER
    saved = before.total() - 10
    assert report.dispatches == per_token(model)
    assert report.dispatches[0] - report.dispatches[1] >= saved


def test_what_it_takes_unfused(tmp_path: Path) -> None:
    """Control: every fusion that is missing is counted."""
    path = tiny.write(tmp_path / "m.gguf", tiny.build("llama-q4", 0))
    model, _ = load(path, fuse="qkv,gate_up")
    found = of_layer(model)
    assert found[MATMUL] == 4
    assert (found["Add"], found["rope"]) == (2, 2)
    unpatch_model(model)
    unfused = of_layer(model)
    assert unfused[MATMUL] == 7
    dense = of_layer(load(path)[0])
    assert dense["Matmul"] == 7
    # A compiled group is one.
    assert unfused["Compiled"] == dense["Compiled"] == 1
    assert unfused.total() == dense.total() == 17


@pytest.mark.parametrize("name", ["gemma2", "gemma3"])
def test_gemmas_norms_keep_the_additions_apart(name: str, tmp_path: Path) -> None:
    path = tiny.write(tmp_path / "m.gguf", tiny.build(name, 0))
    model, _ = load(path, fuse="all")
    found = of_layer(model)
    assert found[MATMUL] == 4
    unpatch_model(model)
    unfused = of_layer(model)
    assert unfused[MATMUL] == 7
    # The activation and the rotations are in kernels; everything else is as it was.
    assert found.total() < unfused.total() - 4


def test_what_is_counted() -> None:
    x = mx.ones((1, 1, 8))
    mx.eval(x)
    assert dispatches(lambda: (x + 1).reshape(8) * 2) == {"Add": 1, "Multiply": 1}
    compiled = mx.compile(lambda x: (x + 1) * 2)
    assert dispatches(lambda: compiled(x)) == {"Compiled": 1}
    assert dispatches(lambda: mx.fast.rms_norm(x, None, 1e-5)) == {"rms_norm": 1}
    assert dispatches(lambda: mx.fast.rms_norm(x, None, 1e-5) @ mx.eye(8))["Matmul"] == 1
    with pytest.raises(ValueError, match="what it launches used"):
        dispatches(lambda: (mx.fast.rms_norm(x, None, 1e-5), x)[1])
    # Nothing is left behind.
    assert mx.fast.rms_norm(x, None, 1e-5).tolist()[0][0][0] == pytest.approx(1, abs=1e-4)


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    command.main()
    rows = [line.split("|")[1:3] for line in capsys.readouterr().out.splitlines()[2:]]
    found = Counter({name.strip(): int(count) for name, count in rows})
    assert found == {"llama": 17, "llama, patched": 10, "qwen3": 19, "qwen3, patched": 10}
