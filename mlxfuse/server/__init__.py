"""The HTTP server: OpenAI's and Anthropic's protocols in front of one model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .app import Server

__all__ = ["Server"]


def __getattr__(name: str) -> Any:
    """``Server``, once it is asked for: it loads mlx-lm, which `listener` does without."""
    if name != "Server":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .app import Server

    return Server
