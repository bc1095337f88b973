"""Files that mix fourteen types: each matrix in its own bits, each group in one dispatch."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_reduce
from mlx_lm.models.cache import make_prompt_cache

from mlxfuse.gguf.reader import open_gguf
from mlxfuse.kernels.runtime import kernel as _kernel
from mlxfuse.loader import load
from tests import msl
from tests.models import tiny
from tests.models.test_golden import BOUND, disagreement, model_of

CASES = ("llama-ud", "qwen3moe-ud")


def test_there_are_fourteen_types() -> None:
    kinds = {kind for _, kind in tiny.build("llama-ud", 0).tensors.values()}
    assert len(kinds) >= 14
    assert {"IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"} < kinds


@pytest.mark.parametrize("name", CASES)
def test_every_matrix_has_the_files_bytes(name: str, tmp_path: Path) -> None:
    path = tiny.write(tmp_path / "m.gguf", tiny.build(name, 0))
    with open_gguf(path) as file:
        stored = sum(t.nbytes for t in file.tensors.values())
    model, _ = load(path, dtype=mx.float32, fuse="all")
    held = tree_reduce(lambda n, a: n + a.nbytes if isinstance(a, mx.array) else n, model, 0)
    assert stored <= held <= 1.001 * stored
    report = model.load_report
    assert report.dequantized == {}
    assert str(report.patch).startswith("qkv 3/3 (3 mixed: ")
    kind = "experts" if "moe" in name else "gate/up"
    assert f"{kind} 3/3" in str(report.patch)


@pytest.mark.parametrize("name", CASES)
def test_kernels_give_llama_cpps_logits(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two tokens, one by one; q, k and v of three types are one dispatch, so are gate and up."""
    monkeypatch.setenv("MLXFUSE_KERNELS", "emulated")
    tokens, want = model_of(name, 0)
    path = tiny.write(tmp_path / "m.gguf", tokens)
    with msl.installed(build="fast", orders=()):
        model, _ = load(path, dtype=mx.float32, fuse="all", context_length=256)
        state = make_prompt_cache(model)
        fallbacks, rows = _kernel.fallbacks.total(), []
        for i in range(2):
            before = _kernel.launches["quantized_matmul"]
            rows.append(model(mx.array(tokens.prompt[None, i : i + 1]), cache=state)[0])
            mx.eval(rows)
            # qkv, o, gate and up, down of each layer; the head.
            assert _kernel.launches["quantized_matmul"] - before == 4 * 3 + 1
    assert _kernel.fallbacks.total() == fallbacks
    nmse, kld = disagreement(np.array(mx.concatenate(rows)), want[:2])
    assert nmse <= BOUND
    assert kld <= BOUND


@pytest.mark.parametrize("name", ["llama-scales", "qwen3moe-scales"])
def test_scales_beside_tensors_are_multiplied_by(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the kernels, of which q, k and v stay one dispatch; see `test_golden` for llama.cpp."""
    model = tiny.build(name, 0)
    path = tiny.write(tmp_path / "m.gguf", model)
    plain, _ = load(path, dtype=mx.float32, fuse="off")
    ids = mx.array(model.prompt[None, :1])
    want = np.array(plain(ids))
    monkeypatch.setenv("MLXFUSE_KERNELS", "emulated")
    with msl.installed(build="fast", orders=()):
        fused, _ = load(path, dtype=mx.float32, fuse="all")
        before = _kernel.launches["quantized_matmul"]
        got = np.array(fused(ids))
        layers = model.case.layers
        assert _kernel.launches["quantized_matmul"] - before == 4 * layers + 1
    assert np.abs(got - want).max() <= 1e-5 * np.abs(want).max()
    for tensor in [n for n in model.tensors if n.endswith(".scale")]:  # the control
        del model.tensors[tensor]
    other, _ = load(tiny.write(tmp_path / "other.gguf", model), dtype=mx.float32, fuse="off")
    assert np.abs(np.array(other(ids)) - want).max() > 1e-2 * np.abs(want).max()
