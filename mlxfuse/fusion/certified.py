"""The classes of mlx-lm that a fused class may replace, each with the `__call__` it stands for.

A class is certified by identity and by the tokens of its ``__call__``: a subclass, or another
version of mlx-lm that computes something else, is left alone.
"""

from __future__ import annotations

import hashlib
import inspect
import io
import sys
import textwrap
import tokenize
from collections.abc import Callable
from functools import cache
from typing import Any

import mlx.nn as nn

from ..nn.attention import FusedAttention, FusedSoftcapAttention
from ..nn.mlp import FusedBlock, FusedGeluMLP, FusedMLP

# fusion -> class of mlx_lm.models -> (fused class, fingerprint of the class's __call__)
CERTIFIED: dict[str, dict[str, tuple[type[nn.Module], str]]] = {
    "qkv": {
        "llama.Attention": (FusedAttention, "db53a96997bbdb87"),
        "qwen2.Attention": (FusedAttention, "db53a96997bbdb87"),
        "qwen3.Attention": (FusedAttention, "f306dbab367c370c"),
        "gemma2.Attention": (FusedSoftcapAttention, "ea354ec14ccbdbbc"),
        "gemma3_text.Attention": (FusedAttention, "d2e1458f6cad3bc9"),
        "phi3.Attention": (FusedAttention, "05ad89f5505b12a4"),
    },
    "gate_up": {
        "llama.MLP": (FusedMLP, "133954eefdfcff22"),
        "qwen2.MLP": (FusedMLP, "133954eefdfcff22"),
        "qwen3.MLP": (FusedMLP, "133954eefdfcff22"),
        "gemma2.MLP": (FusedGeluMLP, "5d1730a810830d0f"),
        "gemma3_text.MLP": (FusedGeluMLP, "5d1730a810830d0f"),
        "phi3.MLP": (FusedMLP, "ae64dec9c127f1ce"),
    },
    "residual": {
        "llama.TransformerBlock": (FusedBlock, "cdea09b459b8d60e"),
        "qwen2.TransformerBlock": (FusedBlock, "cdea09b459b8d60e"),
        "qwen3.TransformerBlock": (FusedBlock, "cdea09b459b8d60e"),
        "phi3.TransformerBlock": (FusedBlock, "cdea09b459b8d60e"),
    },
}
_PACKAGE = "mlx_lm.models."
_LAYOUT = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)


@cache
def fingerprint(call: Callable[..., Any]) -> str:
    """Hash of a method's tokens; comments and layout do not count."""
    try:
        source = textwrap.dedent(inspect.getsource(call))
    except OSError:
        return "no source"
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    text = " ".join(t.string for t in tokens if t.type not in _LAYOUT)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def certify(fusion: str, module: nn.Module) -> tuple[type[nn.Module] | None, str]:
    """The class that may replace the module's, or None and the reason."""
    cls = type(module)
    name = f"{cls.__module__}.{cls.__qualname__}"
    fused, expected = CERTIFIED[fusion].get(name.removeprefix(_PACKAGE), (None, ""))
    if fused is None or getattr(sys.modules.get(cls.__module__), cls.__qualname__, None) is not cls:
        return None, f"{name} is not a class that is known"
    if fingerprint(cls.__call__) != expected:
        return None, f"this version of mlx-lm has another {name}.__call__"
    return fused, ""
