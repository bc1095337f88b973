"""Models with experts: their blocks as the file has them, and what a loader could get wrong.

`test_golden` holds the dense models against llama.cpp; here it is the quantised ones.
"""

from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache

from mlxfuse.export.streams import export
from mlxfuse.gguf.exported import open_model
from mlxfuse.gguf.reader import open_gguf
from mlxfuse.inspect.header import inspect
from mlxfuse.inspect.needs import needs
from mlxfuse.kernels.runtime import backend as _backend
from mlxfuse.kernels.runtime import kernel as _kernel
from mlxfuse.kernels.runtime import self_test
from mlxfuse.loader import load
from mlxfuse.models.build import build
from mlxfuse.models.config import read_config
from mlxfuse.models.plan import plan, stored_rows
from mlxfuse.nn import experts
from mlxfuse.nn.cpu import StreamedSwitchLinear, SwitchLinear
from mlxfuse.nn.experts import QuantizedSwitchLinear
from tests import msl
from tests.kernels.compiled import Compiled
from tests.models import tiny
from tests.models.test_golden import BOUND, CONTROL, SCHEDULES, disagreement, model_of

# The others have a format for each seed, and their experts are those of `test_golden`.
CASES = [name for name, case in tiny.CASES.items() if case.experts and "" in case.formats]
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def quantised(path: Path) -> nn.Module:
    """Unfused, but with the layers that a fused model has."""
    return load(path, fuse="residual")[0]


def logits(model: nn.Module, prompts: np.ndarray, schedule: list[int]) -> np.ndarray:
    """prompts [B, L] -> float32 [B, L, vocabulary], so many tokens a call."""
    rows, start, state = [], 0, make_prompt_cache(model)
    for count in schedule:
        rows.append(model(mx.array(prompts[:, start : start + count]), cache=state))
        mx.eval(rows[-1])
        start += count
    return np.array(mx.concatenate(rows, axis=1))


def switch_of(layer: nn.Module) -> nn.Module:
    """The layer's SwitchGLU."""
    if "switch_glu" in layer.get("experts", {}):
        return layer.experts.switch_glu
    return layer.mlp.experts if "experts" in layer.mlp else layer.mlp.switch_mlp


def fused(model: tiny.Tiny, order: tuple[str, str] = ("gate", "up")) -> tiny.Tiny:
    """Gate and up of every expert in one tensor, as llama.cpp's converters can store them."""
    for layer in range(model.case.layers):
        parts = {n: model.tensors.pop(f"blk.{layer}.ffn_{n}_exps.weight") for n in order}
        kind = parts["gate"][1]
        data = np.concatenate([parts[n][0] for n in order], axis=1)
        model.tensors[f"blk.{layer}.ffn_gate_up_exps.weight"] = data, kind
    return model


@pytest.mark.parametrize("seed", tiny.SEEDS)
@pytest.mark.parametrize("name", CASES)
def test_quantised_experts_match_llama_cpp(name: str, seed: int, tmp_path: Path) -> None:
    """In one call, step by step, and beside another prompt."""
    made, want = model_of(name, seed)
    model = quantised(tiny.write(tmp_path / "m.gguf", made))
    kinds = {type(switch_of(model.layers[0])[p]) for p in PROJECTIONS}
    assert kinds == {QuantizedSwitchLinear}
    both = np.stack([made.prompt, made.prompt[::-1]])
    for schedule, prompts in (("whole", both), ("steps", both[:1]), ("chunks", both)):
        got = logits(model, prompts, SCHEDULES[schedule])
        assert max(disagreement(got[0], want)) <= BOUND, schedule
    alone = logits(model, both[1:], [24])
    assert max(disagreement(got[1], alone[0])) <= BOUND


@pytest.mark.parametrize(
    ("name", "fused", "dispatches"),
    # In a layer: q with k and v, o, gate with up, down; and the head.
    [("gpt-oss", "experts 4/4", 4 * 4 + 1), ("qwen3moe", "experts 3/3", 4 * 3 + 1)],
)
def test_the_kernels_match_llama_cpp(
    name: str, fused: str, dispatches: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A whole model by the Metal source: tiles of experts' rows, then row by row."""
    monkeypatch.setenv("MLXFUSE_KERNELS", "emulated")
    made, want = model_of(name, tiny.SEEDS[0])
    with msl.installed(build="fast"):
        model, _ = load(tiny.write(tmp_path / "m.gguf", made))
        assert fused in str(model.load_report.patch)
        _kernel.fallbacks.clear()
        for schedule in ([24], [20, 1, 1, 1, 1]):
            got = logits(model, made.prompt[None], schedule)
            assert max(disagreement(got[0], want)) <= BOUND, schedule
        _kernel.launches.clear()
        logits(model, made.prompt[None], [1] * 3)
        assert _kernel.launches["quantized_matmul"] == 3 * dispatches
    assert not _kernel.fallbacks


@pytest.mark.parametrize("dense", [False, True])
def test_weights_of_the_chosen_experts_add_up_to_one_in_qwen3moe(
    dense: bool, tmp_path: Path
) -> None:
    """Control: what mlx-lm does without ``norm_topk_prob`` is noticed."""
    made, want = model_of("qwen3moe", tiny.SEEDS[0])
    path = tiny.write(tmp_path / "m.gguf", made)
    model = load(path)[0] if dense else quantised(path)
    for layer in model.layers:
        layer.mlp.norm_topk_prob = False
    assert min(disagreement(logits(model, made.prompt[None], [24])[0], want)) > CONTROL


@pytest.mark.parametrize("dense", [False, True])
def test_gpt_oss_clips_gate_and_up(dense: bool, tmp_path: Path) -> None:
    """Control: an activation that does not is noticed."""
    made, want = model_of("gpt-oss", tiny.SEEDS[0])
    path = tiny.write(tmp_path / "m.gguf", made)
    model = load(path)[0] if dense else quantised(path)
    for layer in model.layers:
        layer.mlp.experts.activation._limit = 1e4
    assert min(disagreement(logits(model, made.prompt[None], [24])[0], want)) > CONTROL


@pytest.mark.parametrize("name", ["qwen3moe", "qwen2moe"])
def test_gate_and_up_stored_as_one_give_the_same_bits(name: str, tmp_path: Path) -> None:
    path = tiny.write(tmp_path / "m.gguf", tiny.build(name, 0))
    together = tiny.write(tmp_path / "one.gguf", fused(tiny.build(name, 0)))
    wrong = tiny.write(tmp_path / "two.gguf", fused(tiny.build(name, 0), ("up", "gate")))
    prompt = tiny.build(name, 0).prompt[None]
    for get in (quantised, lambda p: load(p)[0]):
        want, got, other = (logits(get(p), prompt, [24]) for p in (path, together, wrong))
        assert np.array_equal(got, want)
        assert min(disagreement(other, want)) > CONTROL
    with open_gguf(together) as file:
        streamed = build(file, plan(file, read_config(file)), mx.float32, budget=0)
        assert np.array_equal(logits(streamed, prompt, [24]), got)
    export(together, tmp_path / "out")
    got, want = (logits(quantised(p), prompt, [24]) for p in (tmp_path / "out", together))
    assert np.array_equal(got, want)
    with open_gguf(together) as file, open_model(tmp_path / "out") as exported:
        exported.arrange(stored_rows(plan(exported, read_config(exported))))
        tensor = "blk.1.ffn_gate_up_exps.weight"
        for rows in (slice(None), slice(40, 140), slice(3, 4)):  # 64 of each expert
            wanted = file.read(file.tensors[tensor], rows)
            assert np.array_equal(exported.read(exported.tensors[tensor], rows), wanted)


@pytest.mark.parametrize("name", ["qwen3moe", "qwen3moe-k-quants"])
def test_gate_and_up_lie_side_by_side(name: str, tmp_path: Path) -> None:
    """One weight for each pair, in one segment where they have one format, and no byte twice."""
    path = tiny.write(tmp_path / "m.gguf", tiny.build(name, 0))
    case = tiny.CASES[name]
    switch = quantised(path).layers[1].mlp.switch_mlp
    gate, up = switch.gate_proj, switch.up_proj
    whole = gate.place.whole
    assert whole is up.place.whole
    assert (gate.place.first, up.place.first) == (0, 1)
    same = name == "qwen3moe"
    assert [(p.segment.name, p.first, p.rows) for p in whole.parts] == [
        ("Q4_0" if same else "Q4_K", 0, case.expert_ffn),
        ("Q4_0" if same else "Q6_K", case.expert_ffn if same else 0, case.expert_ffn),
    ]
    assert whole.experts == case.experts
    with open_gguf(path) as file:
        for projection, layer in (("gate", gate), ("up", up), ("down", switch.down_proj)):
            counted = sum(a.nbytes for streams in layer._streams for a in streams.values())
            assert counted == file.tensors[f"blk.1.ffn_{projection}_exps.weight"].nbytes
    assert whole.nbytes == sum(
        a.nbytes for layer in (gate, up) for s in layer._streams for a in s.values()
    )


def test_only_the_chosen_experts_are_dequantised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each once in a call, by the reference path and by what is too large to be dense."""
    path = tiny.write(tmp_path / "m.gguf", tiny.build("qwen3moe", 0))
    x = mx.array(np.random.RandomState(0).standard_normal((5, 1, 64)).astype(np.float32))
    ids = mx.array([4, 1, 1, 4, 1])
    up = quantised(path).layers[0].mlp.switch_mlp.up_proj
    real, seen = experts.dequantize, []
    monkeypatch.setattr(experts, "dequantize", lambda s: seen.append(s.rows) or real(s))
    got = np.array(up(x, ids))
    assert seen == [32, 32]
    with open_gguf(path) as file:
        model = build(file, plan(file, read_config(file)), mx.float32, budget=0)
        streamed = model.layers[0].mlp.switch_mlp.up_proj
        assert isinstance(streamed, StreamedSwitchLinear)
        real_rows, asked = streamed._rows, []
        streamed._rows = lambda a, b: asked.append((a, b)) or real_rows(a, b)
        again = np.array(streamed(x, ids))
    assert asked == [(32, 64), (128, 160)]
    dense = load(path)[0].layers[0].mlp.switch_mlp.up_proj
    assert isinstance(dense, SwitchLinear)
    want = np.array(x) @ np.array(dense.weight)[np.array(ids)].swapaxes(1, 2)
    for y in (got, again, np.array(dense(x, ids))):
        np.testing.assert_allclose(y, want, rtol=0, atol=1e-5)
    # Without values, as in a trace, it is MLX's own gather.
    traced = mx.compile(lambda x, ids: (dense(x, ids), up(x, ids)))(x, ids)
    for y in traced:
        np.testing.assert_allclose(np.array(y), want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["qwen2moe", "gpt-oss"])
def test_a_model_that_does_not_fit_is_dequantised_at_every_call(name: str, tmp_path: Path) -> None:
    made, want = model_of(name, tiny.SEEDS[0])
    with open_gguf(tiny.write(tmp_path / "m.gguf", made)) as file:
        model = build(file, plan(file, read_config(file)), mx.float32, budget=0)
        assert max(disagreement(logits(model, made.prompt[None], [20, 4])[0], want)) <= BOUND


@pytest.mark.parametrize("name", ["qwen2moe", "gpt-oss"])
def test_active_bytes_are_those_of_the_chosen_experts(name: str, tmp_path: Path) -> None:
    made = tiny.build(name, 0)
    with open_gguf(tiny.write(tmp_path / "m.gguf", made)) as file:
        found = needs(file)
    size = {name: data.nbytes for name, (data, _) in made.tensors.items()}
    idle = sum(n for name, n in size.items() if "_exps." in name) // 2  # 3 of 6
    rows = size["token_embd.weight"]
    assert found.weights == sum(size.values())
    assert found.weights - found.active == idle + rows - rows // tiny.VOCABULARY


def test_inspect_tells_which_experts_go_together(tmp_path: Path) -> None:
    path = tiny.write(tmp_path / "m.gguf", tiny.build("qwen2moe", 0))
    found = inspect(path)
    assert found["supported"] is True
    alike = [{"kind": "equal", "types": ["Q8_0"] * 2, "layers": [0, 1, 2]}]
    assert found["fusion"]["experts gate|up"] == found["fusion"]["shared gate|up"] == alike
    together = tiny.write(tmp_path / "one.gguf", fused(tiny.build("qwen3moe", 0)))
    one = [{"kind": "stored as one", "types": ["Q4_0"], "layers": [0, 1, 2]}]
    assert inspect(together)["fusion"]["experts gate|up"] == one


def test_both_ways_to_multiply_by_experts_are_self_tested(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """gpt-oss has MXFP4 in its experts only: their kernels are tried before they are used."""
    made = tiny.build("gpt-oss", 0)
    # So that the lengths of other models' self-tests are not enough.
    made.metadata["gpt-oss.expert_used_count"] = 1
    path = tiny.write(tmp_path / "m.gguf", made)
    seen, tiles = set(), set()

    def note(recorded: list[self_test.Recorded]) -> dict[str, str]:
        for kernel, arguments in recorded:
            launch = kernel.launch(*arguments)
            gathered = "experts" in launch.program.inputs or "row_ends" in launch.program.inputs
            seen.add((kernel.name, "MXFP4" in launch.program.body, gathered))
            if kernel.name == "quantized_matmul":
                tiles.add(launch.program.body.partition("_tile<")[0].rpartition("\n")[2])
        return {}

    monkeypatch.setattr(self_test, "check", note)
    monkeypatch.setattr(_backend, "trials", [])
    monkeypatch.setattr(self_test, "trials", _backend.trials)
    monkeypatch.setattr(mx.fast, "metal_kernel", Compiled())
    monkeypatch.setattr(_backend, "_no_device", lambda: None)
    model, _ = load(path, dtype=mx.float16)
    assert ("quantized_matmul", True, True) in seen
    assert ("quantized_matmul", True, False) not in seen
    assert tiles >= {"gathered", "summed"}
    assert "grouped" not in tiles
    # A prompt's, before it is used.
    model(mx.zeros((1, 70), mx.int32))
    assert "grouped" in tiles
