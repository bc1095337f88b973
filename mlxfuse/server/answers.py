"""Reasoning, content and tool calls: what an answer's text is made of."""

from __future__ import annotations

import json
import logging
import secrets
import string
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from mlx_lm.generate import TextStateMachine
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..text.parts import text_machine
from .text import Piece, Token

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Call:
    """A tool call; ``arguments`` is JSON."""

    id: str
    name: str
    arguments: str


# ("content" | "reasoning", text) or ("call", Call)
Part = tuple[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """How the text of an answer is to be read.

    state     the part it begins in: ``normal``, ``reasoning``, or ``header`` for gpt-oss.
    tools     as the request has them; without any the marks of tool calls are text.
    parallel  whether there may be several calls.
    forced    the content is a tool call, as JSON.
    plain     there is nothing but content.
    """

    state: str = "normal"
    tools: list[dict[str, Any]] = field(default_factory=list)
    parallel: bool = True
    forced: bool = False
    plain: bool = False


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
        machine = (
            TextStateMachine(None)
            if form.plain
            else text_machine(tokenizer, tools=bool(form.tools))
        )
        self._state = machine.make_state(form.state)
        self._before = form.state
        self._bare = form.state == "reasoning"  # white space here only separates
        self._tool = ""

    def feed(self, piece: Piece) -> list[Part]:
        """What ``piece`` adds."""
        self.count, self.cached = piece.count, piece.cached or self.cached
        self.tokens += piece.tokens
        self._state, segments = TextStateMachine.split(self._state, piece.text)
        if piece.finish is not None:
            self._state, rest, state = TextStateMachine.flush(self._state)
            segments.append((state, rest))
        parts: list[Part] = []
        for state, text in segments:
            parts += self._segment(state, text)
            if self.calls and not self._form.parallel:
                self.finish = "tool_calls"
                return parts
        if piece.finish is not None:
            if self._before == "tool":
                parts += self._end_of_call()
            if self._form.forced:
                parts += self._forced()
            self.stopped_by = piece.stopped_by
            made = piece.finish == "stop" and self.calls
            self.finish = "tool_calls" if made else piece.finish
        return parts

    def _segment(self, state: str, text: str) -> Iterator[Part]:
        if state != self._before:
            if self._before == "tool":
                yield from self._end_of_call()
            self._before, self._bare = state, True
        if state == "tool":
            self._tool += text
            return
        if self._bare:
            text = text.lstrip()
        if not text or state == "header":
            return
        self._bare = False
        if state == "reasoning":
            self.reasoning += text
            yield "reasoning", text
        else:
            self.content += text
            if not self._form.forced:
                yield "content", text

    def _end_of_call(self) -> Iterator[Part]:
        text, self._tool = self._tool, ""
        try:
            found = self._tokenizer.tool_parser(text, self._form.tools)
            calls = [_call(each) for each in (found if isinstance(found, list) else [found])]
        except Exception as error:  # MLX-LM's parsers raise whatever malformed text leads to
            log.warning("not a tool call (%s): %.200r", error, text)
            start, end = self._tokenizer.tool_call_start, self._tokenizer.tool_call_end
            whole = f"{start}{text}{end}"
            self.content += whole
            yield "content", whole
            return
        for call in calls[: None if self._form.parallel else 1]:
            self.calls.append(call)
            yield "call", call

    def _forced(self) -> Iterator[Part]:
        """The call that a grammar made the model write."""
        text, self.content = self.content, ""
        try:
            call = _call(json.loads(text))
        except (ValueError, RecursionError):  # it was cut off
            self.content = text
            yield "content", text
            return
        self.calls.append(call)
        yield "call", call


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
