"""Tokens and text: prompts, sampling, generation, chat, perplexity, files of prompt caches.

In this room are the settings of a generation and what runs it, for the commands and the server.
What a file says about text is in ``tokenizer``, the HTTP side in ``server``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .run import Settings

__all__ = ["Settings"]


def __getattr__(name: str) -> object:
    """``Settings`` on first use: it brings MLX-LM along, which ``--help`` can do without."""
    if name != "Settings":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .run import Settings

    return Settings
