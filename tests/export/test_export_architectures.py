"""`export --mlx` of every architecture: what mlx-lm's class makes of it, or why it cannot."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest

from mlxfuse.errors import UnsupportedError
from mlxfuse.export.mlx_checkpoint import export_mlx
from mlxfuse.loader import load
from mlxfuse.models import ARCHITECTURES
from tests.models import tiny

# Within the window of 6 that mlx-lm's gemma2 leaves out; beyond it for all others.
IDS = mx.array([[(7 * i + i * i) % 250 for i in range(14)]])
SHORT = {"gemma2": 6}
# Weights that float16 holds, but for norms less 1 and gemma's factor, which mlx-lm rounds.
LIMIT = 4e-3

OWN = "as this file has it; "  # a class of ours, layers of several kinds, numbers of no tensor
ROTATES = "rotates positions of layer"
SCALING = "cannot be told its rotary scaling"
REFUSED = {
    **dict.fromkeys(("apertus", "ernie4_5-moe", "glm-dsa", "hunyuan-moe", "jamba"), OWN),
    **dict.fromkeys(("kimi-linear", "lfm2", "lfm2moe", "llama4", "mamba", "mamba2"), OWN),
    **dict.fromkeys(("minicpm", "granitehybrid", "nemotron_h", "nemotron_h_moe"), OWN),
    **dict.fromkeys(("qwen35", "qwen35moe", "qwen3next"), OWN),
    **dict.fromkeys(("deepseek32", "exaone4", "laguna", "mellum", "mistral4", "step35"), SCALING),
    "cohere2": ROTATES,
    "smollm3": ROTATES,
    "falcon-h1": "has model.layers.0.mamba.conv1d.weight as",
}
# In tests of their own, with scaled rotations and factors.
ELSEWHERE = {"gemma3", "gemma4", "gpt-oss", "llama", "phi3", "qwen2", "qwen3"}
# The first case of each, and others where it says something that is refused.
CASES = {case.arch: name for name, case in reversed(tiny.CASES.items())}
CASES |= {"deepseek2": "deepseek2-flash", "olmo2": "olmo2"}


def in_float16(name: str) -> tiny.Tiny:
    """A case's model, all of it F32 numbers that are float16's."""
    model = tiny.build(name, 0)
    for tensor in model.tensors:
        values = model.weights(tensor).astype(np.float16).astype(np.float32)
        model.tensors[tensor] = values, "F32"
    return model


@pytest.mark.parametrize("arch", sorted({*ARCHITECTURES} - ELSEWHERE))
def test_mlx_lm_runs_it_or_it_is_refused(arch: str, tmp_path: Path) -> None:
    path = tiny.write(tmp_path / "m.gguf", in_float16(CASES[arch]))
    target = tmp_path / "mlx"
    if arch in REFUSED:
        with pytest.raises(UnsupportedError, match=REFUSED[arch]):
            export_mlx(path, target)
        assert not target.exists()
        return
    export_mlx(path, target)
    ids = IDS[:, : SHORT.get(arch)]
    want = np.array(load(path, dtype=mx.float32, fuse="off")[0](ids))
    model, _ = mlx_lm.load(str(target))
    model.set_dtype(mx.float32)
    got = np.array(model(ids))
    assert np.abs(got - want).max() <= LIMIT * np.abs(want).max()
    assert np.abs(got[:, 1:] - want[:, :-1]).max() > 0.1 * np.abs(want).max()  # control


@pytest.mark.parametrize(
    ("name", "why"),
    [
        # Rotated by halves, where mlx-lm's class rotates pairs.
        ("glm4-sections", "its glm4 rotates positions of layer 0 in another way"),
        ("granite-without-rope", "its granite rotates positions of layer 0 in another way"),
        ("qwen2-without-biases", r"its qwen2 has model\.layers\.0\.self_attn\.k_proj\.bias as"),
    ],
)
def test_a_class_that_computes_something_else_is_refused(
    name: str, why: str, tmp_path: Path
) -> None:
    path = tiny.write(tmp_path / "m.gguf", tiny.build(name, 0))
    with pytest.raises(UnsupportedError, match=why):
        export_mlx(path, tmp_path / "mlx")
    assert not (tmp_path / "mlx").exists()
