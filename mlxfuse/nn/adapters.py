"""Low-rank adapters (LoRA) on layers that keep their file's bytes: added in float beside them."""

from __future__ import annotations

from typing import Any

import mlx.nn as nn
from mlx_lm.tuner.lora import LoRALinear, LoRASwitchLinear


def lora_linear(layer: nn.Module, shape: tuple[int, int], **options: Any) -> Any:
    """mlx-lm's adapter around a linear layer, without a copy of its weights.

    Args:
        shape: [N, K] of the weight.
        options: ``r``, ``scale`` and ``dropout``.
    """
    made = LoRALinear(shape[1], shape[0], **options)  # its own weights are never evaluated
    made.linear = layer
    return made


def lora_switch_linear(layer: nn.Module, shape: tuple[int, int, int], **options: Any) -> Any:
    """The same for the matrices of experts, of shape [experts, N, K]."""
    experts, outputs, inputs = shape
    made = LoRASwitchLinear(inputs, outputs, experts, **options)
    made.linear = layer
    return made
