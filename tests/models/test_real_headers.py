"""Files with the shapes of released models, nearly all of them a hole.

The numbers of parameters are the published ones, which tells that the shapes are. They are
inspected and planned by their headers alone, which have no vocabulary, as reading one takes longer
than all the rest. Then one layer of each kind runs, with weights of 0, which add nothing to what
comes in; of experts only those are read that a token uses.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models import qwen3
from mlx_lm.models.cache import make_prompt_cache

from mlxfuse.formats import BY_NAME
from mlxfuse.gguf.reader import GGUFFile, open_gguf
from mlxfuse.inspect.header import inspect, render
from mlxfuse.inspect.needs import needs
from mlxfuse.models import build as building
from mlxfuse.models.config import read_config
from mlxfuse.models.part import parent_of
from mlxfuse.models.plan import Plan, plan
from tests.gguf import make
from tests.models import tiny
from tests.models.case import QKV, Case, shapes
from tests.models.cases import qwen35


def case(arch: str, layers: int, hidden: int, heads: tuple[int, int, int], **said: Any) -> Case:
    """Of so many heads of queries and of keys, and of that size."""
    many, kv, size = heads
    said = {"untied": True, **said}
    return Case(arch, layers, hidden, many, kv, size, **said)


def experts(count: int, used: int, width: int) -> dict[str, Any]:
    return {"experts": count, "used": used, "expert_ffn": width}


NEXT = {
    "full_attention_interval": 4,
    "ssm.conv_kernel": 4,
    "ssm.state_size": 128,
    "ssm.group_count": 16,
    "ssm.time_step_rank": 32,
    "ssm.inner_size": 4096,
    "rope.dimension_count": 64,
}
QWEN27 = {**NEXT, "ssm.time_step_rank": 48, "ssm.inner_size": 6144}
# Vocabulary, parameters and the model.
REAL: dict[str, tuple[int, int, Case]] = {
    "Llama-3.1-70B": (
        128256,
        70_553_706_496 + 64,  # and its rotary factors
        case("llama", 80, 8192, (64, 8, 128), ffn=28672, factors={"rope_freqs": 64}),
    ),
    "Llama-3.1-8B": (128256, 8_030_261_248, case("llama", 32, 4096, (32, 8, 128), ffn=14336)),
    "Mixtral-8x7B": (
        32000,
        46_702_792_704,
        case("llama", 32, 4096, (32, 8, 128), ffn=14336, **experts(8, 2, 14336)),
    ),
    "Devstral-Small-2-24B": (
        131072,
        23_572_403_200,
        case("mistral3", 40, 5120, (32, 8, 128), ffn=32768),
    ),
    "Qwen2.5-7B": (
        152064,
        7_615_616_512,
        case("qwen2", 28, 3584, (28, 4, 128), ffn=18944, biases=QKV),
    ),
    "Qwen3-0.6B": (
        151936,
        596_049_920,
        case("qwen3", 28, 1024, (16, 8, 128), ffn=3072, head_norms=True, untied=False),
    ),
    "Qwen3-14B": (
        151936,
        14_768_307_200,
        case("qwen3", 40, 5120, (40, 8, 128), ffn=17408, head_norms=True),
    ),
    "Qwen3-30B-A3B": (
        151936,
        30_532_122_624,
        case("qwen3moe", 48, 2048, (32, 4, 128), head_norms=True, **experts(128, 8, 768)),
    ),
    "Qwen3-Coder-Next": (
        151936,
        79_674_391_296,
        case(
            "qwen3next",
            48,
            2048,
            (16, 2, 256),
            only=qwen35.next_layer,
            shared_ffn=512,
            keys=NEXT,
            **experts(512, 10, 512),
        ),
    ),
    "Qwen3.6-27B": (
        248320,
        26_895_998_464,
        case("qwen35", 64, 5120, (24, 4, 256), ffn=17408, only=qwen35.layer, keys=QWEN27),
    ),
    "gpt-oss-120b": (
        201088,
        116_829_156_672,
        replace(
            tiny.CASES["gpt-oss"],
            layers=36,
            hidden=2880,
            heads=64,
            kv_heads=8,
            head_dim=64,
            untied=True,
            **experts(128, 4, 2880),
        ),
    ),
    "Gemma-2-9B": (
        256000,
        9_241_705_984,
        case("gemma2", 42, 3584, (16, 8, 256), ffn=14336, post_norms=True, untied=False),
    ),
    "Gemma-3-4B": (
        262208,
        3_880_263_168,
        case(
            "gemma3",
            34,
            2560,
            (8, 4, 256),
            ffn=10240,
            post_norms=True,
            head_norms=True,
            untied=False,
            keys={"attention.sliding_window": 1024},
        ),
    ),
    "SmolLM3-3B": (
        128256,
        3_075_098_624,
        case("smollm3", 36, 2048, (16, 4, 128), ffn=11008, untied=False),
    ),
    "OLMo-2-7B": (
        100352,
        7_298_617_344,
        replace(
            tiny.CASES["olmo2"],
            layers=32,
            hidden=4096,
            heads=32,
            kv_heads=32,
            head_dim=128,
            ffn=11008,
        ),
    ),
}

CONTEXT = 8192
NOT_ZERO = {"ssm_a": -1, "rope_freqs": 1}  # minus an exponential; what frequencies are divided by
MEMORY = 32  # GB of a Mac, of which Metal recommends two thirds
FITTING = {
    *("Llama-3.1-8B", "Qwen2.5-7B", "Qwen3-0.6B", "Qwen3-14B", "Gemma-2-9B", "Gemma-3-4B"),
    *("SmolLM3-3B", "OLMo-2-7B"),
}
# Layers that read more than 70 million values take longer than half a second each.
SMALL = {"Qwen3-0.6B", "Qwen3-30B-A3B", "Qwen3-Coder-Next"}
# With a window and without, with rotary positions and without, or with attention and a recurrence.
TWO_KINDS = {
    *("Qwen3-Coder-Next", "Qwen3.6-27B", "gpt-oss-120b", "Gemma-2-9B", "Gemma-3-4B", "SmolLM3-3B"),
}
TOKENS = 3  # of the prompt that a layer runs with


def written(folder: Path, name: str) -> Path:
    """In Q8_0, and F32 where a vector or a router is."""
    vocabulary, _, model = REAL[name]
    offset, placed = 0, []
    for tensor, shape in shapes(model, vocabulary):
        plain = len(shape) == 1 or any(part in tensor for part in ("gate_inp", "conv1d"))
        form = BY_NAME["F32" if plain or shape[-1] % 32 or tensor.endswith(".bias") else "Q8_0"]
        placed.append(make.T(tensor, form.name, shape, data=b"", offset=offset))
        nbytes = prod(shape) // form.block_size * form.type_size
        offset += nbytes + -nbytes % 32
    keys = tiny._metadata(model) | {f"{model.arch}.context_length": CONTEXT}
    values = {k: np.array(v, np.int32) if isinstance(v, list) else v for k, v in keys.items()}
    header = make.gguf({"general.architecture": model.arch, **values}, placed)
    path = folder / f"{name}.gguf"
    with path.open("wb") as file:
        file.write(header)
        file.truncate(len(header) + offset)
        for tensor in placed:
            short = str(tensor.name).removesuffix(".weight").split(".")[-1]
            if short in NOT_ZERO:
                file.seek(len(header) + (tensor.offset or 0))
                file.write(np.full(tensor.shape, NOT_ZERO[short], np.float32).tobytes())
    return path


@pytest.mark.parametrize("name", REAL)
def test_a_released_models_header_is_planned(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, parameters, model = REAL[name]
    path = written(tmp_path, name)

    def read(*_: object) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr(GGUFFile, "read", read)
    with open_gguf(path) as file:
        assert sum(prod(tensor.shape) for tensor in file.tensors.values()) == parameters
        planned = plan(file, read_config(file))
        assert len(planned.layers) == model.layers
        filled = sum(prod(w.shape) for part in (planned.outer, *planned.layers) for w in part)
        # Those of a weight, and factors of the rotation.
        names = [n for n in file.tensors if n.endswith(("rope_freqs.weight", ".bias"))]
        rest = sum(prod(file.tensors[n].shape) for n in names if "ssm_dt" not in n)
        assert filled == parameters - rest
        assert needs(file).weights >= 0.9 * parameters


@pytest.mark.parametrize("name", REAL)
def test_it_is_inspected_by_its_header(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it takes is worked out here from the shapes: 34 bytes for 32 values, and 4 for 1."""
    monkeypatch.setenv("MLXFUSE_MEMORY", str(MEMORY))
    monkeypatch.setattr("mlxfuse.inspect.header.read_vocab", lambda *_: None)
    vocabulary, parameters, model = REAL[name]
    path = written(tmp_path, name)
    on_disk = path.stat().st_blocks
    found = inspect(path)
    assert path.stat().st_blocks == on_disk
    assert found["supported"] is True, found["unsupported"]
    assert (found["architecture"], found["layers"]) == (model.arch, model.layers)
    assert (found["parameters"], found["size"]) == (parameters, path.stat().st_size)
    with open_gguf(path) as file:
        tensors = {n: t for n, t in file.tensors.items() if not n.startswith("rope_")}
        sizes = {
            n: prod(t.shape) * 34 // 32 if t.format.name == "Q8_0" else prod(t.shape) * 4
            for n, t in tensors.items()
        }
    assert found["size"] - sum(sizes.values()) < 200_000  # the header
    memory, active = found["memory"], 0
    for n, size in sizes.items():
        part = model.used if "_exps." in n else 1
        whole = model.experts if "_exps." in n else 1
        whole = vocabulary if n == "token_embd.weight" and model.untied else whole
        active += size * part // whole
    assert memory["weights"] == sum(sizes.values())
    assert memory["active"] == active
    assert memory["context"] == CONTEXT
    assert memory["budget"] == (MEMORY << 30) * 2 // 3
    assert memory["fits"] is (name in FITTING)
    text = render(found)
    fits = "fits" if name in FITTING else "does not fit"
    assert f"this machine  {fits}: weights {memory['held'] / 1e9:.2f} GB" in text or (
        f"this machine  {fits}: weights {memory['held'] / 1e6:.2f} MB" in text
    )
    assert f"parameters    {parameters:,} in {model.layers} layers" in text


def kinds(weights: Plan) -> list[int]:
    """The first layer of each kind: of other tensors, another window or other positions."""
    config, found = weights.config, {}
    for i, layer in enumerate(weights.layers):
        tensors = [(w.of.module, w.shape, w.weight[0].format.name, bool(w.bias)) for w in layer]
        found.setdefault(repr((tensors, config.sizes_of(i), config.rope_of(i))), i)
    return list(found.values())


class Nothing(nn.Module):
    """In the place of what stands before and after the layers."""

    def __init__(self, given: mx.array | None = None) -> None:
        super().__init__()
        self._given = given

    def __call__(self, x: mx.array) -> mx.array:
        return x if self._given is None else self._given


def skip(layer: nn.Module) -> None:
    """Let a layer give what it is given; what the model asks of it stays."""
    skipped = {"__call__": lambda self, x, *rest, **options: x}
    layer.__class__ = type("Skipped", (type(layer),), skipped)


def run(
    file: GGUFFile, weights: Plan, i: int, monkeypatch: pytest.MonkeyPatch
) -> tuple[mx.array, mx.array]:
    """The model with layer ``i`` alone: what comes into it, and what comes out of it.

    Its weights stay in the file and are dequantised, a few rows at a time, when they are used.
    """
    config = weights.config
    check = building._check_parameters
    with monkeypatch.context() as patched:
        # mlx-lm's class has all weights of the file; those of one layer are filled.
        patched.setattr(building, "_check_parameters", lambda model, _: check(model, weights))
        one = replace(weights, outer=(), layers=(weights.layers[i],))
        model = building.build(file, one, mx.float32, budget=0)
    for j, layer in enumerate(model.layers):
        if j != i:
            skip(layer)
    x = mx.random.normal((1, TOKENS, config.sizes["embd"]), key=mx.random.key(0))
    embedding, at = parent_of(model, config.architecture.outer["token_embd"].module)
    setattr(embedding, at, Nothing(x))
    norm, at = parent_of(model, config.architecture.outer["output_norm"].module)
    setattr(norm, at, Nothing())
    inner = parent_of(model, config.architecture.layers_at)[0]
    return x, inner(mx.zeros((1, TOKENS), mx.int32), cache=make_prompt_cache(model))


def scale(config: Any) -> float:
    """What the embedding is multiplied by."""
    return config.sizes["embd"] ** 0.5 if config.architecture.name.startswith("gemma") else 1.0


def wanted(weights: Plan, i: int, used: int) -> Counter[tuple[str, int]]:
    """Rows that layer ``i`` reads of each weight and bias, by its first tensor and row there."""
    found = Counter[tuple[str, int]]()
    for weight in weights.layers[i]:
        rows = weight.shape[0] if len(weight.shape) < 3 else used * weight.shape[-2]
        found[weight.weight[0].tensor.name, weight.weight[0].start] += rows
        if weight.bias:
            found[weight.bias[0].tensor.name, weight.bias[0].start] += weight.shape[0]
    return found


def examine(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a layer of each kind; raises AssertionError where not all of its tensors are read."""
    model, read = REAL[name][2], Counter[tuple[str, int]]()
    rows = building.FileRows.__call__

    def counted(self: building.FileRows, start: int, stop: int) -> np.ndarray:
        first = self._parts[0][0]
        read[first.tensor.name, first.start] += stop - start
        return rows(self, start, stop)

    monkeypatch.setattr(building.FileRows, "__call__", counted)
    with open_gguf(written(folder, name)) as file:
        weights = plan(file, read_config(file))
        assert len(kinds(weights)) == 1 + (name in TWO_KINDS)
        for i in kinds(weights):
            read.clear()
            x, y = run(file, weights, i, monkeypatch)
            assert y.shape == (1, TOKENS, model.hidden)
            assert mx.allclose(y, x * scale(weights.config), rtol=1e-5, atol=0)
            assert read == wanted(weights, i, model.used), "other rows were read"


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in SMALL else pytest.mark.slow) for n in REAL]
)
def test_a_layer_of_each_kind_runs(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    examine(name, tmp_path, monkeypatch)


def test_a_part_that_does_not_run_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Control: an MLP that adds nothing either, but reads nothing."""
    monkeypatch.setattr(qwen3.MLP, "__call__", lambda self, x: mx.zeros_like(x))
    with pytest.raises(AssertionError, match="other rows were read"):
        examine("Qwen3-0.6B", tmp_path, monkeypatch)
