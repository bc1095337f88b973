"""A file with the shapes of Qwen3.6-35B-A3B in Q4_K_M's types, nearly all of it a hole.

The header has what released files say. Nothing but a header is read to inspect it, to judge
whether it fits, and to plan it; then two layers of it run, of which the file has some data.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from math import prod
from pathlib import Path

import numpy as np
import pytest

from mlxfuse.formats import BY_NAME
from mlxfuse.gguf.reader import open_gguf
from tests.gguf import make
from tests.models import tiny
from tests.models.case import shapes
from tests.models.cases.qwen35 import layer

LAYERS, VOCABULARY, HIDDEN, FF, EXPERTS = 40, 248320, 2048, 512, 256
CASE = tiny.Case(
    "qwen35moe",
    only=layer,
    layers=LAYERS,
    hidden=HIDDEN,
    heads=16,
    kv_heads=2,
    head_dim=256,
    untied=True,
    experts=EXPERTS,
    used=8,
    expert_ffn=FF,
    shared_ffn=FF,
    keys={
        "full_attention_interval": 4,
        "ssm.conv_kernel": 4,
        "ssm.state_size": 128,
        "ssm.group_count": 16,
        "ssm.time_step_rank": 32,
        "ssm.inner_size": 4096,
    },
)
METADATA = {
    "general.architecture": "qwen35moe",
    "general.name": "Qwen3.6-35B-A3B",
    **{f"qwen35moe.{key}": value for key, value in CASE.keys.items()},
    "qwen35moe.block_count": LAYERS,
    "qwen35moe.context_length": 262144,
    "qwen35moe.embedding_length": HIDDEN,
    "qwen35moe.attention.head_count": 16,
    "qwen35moe.attention.head_count_kv": 2,
    "qwen35moe.attention.key_length": 256,
    "qwen35moe.attention.value_length": 256,
    "qwen35moe.attention.layer_norm_rms_epsilon": 1e-6,
    "qwen35moe.rope.dimension_count": 64,
    "qwen35moe.rope.dimension_sections": np.array([11, 11, 10, 0], np.int32),
    "qwen35moe.rope.freq_base": 1e7,
    "qwen35moe.expert_count": EXPERTS,
    "qwen35moe.expert_used_count": 8,
    "qwen35moe.expert_feed_forward_length": FF,
    "qwen35moe.expert_shared_feed_forward_length": FF,
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "qwen35",
    "tokenizer.ggml.merges": ["a b"],
    "tokenizer.ggml.eos_token_id": VOCABULARY - 1,
}
# What llama.cpp's quantize chooses, but that it takes Q6_K in half of the layers only.
TYPES = {"attn_qkv": "Q5_K", "attn_v": "Q6_K", "ffn_down_exps": "Q6_K", "ffn_down_shexp": "Q6_K"}
TYPES |= {"output": "Q6_K", "ssm_alpha": "Q8_0", "ssm_beta": "Q8_0"}
PARAMETERS = 34_660_610_688  # llama.cpp: 34.66 B


def kind(name: str, shape: tuple[int, ...]) -> str:
    short = name.removesuffix(".weight").split(".")[-1]
    plain = len(shape) == 1 or short in ("ffn_gate_inp", "ssm_conv1d")
    return "F32" if plain else TYPES.get(short, "Q4_K")


def tensors() -> Iterator[tuple[str, str, tuple[int, ...], int]]:
    """Name, type, shape and bytes."""
    for name, shape in shapes(CASE, VOCABULARY):
        form = BY_NAME[kind(name, shape)]
        yield name, form.name, shape, prod(shape) // form.block_size * form.type_size


def data(random: np.random.RandomState, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Bytes of about unit gain."""
    form, blocks = kind(name, shape), prod(shape) // 256
    if form == "F32":
        low, high = (-1.0, -0.1) if name.endswith("ssm_a") else (0.1, 1.0)
        if len(shape) > 1:
            low, high = -(shape[-1] ** -0.5), shape[-1] ** -0.5
        return random.uniform(low, high, shape).astype(np.float32)
    gain = shape[-1] ** -0.5
    if form == "Q8_0":
        packed = random.randint(0, 256, (blocks * 8, 34), dtype=np.uint8)
        packed[:, :2] = np.array([gain / 74], np.float16).view(np.uint8)
        return packed
    if form == "Q5_K":  # as Q4_K, with a fifth bit: codes average 15.5
        packed = random.randint(0, 256, (blocks, 176), dtype=np.uint8)
        packed[:, :4] = np.array([gain / 520, 15.5 * gain / 520], np.float16).view(np.uint8)
        return packed
    return tiny.blocks(random, form, shape)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file, with data for layers 2 and 3: all but their experts from the ninth on."""
    offset, placed = 0, []
    for name, form, shape, nbytes in tensors():
        placed.append(make.T(name, form, shape, data=b"", offset=offset))
        offset += nbytes + -nbytes % 32
    tokens = [*tiny.byte_tokens(), "ab", *(f"t{i}" for i in range(257, VOCABULARY))]
    metadata = METADATA | {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": np.ones(VOCABULARY, np.int32),
    }
    header = make.gguf(metadata, placed)
    path = tmp_path_factory.mktemp("large") / "Qwen3.6-35B-A3B-Q4_K_M.gguf"
    random = np.random.RandomState(0)
    with path.open("wb") as file:
        file.write(header)
        for tensor in placed:
            if isinstance(tensor.name, str) and tensor.name.startswith(("blk.2.", "blk.3.")):
                shape = (8, *tensor.shape[1:]) if "_exps." in tensor.name else tensor.shape
                assert tensor.offset is not None
                file.seek(len(header) + tensor.offset)
                file.write(data(random, tensor.name, shape).tobytes())
        file.truncate(len(header) + offset)
    return path


def run(code: str, path: Path) -> dict[str, object]:
    """What a new process prints as JSON, with the most memory it had, in bytes, as ``peak``."""
    measured = f"""
import json, resource, sys
from pathlib import Path
path = Path(sys.argv[1])
{code}
# Linux counts in ru_maxrss what the process had that started this one.
status = Path("/proc/self/status")
if status.exists():
    (line,) = [line for line in status.read_text().splitlines() if line.startswith("VmHWM")]
    peak = int(line.split()[1]) * 1024
else:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps({{**found, "peak": peak}}))
"""
    environment = {**os.environ, "MLXFUSE_KERNELS": "reference", "MLXFUSE_MEMORY": "64"}
    command = [sys.executable, "-c", measured, str(path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    result: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return result


def test_it_is_inspected_judged_and_planned_by_its_header(path: Path) -> None:
    sizes = {name: nbytes for name, _, _, nbytes in tensors()}
    on_disk = path.stat().st_blocks
    assert on_disk * 512 < path.stat().st_size // 100
    found = run(
        """
from mlxfuse.inspect.header import inspect
found = {"summary": inspect(path)}
assert "mlx" not in sys.modules
""",
        path,
    )
    summary = found["summary"]
    assert isinstance(summary, dict)
    assert summary["supported"] is True, summary["unsupported"]
    assert summary["parameters"] == PARAMETERS
    everything = sum(sizes.values())
    experts = sum(n for name, n in sizes.items() if "_exps." in name)
    embedding = sizes["token_embd.weight"]
    active = everything - experts * 248 // 256 - embedding + embedding // VOCABULARY
    # 10 layers of 2 heads of 256, k and v; 30 of 3 inputs of 8192 and 32 matrices of 128 x 128.
    state = 30 * (2 * 3 * 8192 + 4 * 32 * 128 * 128)
    cache = 262144 * 10 * 2 * 2 * 2 * 256 + state
    wanted = {"weights": everything, "cache": cache, "active": active}
    assert {name: summary["memory"][name] for name in wanted} == wanted
    assert 1.5e9 < active < 2.5e9 < 20e9 < everything < 25e9
    delta = summary["fusion"]["delta net input"]
    assert delta == [
        {
            "kind": "mixed",
            "types": ["Q5_K", "Q4_K", "Q8_0", "Q8_0"],
            "layers": [i for i in range(40) if (i + 1) % 4],
        }
    ]
    assert [k["layers"] for k in summary["fusion"]["q|k|v"]] == [list(range(3, 40, 4))]
    judged = run("from mlxfuse.bench.doctor import diagnose; found = diagnose(path, 4096)", path)
    model = judged["model"]
    assert isinstance(model, dict)
    assert model["active"] == active
    for peak in (found["peak"], judged["peak"]):
        assert isinstance(peak, int)
        assert peak < 250e6, peak  # the experts of one layer have 500 MB
    assert path.stat().st_blocks == on_disk


def test_a_layer_of_each_kind_runs(path: Path) -> None:
    """From the mapped file, row by row, and as kernels have it, fused: the same within rounding."""
    with open_gguf(path) as file:
        shapes = {name: tensor.shape for name, tensor in file.tensors.items()}
    assert shapes["blk.2.ffn_gate_exps.weight"] == (256, 512, 2048)
    found = run(
        """
import mlx.core as mx
import numpy as np
from dataclasses import replace
from mlx_lm.models.cache import make_prompt_cache
from mlxfuse.fusion import patch_model
from mlxfuse.gguf.reader import open_gguf
from mlxfuse.models import build as module
from mlxfuse.models.config import read_config
from mlxfuse.models.plan import plan

# Only one layer's weights are made; the others stay what is not evaluated of mlx-lm's.
module._check_parameters = lambda model, weights: None
x = mx.random.normal((1, 4, 2048), key=mx.random.key(0))
found = {}
with open_gguf(path) as file:
    weights = plan(file, read_config(file))
    for i in 2, 3:
        one = replace(weights, outer=(), layers=weights.layers[i : i + 1])
        results = []
        for options in {"budget": 0}, {"quantized": True}:
            model = module.build(file, one, mx.float32, **options)
            cache, layer = make_prompt_cache(model)[i], model.layers[i]
            if "quantized" in options:
                # A model of this layer alone: others' weights do not exist.
                model.model.layers = [layer]
                report = patch_model(layer, fuse="all")
                found[f"fused {i}"] = {n: len(t.fused) for n, t in report.tallies.items()}
            masks = [None, None] if i == 2 else ["causal", None]
            rows = [layer(x[:, :3], masks[0], cache), layer(x[:, 3:], masks[1], cache)]
            results.append(np.array(mx.concatenate(rows, axis=1)))
            del model, layer, cache, rows
        added = results[0] - np.array(x)
        found[f"apart {i}"] = float(np.abs(results[1] - results[0]).max())
        found[f"added {i}"] = float(added.std())
""",
        path,
    )
    assert found["fused 2"] == {
        **{"gate_up": 1, "experts": 1, "experts_sum": 1},
        **{"in_proj": 1, "recurrence": 1, "residual": 1},
    }
    assert found["fused 3"] == {
        **{"qkv": 1, "gate_up": 1, "experts": 1, "experts_sum": 1},
        **{"norm_rope": 1, "residual": 1},
    }
    for i in (2, 3):
        apart, added, peak = found[f"apart {i}"], found[f"added {i}"], found["peak"]
        assert isinstance(added, float)
        assert isinstance(apart, float)
        assert isinstance(peak, int)
        assert added > 0.1
        assert apart < 1e-4 * added
        assert peak < 2.5e9, peak  # one layer's experts, as the file has them and as kernels do
