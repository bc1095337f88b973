"""Qwen3-Next in the class of Qwen3.5, whose inputs of a delta net are apart as in a GGUF file."""

from __future__ import annotations

from mlx_lm.models.qwen3_5 import TextModel as Model
from mlx_lm.models.qwen3_5 import TextModelArgs as ModelArgs

__all__ = ["Model", "ModelArgs"]
