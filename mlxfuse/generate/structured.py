"""Answers of a given form: a JSON schema, or a grammar, as a logits processor (llguidance)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import llguidance
import mlx.core as mx
import numpy as np
from llguidance import LLMatcher, LLTokenizer
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..errors import GrammarError

# As `json.dumps` writes it. Where any whitespace is allowed, a small model may write nothing else.
_SEPARATORS: dict[str, Any] = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
}
_HARMONY_START = "<|channel|>final<|message|>"


class Grammars:
    """Compiles what answers must look like, for one tokenizer.

    Args:
        tokenizer: from ``mlxfuse.load`` or ``mlx_lm.load``.
    """

    def __init__(self, tokenizer: TokenizerWrapper) -> None:
        self._tokenizer = tokenizer
        self._vocabulary: LLTokenizer | None = None

    def json_schema(self, schema: object, *, lenient: bool = False, **how: bool) -> Constraint:
        """Answers that are JSON valid against ``schema``.

        Args:
            lenient: ignore keywords that are not supported.
            how: arguments of `Constraint`.

        Raises:
            GrammarError: it is no schema, nothing satisfies it, or a keyword is not supported.
        """
        options: Any = {**_SEPARATORS, "lenient": lenient}
        try:
            text = LLMatcher.grammar_from_json_schema(json.dumps(schema), defaults=options)
        except (ValueError, TypeError, RecursionError) as error:
            raise GrammarError(f"the JSON schema cannot be followed: {error}") from None
        return self._compile(text, "JSON schema", how)

    def grammar(self, text: str, **how: bool) -> Constraint:
        """Answers that a grammar in llama.cpp's GBNF or in Lark's form derives.

        Raises:
            GrammarError: it is neither, or derives nothing.
        """
        try:
            compiled = llguidance.grammar_from("grammar", text)
        except (ValueError, RecursionError) as error:
            raise GrammarError(f"the grammar cannot be read: {error}") from None
        return self._compile(compiled, "grammar", how)

    def _compile(self, text: str, what: str, how: dict[str, bool]) -> Constraint:
        if self._vocabulary is None:
            self._vocabulary = _vocabulary(self._tokenizer)
        matcher = LLMatcher(self._vocabulary, text, log_level=0)
        possible = not matcher.is_error() and any(matcher.compute_bitmask())
        if not possible or matcher.is_error():
            why = matcher.get_error() or "no token can begin it"
            raise GrammarError(f"the {what} cannot be followed: {why}")
        return Constraint(matcher, self._tokenizer, **how)


class Constraint:
    """A logits processor for one answer: what cannot go on the grammar gets -inf.

    A model that reasons does so freely first: the grammar begins behind the end of its reasoning,
    and until then the answer cannot end.

    Args:
        reasoning: the prompt ends inside a reasoning.
        tools: the answer may be a tool call in the place of what the grammar derives.
        plain: the answer has no reasoning.
    """

    def __init__(
        self,
        matcher: LLMatcher,
        tokenizer: TokenizerWrapper,
        *,
        reasoning: bool = False,
        tools: bool = False,
        plain: bool = False,
    ) -> None:
        self._matcher = matcher
        self._prompt: int | None = None
        self._ends = [] if tools else sorted(tokenizer.eos_token_ids)
        self._think: int | None = None  # the token that may begin a reasoning
        self._tool: int | None = None  # and a tool call
        self._trigger: list[int] = []  # behind which the grammar begins
        if not plain and tokenizer.response_initial_state == "header":
            self._trigger = tokenizer.encode(_HARMONY_START, add_special_tokens=False)
            reasoning = True
        elif not plain and tokenizer.has_thinking:
            self._trigger = list(tokenizer.think_end_tokens)
            start = tokenizer.think_start_tokens
            self._think = start[0] if len(start) == 1 else None
        if tools and len(tokenizer.tool_call_start_tokens or ()) == 1:
            self._tool = tokenizer.tool_call_start_tokens[0]
        self._first = "free" if reasoning and self._trigger else "begin"
        self._restart()

    def copy(self) -> Constraint:
        """The same, at its beginning, for another answer."""
        made: Constraint = object.__new__(type(self))
        made.__dict__ |= self.__dict__ | {"_matcher": self._matcher.deep_copy(), "_prompt": None}
        made._restart()
        return made

    def __call__(self, tokens: mx.array, logits: mx.array) -> mx.array:
        """Called with all tokens so far and the logits [1, vocabulary] of the next."""
        if self._prompt is None:
            self._prompt = tokens.size
        self._follow(tokens)
        if self._state == "tool":
            return logits
        mx.async_eval(logits)  # the mask is made meanwhile
        size = logits.shape[-1]
        if self._state == "free":
            allowed = np.ones(size, bool)
            allowed[[i for i in self._ends if i < size]] = False
        else:
            bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
            found = np.unpackbits(bits, bitorder="little")[:size]
            allowed = np.zeros(size, bool)
            allowed[: found.size] = found
        if self._state == "begin":
            for other in (self._tool, None if self._seen else self._think):
                if other is not None:
                    allowed[other] = True
        return mx.where(mx.array(allowed), logits, -mx.inf)

    def _follow(self, tokens: mx.array) -> None:
        """Bring the matcher to ``tokens``, which may have lost what was drafted in vain."""
        assert self._prompt is not None
        count = tokens.size - self._prompt
        if count == len(self._seen) + 1:
            last: Any = tokens[-1].item()
            self._advance(last)
            return
        found: Any = tokens[self._prompt :].tolist() if count else []
        same = len(self._seen)
        if found[:same] != self._seen:
            pairs = enumerate(zip(found, self._seen, strict=False))
            same = next((i for i, (a, b) in pairs if a != b), min(count, same))
            self._take_back(len(self._seen) - same)
        for token in found[same:]:
            self._advance(token)

    def _take_back(self, count: int) -> None:
        """Forget the last ``count`` tokens."""
        dropped = self._past[-count:]
        self._state = dropped[0][0]
        if consumed := sum(read for _, read in dropped):
            self._matcher.rollback(consumed)
        del self._seen[-count:], self._past[-count:]

    def _restart(self) -> None:
        self._matcher.reset()
        self._seen: list[int] = []
        # For each token that was seen: the state before it, and whether the matcher read it.
        self._past: list[tuple[str, bool]] = []
        self._state = self._first

    def _advance(self, token: int) -> None:
        before, read = self._state, False
        self._seen.append(token)
        if before == "free":
            if self._seen[-len(self._trigger) :] == self._trigger:
                self._state = "begin"
        elif before == "begin" and token == self._tool:
            self._state = "tool"
        elif before == "begin" and token == self._think and len(self._seen) == 1:
            self._state = "free"
        elif before != "tool" and not self._matcher.is_stopped():
            self._state, read = "grammar", True
            self._matcher.consume_token(token)
            if self._matcher.is_error():
                raise GrammarError(f"the grammar is too complex: {self._matcher.get_error()}")
        self._past.append((before, read))


class _Vocabulary:
    """A GGUF file's tokenizer as llguidance takes one."""

    is_tokenizer_wrapper = True

    def __init__(self, tokenizer: TokenizerWrapper) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id, self.bos_token_id = tokenizer.eos_token_id, tokenizer.bos_token_id
        self.tokens: Sequence[bytes] = tokenizer.pieces
        self.special_token_ids = sorted(tokenizer.hidden)

    def __call__(self, text: str | bytes) -> list[int]:
        if isinstance(text, bytes):
            text = text.decode("utf-8", "replace")
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False)
        return ids


def _vocabulary(tokenizer: TokenizerWrapper) -> LLTokenizer:
    ends = sorted(tokenizer.eos_token_ids)
    if hasattr(tokenizer, "pieces"):
        return LLTokenizer(_Vocabulary(tokenizer), eos_token=ends)  # type: ignore[arg-type]
    from llguidance.hf import from_tokenizer

    return from_tokenizer(tokenizer._tokenizer, eos_token=ends)


def read_schema(text: str) -> Mapping[str, Any]:
    """The JSON object in ``text``.

    Raises:
        GrammarError: it is none.
    """
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise GrammarError(f"the JSON schema is not JSON: {error}") from None
    if not isinstance(schema, dict):
        raise GrammarError(f"expected a JSON schema, an object; found {type(schema).__name__}")
    return schema
