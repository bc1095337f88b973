"""Conversations in files: what `chat` saves and loads."""

from __future__ import annotations

import json
from pathlib import Path

from ..errors import MLXFuseError
from ..files import write_text

_LARGEST = 64 << 20
_ROLES = ("system", "user", "assistant")


def save(path: Path, messages: list[dict[str, str]]) -> None:
    """Write a conversation as JSON; an earlier one in the file is replaced.

    Raises:
        MLXFuseError: the file is there and is no conversation.
        OSError: it cannot be written; the old one stays.
    """
    if path.exists():
        try:
            load(path)
        except MLXFuseError:
            raise MLXFuseError(
                f"{path} is there and is no conversation: choose another name"
            ) from None
    write_text(path, json.dumps({"messages": messages}, ensure_ascii=False, indent=1) + "\n")


def load(path: Path) -> list[dict[str, str]]:
    """Read a conversation.

    Raises:
        MLXFuseError: the file is no conversation.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        data = file.read(_LARGEST + 1)
    try:
        found = json.loads(data.decode("utf-8")) if len(data) <= _LARGEST else None
    except (ValueError, RecursionError):
        found = None
    messages = found.get("messages") if isinstance(found, dict) else None
    if not isinstance(messages, list) or not all(_is_message(m) for m in messages):
        raise MLXFuseError(
            f"{path}: expected a conversation that /save wrote: an object with messages, each with "
            "a role (system, user or assistant) and content"
        )
    return messages


def _is_message(message: object) -> bool:
    return (
        isinstance(message, dict)
        and message.get("role") in _ROLES
        and isinstance(message.get("content"), str)
        and all(isinstance(value, str) for value in message.values())
    )
