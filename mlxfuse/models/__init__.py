"""GGUF architectures: their tables, their configuration and where each tensor goes."""

from __future__ import annotations

from .architectures import ARCHITECTURES
from .table import Architecture

__all__ = ["ARCHITECTURES", "Architecture"]
