"""The text of one answer as its tokens come: up to a stop string, with what each token cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..generate.sampling import StopTexts


@dataclass(frozen=True, slots=True)
class Token:
    """A generated token, and what it might have been.

    at       characters of the answer before it.
    logprob  natural logarithm of its probability before temperature; None: nothing came before it.
    top      (id, logprob) of the most likely tokens, the first one first.
    """

    id: int
    at: int = 0
    logprob: float | None = 0.0
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Echo:
    """A prompt whose text the answer begins with.

    offsets  characters of the text before each token of the prompt.
    """

    text: str
    offsets: tuple[int, ...] = ()


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
        stops: strings before which the text ends.
        begun: characters of the answer that came before.
    """

    def __init__(self, detokenizer: Any, stops: Sequence[str], begun: int = 0) -> None:
        self._detokenizer, self._stops = detokenizer, StopTexts(tuple(stops))
        self._length = self._given = begun  # characters
        self._tokens: list[Token] = []

    def add(self, token: Token, ends: str | None) -> tuple[str, tuple[Token, ...], str | None]:
        """The text, tokens and the stop string, if one was met, that ``token`` completes.

        Args:
            ends: ``stop`` for a token that is no text and ends it, ``length`` for a last one.
        """
        if ends != "stop":
            self._tokens.append(replace(token, at=self._length))
            self._detokenizer.add_token(token.id)
        if ends is not None:
            self._detokenizer.finalize()
        segment = self._detokenizer.last_segment
        self._length += len(segment)
        text = self._stops.feed(segment)
        whole = ends is not None and self._stops.found is None
        if whole:
            text += self._stops.rest()
        self._given += len(text)
        # A token without text of its own comes with the text behind it.
        count = sum(1 for each in self._tokens if whole or each.at < self._given)
        tokens, self._tokens = tuple(self._tokens[:count]), self._tokens[count:]
        return text, tokens, self._stops.found
