"""LoRA adapters, as ``mlx_lm.lora`` writes them."""

from __future__ import annotations

from pathlib import Path

import mlx.nn as nn
from mlx_lm.tuner.utils import load_adapters

from ..errors import CheckpointError
from .checkpoint import read_json

_CONFIG, _WEIGHTS = "adapter_config.json", "adapters.safetensors"


def apply_adapter(model: nn.Module, folder: Path) -> None:
    """Put the adapter of ``folder`` on the model; its layers stay as they are below it.

    Raises:
        CheckpointError: a file of it is missing or malformed, or it is for another model.
    """
    for name in (_CONFIG, _WEIGHTS):
        if not (folder / name).is_file():
            raise CheckpointError(
                f"{folder}: expected a folder that mlx_lm.lora wrote, with {_CONFIG} and "
                f"{_WEIGHTS}; there is no {name}"
            )
    read_json(folder / _CONFIG)
    try:
        load_adapters(model, str(folder))
    except (ValueError, KeyError, AttributeError, TypeError, RuntimeError) as error:
        raise CheckpointError(f"{folder}: this adapter does not fit the model: {error}") from error
    model.eval()
