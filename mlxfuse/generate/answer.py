"""An answer as it comes, and what it was when it has ended."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..errors import MLXFuseError
from .parts import CONTENT, REASONING, Parts, Whole
from .sampling import StopTexts


@dataclass(frozen=True, slots=True)
class Result:
    """What was generated, and how fast.

    text                the answer, without the reasoning before it.
    tokens              ids in the order generated, without the one that ended the text.
    prompt_tps          prompt tokens a second, until the first token was there.
    generation_tokens   tokens generated, with the one that ended the text.
    generation_tps      generated tokens a second, after the prompt.
    peak_memory         GB (1e9 bytes) that MLX held at most.
    finish_reason       ``stop`` (an end token or a stop text), ``length`` (``max_tokens``)
                        or ``interrupted``.
    end_token           id of the token that ended the text, if one did.
    kv_cache            how the key-value cache was compressed, if it was.
    reasoning           what the model put between the marks of reasoning (see `Parts`).
    """

    text: str
    tokens: list[int]
    prompt_tokens: int
    prompt_tps: float
    generation_tokens: int
    generation_tps: float
    peak_memory: float
    finish_reason: str
    end_token: int | None = None
    kv_cache: str | None = None
    accepted: int | None = None
    reasoning: str = ""

    def footer(self) -> str:
        """The three lines that ``mlx_lm.generate`` ends with, and one about drafts."""
        lines = (
            f"Prompt: {self.prompt_tokens} tokens, {self.prompt_tps:.3f} tokens-per-sec\n"
            f"Generation: {self.generation_tokens} tokens, "
            f"{self.generation_tps:.3f} tokens-per-sec\n"
            f"Peak memory: {self.peak_memory:.3f} GB"
        )
        if self.accepted is None:
            return lines
        steps = max(self.generation_tokens - self.accepted, 1)
        return (
            f"{lines}\nDrafts: {self.accepted} tokens accepted, "
            f"{self.generation_tokens / steps:.2f} tokens a forward pass"
        )


class Answer:
    """An answer as it comes: what each step of ``stream_generate`` adds to it.

    stops   the texts that end it.
    reason  why it ended; ``length`` until something else is known.
    """

    def __init__(
        self,
        stops: StopTexts,
        parts: Parts | Whole,
        write: Callable[[str], None] | None,
        think: Callable[[str], None] | None,
    ) -> None:
        self.stops, self.reason = stops, "length"
        self._parts = parts
        self._takers = {CONTENT: write, REASONING: think}
        self._texts: dict[str, list[str]] = {CONTENT: [], REASONING: []}
        self._tokens: list[int] = []
        self._accepted, self._last = 0, None

    def add(self, step: Any) -> None:
        """Take one step's token and text; whoever takes pieces gets those that are known."""
        self._last = step
        self._accepted += step.from_draft
        if step.finish_reason != "stop":
            self._tokens.append(int(step.token))
        self._give(self._parts.feed(self.stops.feed(step.text)))
        self.reason = step.finish_reason or self.reason

    def _give(self, pieces: list[tuple[str, str]]) -> None:
        for kind, text in pieces:
            self._texts[kind].append(text)
            if (take := self._takers[kind]) is not None:
                take(text)

    def result(self, *, drafts: bool) -> Result:
        """The whole answer, after what was held back of its text.

        Args:
            drafts: tokens were drafted, so that it matters how many were accepted.

        Raises:
            MLXFuseError: there was no step.
        """
        self._give(self._parts.feed(self.stops.rest()) + self._parts.rest())
        last: Any = self._last
        if last is None:
            raise MLXFuseError("the model generated nothing")
        return Result(
            text="".join(self._texts[CONTENT]),
            reasoning="".join(self._texts[REASONING]).rstrip(),
            tokens=self._tokens,
            prompt_tokens=last.prompt_tokens,
            prompt_tps=last.prompt_tps,
            generation_tokens=last.generation_tokens,
            generation_tps=last.generation_tps,
            peak_memory=last.peak_memory,
            finish_reason=self.reason,
            end_token=int(last.token) if last.finish_reason == "stop" else None,
            accepted=self._accepted if drafts else None,
        )
