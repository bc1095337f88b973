"""Tensors with axes of 1, which llama.cpp takes too."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlxfuse.errors import GGUFError
from mlxfuse.gguf.reader import open_gguf
from mlxfuse.loader import load
from mlxfuse.models.config import read_config
from mlxfuse.models.plan import plan
from tests.models import tiny


def test_axes_of_one_change_nothing(tmp_path: Path) -> None:
    model = tiny.build("llama", 0)
    ids = mx.array(model.prompt[None])
    want = load(tiny.write(tmp_path / "a.gguf", model), dtype=mx.float32)[0](ids)
    for name in ("output_norm.weight", "blk.1.attn_q.weight"):
        data, kind = model.tensors[name]
        model.tensors[name] = data[None], kind
    got = load(tiny.write(tmp_path / "b.gguf", model), dtype=mx.float32)[0](ids)
    assert mx.array_equal(got, want)


def test_another_shape_of_as_many_values_is_refused(tmp_path: Path) -> None:
    model = tiny.build("llama-biases", 0)
    data, kind = model.tensors["blk.1.ffn_up.weight"]
    model.tensors["blk.1.ffn_up.weight"] = np.ascontiguousarray(data.T), kind
    path = tiny.write(tmp_path / "m.gguf", model)
    with open_gguf(path) as file, pytest.raises(GGUFError, match=r"blk\.1\.ffn_up\.weight has the"):
        plan(file, read_config(file))
