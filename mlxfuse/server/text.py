"""The text of one answer as its tokens come: up to a stop string, with what each token cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Token:
    """A generated token, and what it might have been.

    at       characters of the answer before it.
    logprob  natural logarithm of its probability before temperature.
    top      (id, logprob) of the most likely tokens, the first one first.
    """

    id: int
    at: int = 0
    logprob: float = 0.0
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Piece:
    """What there is to send of an answer.

    finish  ``stop`` or ``length`` at the end; ``stopped_by`` is the stop string that was met.
    count   tokens generated so far, with the one that ended the text.
    cached  tokens of the prompt that the prompt cache already held.
    """

    text: str = ""
    tokens: tuple[Token, ...] = ()
    finish: str | None = None
    stopped_by: str | None = None
    count: int = 0
    cached: int = 0


class StreamedText:
    """Gives the text of tokens as soon as no stop string can begin in it.

    Args:
        detokenizer: a fresh one of MLX-LM's.
        stops: strings before which the text ends; none is empty.
    """

    def __init__(self, detokenizer: Any, stops: Sequence[str]) -> None:
        self._detokenizer, self._stops = detokenizer, stops
        self._held = ""
        self._given = 0  # characters
        self._tokens: list[Token] = []
        self._longest = max(map(len, stops), default=1) - 1

    def add(self, token: Token, ends: str | None) -> tuple[str, tuple[Token, ...], str | None]:
        """The text, tokens and the stop string, if one was met, that ``token`` completes.

        Args:
            ends: ``stop`` for a token that is no text and ends it, ``length`` for a last one.
        """
        if ends != "stop":
            at = self._given + len(self._held)
            self._tokens.append(Token(token.id, at, token.logprob, token.top))
            self._detokenizer.add_token(token.id)
        if ends is not None:
            self._detokenizer.finalize()
        self._held += self._detokenizer.last_segment
        found = min(
            ((at, stop) for stop in self._stops if (at := self._held.find(stop)) >= 0),
            default=None,
        )
        if found is not None:
            return *self._give(found[0]), found[1]
        if ends is not None:
            return *self._give(len(self._held)), None
        return *self._give(len(self._held) - self._pending()), None

    def _pending(self) -> int:
        """Characters at the end with which a stop string may begin."""
        for length in range(min(self._longest, len(self._held)), 0, -1):
            end = self._held[-length:]
            if any(stop.startswith(end) for stop in self._stops):
                return length
        return 0

    def _give(self, length: int) -> tuple[str, tuple[Token, ...]]:
        text, self._held = self._held[:length], self._held[length:]
        self._given += length
        # A token without text of its own comes with the text before it.
        count = sum(1 for token in self._tokens if token.at < self._given)
        tokens, self._tokens = tuple(self._tokens[:count]), self._tokens[count:]
        return text, tokens
