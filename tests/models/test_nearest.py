"""What is told of a file whose architecture is not known."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mlxfuse.errors import UnsupportedError
from mlxfuse.gguf.reader import open_gguf
from mlxfuse.inspect.header import inspect
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
