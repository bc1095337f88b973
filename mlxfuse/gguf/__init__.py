"""Reading GGUF: numpy only, no MLX."""

from mlxfuse.gguf.reader import GGUFFile, Tensor, Value, open_gguf

__all__ = ["GGUFFile", "Tensor", "Value", "open_gguf"]
