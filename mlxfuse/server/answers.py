"""Reasoning, content and tool calls: what an answer's text is made of."""

from __future__ import annotations

import json
import logging
import secrets
import string
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..generate.parts import CALL, CONTENT, REASONING, Parts, Whole
from .text import Piece, Token

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Call:
    """A tool call; ``arguments`` is JSON."""

    id: str
    name: str
    arguments: str


# (CONTENT | REASONING, text) or (CALL, Call)
Part = tuple[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """How the text of an answer is to be read.

    opening   the end of the prompt; None: there is nothing but content.
    begun     the prompt already holds how the answer begins.
    tools     as the request has them; without any the marks of tool calls are text.
    parallel  whether there may be several calls.
    forced    the content is a tool call, as JSON.
    """

    opening: str | None = None
    begun: bool = False
    tools: list[dict[str, Any]] = field(default_factory=list)
    parallel: bool = True
    forced: bool = False


class Answer:
    """One answer as it comes.

    ``content``, ``reasoning``, ``calls`` and ``tokens`` are what came so far; ``finish`` is None
    until the end, then ``stop``, ``length`` or ``tool_calls``.
    """

    def __init__(self, tokenizer: TokenizerWrapper, form: Form) -> None:
        self.content = self.reasoning = ""
        self.calls: list[Call] = []
        self.tokens: list[Token] = []
        self.finish: str | None = None
        self.stopped_by: str | None = None
        self.count = self.cached = 0
        self._tokenizer, self._form = tokenizer, form
        self._parts: Parts | Whole = Whole()
        if form.opening is not None:
            tools = bool(form.tools)
            self._parts = Parts(tokenizer, form.opening, begun=form.begun, tools=tools)

    def feed(self, piece: Piece) -> list[Part]:
        """What ``piece`` adds."""
        self.count, self.cached = piece.count, piece.cached or self.cached
        self.tokens += piece.tokens
        found = self._parts.feed(piece.text)
        if piece.finish is not None:
            found += self._parts.rest()
        parts: list[Part] = []
        for kind, text in found:
            parts += self._part(kind, text)
            if self.calls and not self._form.parallel:
                self.finish = "tool_calls"
                return parts
        if piece.finish is not None:
            if self._form.forced:
                parts += self._forced()
            self.stopped_by = piece.stopped_by
            made = piece.finish == "stop" and self.calls
            self.finish = "tool_calls" if made else piece.finish
        return parts

    def _part(self, kind: str, text: str) -> Iterator[Part]:
        if kind == CALL:
            yield from self._calls(text)
        elif kind == REASONING:
            self.reasoning += text
            yield kind, text
        else:
            self.content += text
            if not self._form.forced:
                yield CONTENT, text

    def _calls(self, text: str) -> Iterator[Part]:
        try:
            found = self._tokenizer.tool_parser(text, self._form.tools)
            calls = [_call(each) for each in (found if isinstance(found, list) else [found])]
        except Exception as error:  # MLX-LM's parsers raise whatever malformed text leads to
            log.warning("not a tool call (%s): %.200r", error, text)
            start, end = self._tokenizer.tool_call_start, self._tokenizer.tool_call_end
            yield from self._part(CONTENT, f"{start}{text}{end}")
            return
        for call in calls[: None if self._form.parallel else 1]:
            self.calls.append(call)
            yield CALL, call

    def _forced(self) -> Iterator[Part]:
        """The call that a grammar made the model write."""
        try:
            call = _call(json.loads(self.content))
        except (ValueError, RecursionError):  # it was cut off
            yield CONTENT, self.content
            return
        self.content = ""
        self.calls.append(call)
        yield CALL, call


def _call(found: Any) -> Call:
    name = found.get("name") if isinstance(found, dict) else None
    if not isinstance(name, str) or not name:
        raise ValueError("a tool call needs a name")
    arguments = found.get("arguments", found.get("parameters", {}))
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    given = found.get("id")
    # Mistral's templates take ids of nine letters and digits only.
    letters = string.ascii_letters + string.digits
    made = "".join(secrets.choice(letters) for _ in range(9))
    return Call(given if isinstance(given, str) and given else made, name, arguments)
