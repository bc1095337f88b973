"""Files with the shapes of released models, all of them a hole: planned by their headers alone.

The numbers of parameters are the published ones, which tells that the shapes are.
"""

from __future__ import annotations

from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlxfuse.formats import BY_NAME
from mlxfuse.gguf.reader import GGUFFile, open_gguf
from mlxfuse.inspect.needs import needs
from mlxfuse.models.config import read_config
from mlxfuse.models.plan import plan
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
    keys = tiny._metadata(model) | {f"{model.arch}.context_length": 8192}
    values = {k: np.array(v, np.int32) if isinstance(v, list) else v for k, v in keys.items()}
    header = make.gguf({"general.architecture": model.arch, **values}, placed)
    path = folder / f"{name}.gguf"
    with path.open("wb") as file:
        file.write(header)
        file.truncate(len(header) + offset)
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
