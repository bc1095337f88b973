"""MLX-LM checkpoints, as mlx-lm loads them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.utils import load as load_with_mlx_lm

from ..errors import CheckpointError, UnsupportedError
from ..tokenizer.answer_format import complete
from .axes import KV_HEADS

_STEP = 1 << 26  # bytes after which it is told how far loading has come


def read_json(path: Path) -> dict[str, Any]:
    """A file of a checkpoint.

    Raises:
        CheckpointError: it holds no JSON object.
    """
    try:
        found = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: expected JSON: {error}") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(found).__name__}")
    return found


def load_checkpoint(
    path: Path,
    *,
    dtype: mx.Dtype | None = None,
    tokenizer_config: Mapping[str, Any] | None = None,
    model_config: Mapping[str, Any] | None = None,
    lazy: bool = False,
    group: mx.distributed.Group | None = None,
    progress: Callable[[float], None] | None = None,
) -> tuple[nn.Module, Any, dict[str, Any]]:
    """``mlx_lm.load``: the model, its tokenizer and its configuration.

    Args:
        dtype: what its float parameters become; None leaves them as they are stored.
        group: the machines that share it, by mlx-lm's ``shard``; of the files each reads all, and
            keeps its part.
        progress: called with the share of the weights that is in memory; not where they are shared.

    Raises:
        CheckpointError: a file of it is missing or malformed.
        UnsupportedError: mlx-lm does not have the architecture, or the checkpoint wants code of
            its own to be run, which mlxfuse never does; or mlx-lm cannot share the model.
    """
    if "model_file" in read_json(path / "config.json"):
        raise UnsupportedError(f"{path}: its config.json names code of its own (model_file)")
    try:
        model, tokenizer, config = load_with_mlx_lm(
            str(path),
            tokenizer_config=dict(tokenizer_config or {}),
            model_config=dict(model_config or {}),
            lazy=True,
            return_config=True,
        )
        if dtype is not None:
            model.set_dtype(dtype)
        if not lazy and group is None:
            _read(model, progress)
    except (ValueError, KeyError, TypeError, RuntimeError, OSError) as error:
        unknown = isinstance(error, ValueError) and "not supported" in str(error)
        kind = UnsupportedError if unknown else CheckpointError
        raise kind(f"{path}: mlx-lm cannot load this checkpoint: {error}") from error
    if group is not None:
        try:
            _shard(model, group)
        except UnsupportedError as error:
            raise UnsupportedError(f"{path}: {error}") from None
    return model, complete(tokenizer), config


def _read(model: nn.Module, progress: Callable[[float], None] | None) -> None:
    """Bring the weights into memory, some at a time."""
    parameters: Any = tree_flatten(model.parameters())
    arrays = [array for _, array in parameters]
    whole, done, some = sum(array.nbytes for array in arrays), 0, 0
    for number, array in enumerate(arrays, start=1):
        mx.async_eval(array)
        some += array.nbytes
        if some >= _STEP or number == len(arrays):
            mx.eval(array)
            done, some = done + some, 0
            if progress is not None:
                progress(done / whole)
    mx.eval(arrays)


def _shard(model: nn.Module, group: mx.distributed.Group) -> None:
    """Keep this rank's part of a model, whose weights are not in memory yet."""
    ranks = group.size()
    if not hasattr(model, "shard"):
        raise UnsupportedError(
            f"mlx-lm cannot share a model of the class {type(model).__module__}; a GGUF file of it "
            "can be shared"
        )
    for _, module in model.named_modules():
        heads = next((getattr(module, n) for n in KV_HEADS if hasattr(module, n)), ranks)
        if heads % ranks:
            raise UnsupportedError(
                f"mlx-lm cannot share {heads} key/value heads among {ranks} machines; a GGUF file "
                "of the model can be shared unevenly"
            )
    try:
        model.shard(group)
    except (ValueError, AssertionError) as error:
        raise UnsupportedError(f"mlx-lm cannot share the model: {error}") from error
    mx.eval(model.parameters())
