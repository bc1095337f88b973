"""The line that a user of ``chat`` types: editing, history, pasted texts."""

from __future__ import annotations

import os
from typing import Any

from prompt_toolkit import PromptSession
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

from .. import env

FENCE = '"""'


class Lines:
    """Asks for messages on a terminal; a pasted text is one message.

    Enter sends; Alt-Enter, or Enter behind a backslash, begins a new line, and so does Enter
    between two fences of three quotation marks. What was sent is in the history of later sessions.
    """

    def __init__(self) -> None:
        # Nothing here needs to know where the cursor is, and some terminals do not tell.
        os.environ.setdefault("PROMPT_TOOLKIT_NO_CPR", "1")
        self._session: PromptSession[str] = PromptSession(
            history=_history(),
            multiline=True,
            key_bindings=_bindings(),
            prompt_continuation=lambda width, number, wrapped: "... ".rjust(width),
        )

    def ask(self, aside: str) -> str:
        """One message.

        Args:
            aside: what is shown at the right of the line.

        Raises:
            EOFError, KeyboardInterrupt: the user pressed Ctrl-D or Ctrl-C.
        """
        text = self._session.prompt(">>> ", rprompt=aside)
        bare = text.strip()
        if bare.startswith(FENCE):
            text = bare.removeprefix(FENCE).removesuffix(FENCE).strip("\n")
        return text


def _history() -> History:
    """Of the user alone; only of this session where the cache folder cannot be written."""
    path = env.cache_dir() / "chat-history"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(0o600)
        with path.open("ab"):
            return FileHistory(str(path))
    except OSError:
        return InMemoryHistory()


def _bindings() -> KeyBindings:
    bindings = KeyBindings()

    @bindings.add("enter")
    def enter(event: KeyPressEvent) -> None:
        buffer: Any = event.current_buffer
        text = buffer.text
        if buffer.document.text_before_cursor.endswith("\\"):
            buffer.delete_before_cursor()
            buffer.insert_text("\n")
        elif text.lstrip().startswith(FENCE) and text.count(FENCE) < 2:
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @bindings.add("escape", "enter")
    def newline(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return bindings
