"""Which models would need gate and up of a prompt in float32 where they run in bfloat16: none."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlxfuse.kernels.matmul import quantized_matmul as module
from mlxfuse.kernels.matmul.dequantize import dequantize
from mlxfuse.kernels.matmul.product import Call
from mlxfuse.kernels.weight import AnySegment
from mlxfuse.loader import load
from mlxfuse.models.architectures import ARCHITECTURES
from tests.models import tiny
from tests.models.cases import CASES

# One case of each architecture that Metal runs in bfloat16. A router that decides otherwise after a
# rounding error moves logits by far more than that error, in either way of computing.
FAMILIES = {
    case.arch: name
    for name, case in reversed(CASES.items())
    if ARCHITECTURES[case.arch].metal_dtype == "bfloat16" and not case.experts
}
FAST = ("gemma2", "gemma4", "qwen2", "phi2")


@pytest.mark.parametrize(
    "arch", [pytest.param(a, marks=[pytest.mark.slow] * (a not in FAST)) for a in sorted(FAMILIES)]
)
def test_gate_and_up_of_a_prompt_need_no_float32(
    arch: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits as far from the exact ones with products in bfloat16 as with them in float32."""
    name = FAMILIES[arch]
    path = tiny.write(tmp_path / "m.gguf", tiny.build(name, 1))
    tokens = mx.array(np.random.default_rng(0).integers(0, 250, (4, 24)))
    # As more rows would be multiplied.
    monkeypatch.setattr(
        module,
        "tuned",
        lambda call: replace(call, variant="dequantize") if call.kind == "prompt" else call,
    )
    model, _ = load(path, dtype=mx.bfloat16, fuse="all")

    def logits(dtype: mx.Dtype) -> np.ndarray:
        used = model if dtype == mx.bfloat16 else load(path, dtype=dtype, fuse="all")[0]
        found = np.array(used(tokens).astype(mx.float32), np.float64)
        return found - found.mean(-1, keepdims=True)

    exact, narrow = logits(mx.float32), logits(mx.bfloat16)

    dense, product, activated = module._dense, module._product, [False]

    def noted(call: Call[mx.array], **options: bool) -> list[mx.array]:
        activated.append(call.epilogue.activation is not None)
        return dense(call, **options)

    def widened(x: mx.array, segment: AnySegment) -> mx.array:
        return (
            x.astype(mx.float32) @ dequantize(segment).T if activated[-1] else product(x, segment)
        )

    monkeypatch.setattr(module, "_dense", noted)
    monkeypatch.setattr(module, "_product", widened)
    wide = logits(mx.bfloat16)

    def error(found: np.ndarray) -> float:
        return float(np.sqrt(np.sum((found - exact) ** 2) / np.sum(exact**2)))

    # Some models' activations are not fused with a product.
    assert np.array_equal(narrow, wide) is not any(activated)
    assert any(activated) or arch not in FAST
    assert 1e-3 < error(narrow) <= 1.2 * error(wide)
