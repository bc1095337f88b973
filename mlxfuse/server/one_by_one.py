"""One sequence at a time, behind the methods of MLX-LM's ``BatchGenerator`` that the engine uses:
for a draft model, and for caches that cannot be put together."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
from mlx_lm.generate import (
    GenerationBatch,
    PromptProcessingBatch,
    generate_step,
    speculative_generate_step,
)
from mlx_lm.models.cache import make_prompt_cache

from ..generate.run import level


@dataclass(slots=True)
class _Sequence:
    uid: int
    rest: list[int]
    max_tokens: int
    cache: list[Any]
    tokens: list[int]
    sampler: Callable[[mx.array], mx.array]
    processors: list[Any]
    matcher: Any
    steps: Iterator[Any] | None = None
    count: int = field(default=0)


class Removed(Exception):
    """A sequence was removed while its prompt was read."""


class OneByOne:
    """Generates for the sequences that were inserted, one after the other.

    Args:
        draft: a smaller model with the same vocabulary, for speculative decoding.
        num_draft_tokens: how many tokens it drafts at a time.
        options: more arguments of ``generate_step``.
        removed: whether the sequence with this uid is no longer wanted.
    """

    def __init__(
        self,
        model: Any,
        *,
        draft: Any = None,
        num_draft_tokens: int = 3,
        options: dict[str, Any],
        removed: Callable[[int], bool],
    ) -> None:
        self._models = [model] if draft is None else [model, draft]
        self._draft_tokens, self._options, self._removed = num_draft_tokens, options, removed
        self._waiting: deque[_Sequence] = deque()
        self._current: _Sequence | None = None
        self._uid = 0
        self._stream = mx.default_stream(mx.default_device())

    def insert_segments(
        self,
        segments: list[list[list[int]]],
        max_tokens: list[int],
        caches: list[list[Any] | None],
        all_tokens: list[list[int]],
        samplers: list[Any],
        logits_processors: list[list[Any]],
        stop_sequences: list[Any],
    ) -> list[int]:
        """As ``BatchGenerator``'s, for one sequence."""
        self._uid += 1
        rest = [token for segment in segments[0] for token in segment]
        cache = caches[0]
        if cache is None:
            cache = [c for model in self._models for c in make_prompt_cache(model)]
        self._waiting.append(
            _Sequence(
                self._uid,
                rest,
                max_tokens[0],
                cache,
                list(all_tokens[0]),
                samplers[0],
                logits_processors[0],
                stop_sequences[0].matcher(),
            )
        )
        return [self._uid]

    def next(self) -> tuple[list[Any], list[Any]]:
        """A token of the sequence at work; nothing where none is left."""
        if self._current is None:
            if not self._waiting:
                return [], []
            self._current = self._waiting.popleft()
            self._current.steps = self._steps(self._current)
            self._current.tokens += self._current.rest
        at = self._current
        assert at.steps is not None
        try:
            token, logprobs = next(at.steps)
        except Removed:
            return [PromptProcessingBatch.Response(at.uid, (0, 0), False, False)], []
        at.count += 1
        at.tokens.append(token)
        reason = "length" if at.count >= at.max_tokens else None
        if at.matcher.advance(token):
            reason = "stop"
        cache, tokens = None, None
        if reason is not None:
            cache, tokens = self._finished(at)
        return [], [GenerationBatch.Response(at.uid, token, logprobs, reason, cache, tokens)]

    def _steps(self, at: _Sequence) -> Iterator[Any]:
        def progress(done: int, total: int) -> None:
            if self._removed(at.uid):
                raise Removed

        how: dict[str, Any] = {
            "max_tokens": at.max_tokens,
            "sampler": at.sampler,
            "logits_processors": at.processors,
            "prompt_cache": at.cache,
            **self._options,
        }
        prompt = mx.array(at.rest, mx.uint32)
        if len(self._models) == 1:
            how["prompt_progress_callback"] = progress
            return iter(generate_step(prompt, *self._models, self._stream, **how))
        how["num_draft_tokens"] = self._draft_tokens
        drafted = speculative_generate_step(prompt, *self._models, self._stream, **how)
        return ((token, logprobs) for token, logprobs, _ in drafted)

    def _finished(self, at: _Sequence) -> tuple[list[Any], list[int]]:
        """The caches, brought to the same length, and the tokens they hold."""
        at.steps, self._current = None, None  # ends the generator, which takes its drafts back
        if len(self._models) > 1:
            return at.cache, at.tokens[: level(at.cache)]
        offsets = (n for c in at.cache if (n := getattr(c, "offset", None)) is not None)
        return at.cache, at.tokens[: min(offsets, default=len(at.tokens))]

    def extract_cache(self, uids: list[int]) -> dict[int, Any]:
        """The cache and tokens of the sequence at work, which ends."""
        at = self._current
        return {at.uid: self._finished(at)} if at is not None and at.uid in uids else {}

    def remove(self, uids: list[int]) -> None:
        """Forget these sequences."""
        self._waiting = deque(s for s in self._waiting if s.uid not in uids)
        if self._current is not None and self._current.uid in uids:
            self._current = None

    @property
    def prompt_cache_nbytes(self) -> int:
        """Bytes of the caches at work."""
        at = self._current
        return 0 if at is None else sum(c.nbytes for c in at.cache)
