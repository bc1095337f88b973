"""What is compiled and tried when: little before the first token, the rest on its first use."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.generate import generate_step

from mlxfuse.kernels import fallbacks, launches
from mlxfuse.kernels.runtime import backend as _backend
from mlxfuse.kernels.runtime import kernel as _kernel
from mlxfuse.kernels.runtime import self_test
from mlxfuse.loader import load
from tests import msl
from tests.kernels.compiled import Compiled
from tests.models import tiny
from tests.models.case import Case

# As llama-quantize's Q4_K_M: more bits for the values and the down projections of half the layers.
MORE = {f"blk.{layer}.{name}": "Q6_K" for layer in (0, 3) for name in ("attn_v", "ffn_down")}
Q4_K_M = Case(
    "llama", layers=4, hidden=256, head_dim=32, heads=8, ffn=256, untied=True,
    formats={"": "Q4_K", "output": "Q6_K", **MORE},
)  # fmt: skip


@pytest.fixture
def compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Compiled]:
    """A machine that seems to have Metal, and nothing tried yet."""
    found = Compiled()
    monkeypatch.setenv("MLXFUSE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(_backend, "_no_device", lambda: None)
    monkeypatch.setattr(mx.fast, "metal_kernel", found)
    yield found
    for each in (_kernel.disabled, _backend.trials, self_test._tried):
        each.clear()


def test_a_q4_k_m_llama_needs_few_programs_before_its_first_token(
    compiled: Compiled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []

    def compare(kernel: Any, arguments: Any, *, emulated: bool) -> str:
        launch = kernel.launch(*arguments)
        _kernel.run(launch)
        tried.append((launch.program, launch.template, tuple(a.size < 8 for a in launch.arrays)))
        return ""

    monkeypatch.setattr(self_test, "compare", compare)
    path = tiny.write(tmp_path / "m.gguf", tiny.build("Q4_K_M", 0, Q4_K_M))
    model, _ = load(path, dtype=mx.float16, fuse="all")
    assert model.load_report.patch.disabled == {}
    loaded = len(compiled.programs)
    assert not any("batch_tile" in text[1] for text, *_ in compiled.programs)  # three at most
    launches.clear()
    ((token, _),) = generate_step(mx.arange(40), model, max_tokens=1)
    assert launches["quantized_matmul"] >= 2 * 4 * 4  # it is this model that ran, fused
    assert 0 <= token < tiny.VOCABULARY
    used = len(compiled.programs)
    # 7 products of a row, 6 of a prompt, 2 of looked up rows, and what is between the products.
    assert loaded < used == len(tried) <= 20
    # Each was tried before it ran, and none twice; a second model tries nothing.
    assert len(set(tried)) == len(tried)
    assert {(p.body, *t) for p, *t in tried} == {(x[1], *t) for x, *t in compiled.programs}
    again, _ = load(path, dtype=mx.float16, fuse="all")
    again(mx.arange(39)[None])
    assert len(compiled.programs) == used
    # A batch of four sequences is what is tried next.
    again(mx.arange(4)[:, None])
    more = [p for p, *_ in tried[used:]]
    assert len(more) == len({p.body for p in more})
    assert any("batch_tile" in p.body for p in more)


@pytest.mark.parametrize("right", [True, False])
def test_a_program_is_tried_while_a_graph_is_traced(
    right: bool, compiled: Compiled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kept graphs of few rows are where batches are first used; their values are looked at."""
    tried: list[str] = []
    real = self_test.compare

    def compare(kernel: Any, arguments: Any, *, emulated: bool) -> str:
        if kernel.name != "quantized_matmul":
            return ""
        found = real(kernel, arguments, emulated=True)
        tried.append(found)
        return found if right else "planted"

    path = tiny.write(tmp_path / "m.gguf", tiny.build("llama", 0))
    monkeypatch.setattr(self_test, "compare", lambda *_, **__: "")
    model, _ = load(path, fuse="all")
    with msl.installed(build="fast"):
        _kernel._compiled.cache_clear()
        monkeypatch.setattr(self_test, "compare", compare)
        fallbacks.clear()
        if right:
            model(mx.zeros((1, 4), mx.int32))
        else:
            with pytest.warns(RuntimeWarning, match="failed its self-test .* planted"):
                model(mx.zeros((1, 4), mx.int32))
    assert tried == [""] * 4  # qkv, gate and up, o and down, the head
    assert bool(fallbacks) is not right
