"""LoRA adapters, as ``mlx_lm.lora`` writes them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers, load_adapters

from ..errors import CheckpointError, UnsupportedError
from .checkpoint import read_json
from .part import Part
from .rows import Ranges, indices

_CONFIG, _WEIGHTS = "adapter_config.json", "adapters.safetensors"
_MISFITS = (ValueError, KeyError, AttributeError, TypeError, RuntimeError)


def check_adapter(folder: Path) -> None:
    """See that the folder has what an adapter is made of.

    Raises:
        CheckpointError: a file of it is missing.
    """
    for name in (_CONFIG, _WEIGHTS):
        if not (folder / name).is_file():
            raise CheckpointError(
                f"{folder}: expected a folder that mlx_lm.lora wrote, with {_CONFIG} and "
                f"{_WEIGHTS}; there is no {name}"
            )


def apply_adapter(model: nn.Module, folder: Path, part: Part | None = None) -> None:
    """Put the adapter of ``folder`` on the model; its layers stay as they are below it.

    Args:
        part: what of the model this rank has, if several machines share it; not joined yet.

    Raises:
        CheckpointError: a file of it is missing or malformed, or it is for another model.
        UnsupportedError: it is of a kind that machines cannot share.
    """
    check_adapter(folder)
    config = read_json(folder / _CONFIG)
    try:
        if part is None:
            load_adapters(model, str(folder))
        else:
            _apply_part(model, folder, SimpleNamespace(**config), part)
    except _MISFITS as error:
        raise CheckpointError(f"{folder}: this adapter does not fit the model: {error}") from error
    model.eval()


def _apply_part(model: nn.Module, folder: Path, config: SimpleNamespace, part: Part) -> None:
    """What of an adapter belongs to a rank: of ``A`` what is multiplied with its columns, of ``B``
    what makes its rows.
    """
    kind = getattr(config, "fine_tune_type", "lora")
    if kind != "lora":
        raise UnsupportedError(
            f"{folder}: machines that share a model can share an adapter of the kind lora, and "
            f"this one is of the kind {kind}"
        )
    linear_to_lora_layers(model, config.num_layers, config.lora_parameters)
    share, arrays = part.share, mx.load(str(folder / _WEIGHTS))
    assert isinstance(arrays, dict)
    parameters: Any = tree_flatten(model.parameters())
    held = {name: array.shape for name, array in parameters}
    found = []
    for name, array in arrays.items():
        module, _, leaf = name.rpartition(".")
        if leaf not in ("lora_a", "lora_b"):
            raise ValueError(f"{name} is no adapter's")
        if any(module.startswith(f"{path}.") for path in share.absent):
            continue
        own = _part_of(array, leaf, share.kept.get(module, (None, None, None)))
        if share.stages and name not in held:  # of another rank's layers
            continue
        if own.shape != held.get(name):
            raise ValueError(
                f"of {name}, {array.shape}, rank {share.rank} has {own.shape}, not {held.get(name)}"
            )
        found.append((name, own))
    model.load_weights(found, strict=False)


def _part_of(
    array: mx.array, leaf: str, kept: tuple[Ranges | None, Ranges | None, Ranges | None]
) -> mx.array:
    """Of ``A`` [columns, r] or ``B`` [r, rows]; of experts [n, r, columns] and [n, rows, r]."""
    matrices, rows, columns = kept
    own = columns if leaf == "lora_a" else rows
    axis = {("lora_a", 2): 0, ("lora_b", 2): 1, ("lora_a", 3): 2, ("lora_b", 3): 1}[
        leaf, array.ndim
    ]
    for ranges, at in ((own, axis), (matrices, 0)):
        if ranges is not None:
            array = mx.take(array, mx.array(list(indices(ranges))), axis=at)
    return mx.contiguous(array)
