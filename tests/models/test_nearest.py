"""What is told of a file whose architecture is not known."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mlxfuse.errors import GGUFError, UnsupportedError
from mlxfuse.gguf.reader import open_gguf
from mlxfuse.inspect.header import inspect
from mlxfuse.models.architectures import ARCHITECTURES, REFUSED
from mlxfuse.models.config import read_config
from mlxfuse.models.nearest import nearest
from tests.models import tiny
from tests.models.changes import read_as


@pytest.mark.parametrize(
    ("case", "name", "apart"),
    [("glm4", "glm4", "and no others"), ("nemotron_h_moe", "nemotron_h", ", without ")],
)
def test_the_nearest_is_the_one_with_its_tensors(
    case: str, name: str, apart: str, tmp_path: Path
) -> None:
    model = tiny.build(case, 0)
    read_as("unheard-of")(model)
    path = tiny.write(tmp_path / "m.gguf", model)
    with open_gguf(path) as file:
        told = nearest(file)
        assert told.startswith(f"its layers have the tensors of {name}, ")
        assert apart in told
        with pytest.raises(UnsupportedError, match="'unheard-of' is not supported") as caught:
            read_config(file)
    assert told in str(caught.value)
    (reason,) = inspect(path)["unsupported"]
    assert reason.startswith("architecture unheard-of; supported: ")
    assert reason.endswith(told)


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_missing_is_told_of_those_that_are_known(name: str, tmp_path: Path) -> None:
    assert name not in ARCHITECTURES
    model = tiny.build("llama", 0)
    read_as(name)(model)
    path = tiny.write(tmp_path / "m.gguf", model)
    with open_gguf(path) as file, pytest.raises(UnsupportedError) as caught:
        read_config(file)
    why = f"what is missing: {REFUSED[name]}"
    assert str(caught.value).endswith(why)
    (reason,) = inspect(path)["unsupported"]
    assert reason.startswith(f"architecture {name}; supported: ")
    assert reason.endswith(why)


# Case, keys of it (None: left out), a tensor that it has then, and why it is refused.
ODD: list[tuple[str, dict[str, object], str, str]] = [
    ("qwen3next", {}, "blk.0.ssm_in.weight", "with blk.0.ssm_in.weight: the file is from before"),
    ("llama4", {"expert_used_count": 2}, "", "llama4 with 2 experts for each token; expected 1"),
    ("llama4", {"attention.sliding_window": 0}, "", "llama4 without chunks"),
    ("llama4", {"expert_count": 0}, "", "expert_count is 0; expected"),
    ("jamba", {"attention.head_count_kv": [2, 2, 2, 2]}, "", "jamba whose layers are all of one"),
    ("jamba", {"ssm.inner_size": 100}, "", "inner_size is 100; expected a multiple"),
    ("kimi-linear", {"attention.head_count_kv": [0, 0, 0]}, "", "head_count_kv"),
    ("kimi-linear", {"attention.q_lora_rank": 64}, "", "a latent vector of queries"),
    ("deepseek2-lite", {"expert_group_count": 4, "expert_group_used_count": 2}, "", "by groups"),
    ("mistral4", {"rope.scaling.yarn_log_multiplier": 0.05}, "", "is 0.05; expected 0.1, or none"),
    ("deepseek32", {"rope.scaling.yarn_log_multiplier": 0.2}, "", "is 0.2; expected 0.1, or none"),
    ("glm-dsa-shared", {"attention.indexer.types": [0, 1, 1, 1]}, "", "is 0 for layer 0"),
    ("mimo2", {"attention.sliding_window_pattern": [True] * 4}, "", "all have a sliding window"),
    (
        "mimo2",
        {"attention.head_count_kv": [2, 4, 2, 2]},
        "",
        r"with \[2, 4\] kv_heads in layers with",
    ),
    ("mimo2", {}, "blk.0.attn_sinks.weight", "attn_sinks in some of the layers without"),
    (
        "step35",
        {"rope.dimension_count_swa": 15},
        "",
        "of which layers without a window",
    ),
    ("laguna", {"expert_weights_norm": False}, "", "weights do not add up to 1"),
    ("laguna", {"attention.head_count": 4}, "blk.0.attn_gate.weight", "gates of 7 rows for 4"),
    ("mellum", {"attention.sliding_window_pattern": [True] * 5}, "", "all have a sliding window"),
]


@pytest.mark.parametrize(("name", "keys", "tensor", "reason"), ODD)
def test_forms_that_are_not_supported_are_refused(
    name: str, keys: dict[str, object], tensor: str, reason: str, tmp_path: Path
) -> None:
    model = tiny.build(name, 0)
    for key, value in keys.items():
        model.metadata[f"{model.case.arch}.{key}"] = value
    if tensor:
        model.tensors[tensor] = np.ones((7, 64), np.float32), "F32"
    with (
        open_gguf(tiny.write(tmp_path / "m.gguf", model)) as file,
        pytest.raises((GGUFError, UnsupportedError), match=reason),
    ):
        read_config(file)


def test_what_is_apart_is_named(tmp_path: Path) -> None:
    model = tiny.build("glm4", 0)
    read_as("unheard-of")(model)
    model.tensors["blk.0.new_thing.weight"] = np.ones(64, np.float32), "F32"
    for i in range(model.case.layers):
        del model.tensors[f"blk.{i}.post_ffw_norm.weight"]
    with open_gguf(tiny.write(tmp_path / "m.gguf", model)) as file:
        assert "glm4, but for new_thing, without post_ffw_norm; " in nearest(file)


def test_a_file_without_layers_is_near_to_nothing(tmp_path: Path) -> None:
    model = tiny.build("llama", 0)
    model.case = replace(model.case, arch="unheard-of")
    model.tensors = {n: t for n, t in model.tensors.items() if not n.startswith("blk.")}
    with open_gguf(tiny.write(tmp_path / "m.gguf", model)) as file:
        assert nearest(file) == ""
