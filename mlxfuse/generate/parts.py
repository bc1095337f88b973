"""Reasoning and answer, told apart in the text that a model generates."""

from __future__ import annotations

import re
from types import SimpleNamespace

from mlx_lm.generate import TextStateMachine, make_text_state_machine
from mlx_lm.tokenizer_utils import TokenizerWrapper

_MARK = re.compile(r"<\|\w+\|>")

CONTENT, REASONING, CALL = "content", "reasoning", "call"


class Parts:
    """Splits an answer's text as it comes: ``<think>`` parts, tool calls, gpt-oss's channels.

    The marks themselves, and the white space that separates the parts, are left out.

    Args:
        opening: the end of the prompt. Some templates end it with the mark of reasoning.
        begun: the prompt already holds how the answer begins.
        tools: give each tool call, whole, as a part of its own; else its marks are text.
    """

    def __init__(
        self,
        tokenizer: TokenizerWrapper,
        opening: str,
        *,
        begun: bool = False,
        tools: bool = False,
    ) -> None:
        state = "normal" if begun else tokenizer.response_initial_state or "normal"
        if begins_in_reasoning(tokenizer, opening):
            state = "reasoning"
        self._state = text_machine(tokenizer, tools=tools).make_state(state)
        self._before, self._bare = state, state == "reasoning"
        self._header = self._call = ""

    def feed(self, text: str) -> list[tuple[str, str]]:
        """What ``text`` adds: (`CONTENT`, `REASONING` or `CALL`, some text) each."""
        self._state, segments = TextStateMachine.split(self._state, text)
        return [part for state, piece in segments for part in self._segment(state, piece)]

    def rest(self) -> list[tuple[str, str]]:
        """What was held back when the text has ended."""
        self._state, held, state = TextStateMachine.flush(self._state)
        parts = self._segment(state, held)
        if self._before == "tool":
            parts.append((CALL, self._call))
        # A header that no message followed is no header.
        text = _MARK.sub("", self._header)
        return parts + ([(CONTENT, text)] if text else [])

    def _segment(self, state: str, text: str) -> list[tuple[str, str]]:
        ended = []
        if state != self._before:
            if self._before == "tool":
                ended = [(CALL, self._call)]
            self._before, self._bare, self._header, self._call = state, True, "", ""
        if state == "header":
            self._header += text
            return ended
        if state == "tool":
            self._call += text
            return ended
        if self._bare:
            text = text.lstrip()
        if not text:
            return ended
        self._bare = False
        return [*ended, (REASONING if state == "reasoning" else CONTENT, text)]


def begins_in_reasoning(tokenizer: TokenizerWrapper, opening: str) -> bool:
    """Whether a prompt that ends with ``opening`` ends with the mark of reasoning."""
    start = tokenizer.think_start
    return start is not None and opening.rstrip().endswith(start)


class Whole:
    """`Parts` of a text that is all answer."""

    def feed(self, text: str) -> list[tuple[str, str]]:
        """``text`` as it is."""
        return [(CONTENT, text)] if text else []

    def rest(self) -> list[tuple[str, str]]:
        """Nothing."""
        return []


def text_machine(tokenizer: TokenizerWrapper, *, tools: bool) -> TextStateMachine:
    """MLX-LM's splitter of an answer's text.

    Args:
        tools: whether tool calls are a part of their own, ``tool``; else their marks are text.
    """
    transitions = {
        state: [edge for edge in edges if tools or edge[1] != "tool"]
        for state, edges in tokenizer.response_transitions.items()
    }
    return make_text_state_machine(
        SimpleNamespace(
            has_thinking=tokenizer.has_thinking,
            think_start=tokenizer.think_start,
            think_end=tokenizer.think_end,
            has_tool_calling=tools and tokenizer.has_tool_calling,
            tool_call_start=tokenizer.tool_call_start,
            tool_call_end=tokenizer.tool_call_end,
            structural_markers=tokenizer.structural_markers,
            response_transitions=transitions,
        )
    )
