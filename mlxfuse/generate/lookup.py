"""Prompt look-up decoding: tokens are drafted from what the text said before, without a second
model, and several are checked in one forward pass.

Saxena, Prompt Lookup Decoding (2023): where the last few tokens occurred before, what followed
them there is likely to follow again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, cast

import mlx.core as mx
from mlx_lm.generate import (
    GenerationResponse,
    generation_stream,
    maybe_quantize_kv_cache,
    wired_limit,
)
from mlx_lm.models.cache import trim_prompt_cache
from mlx_lm.tokenizer_utils import TokenizerWrapper

# Lengths of the token sequences that are looked up, the most telling first.
_LENGTHS = (3, 2)
Sampler = Callable[[mx.array], mx.array]


class Index:
    """Where each sequence of tokens occurred last, and so what may come next."""

    def __init__(self, tokens: Iterable[int] = ()) -> None:
        self._tokens: list[int] = []
        self._ends: dict[tuple[int, ...], int] = {}
        for token in tokens:
            self.add(token)

    def add(self, token: int) -> None:
        """The text goes on with a token."""
        # The sequences that ended before it are known from now on: what follows them is.
        for length in _LENGTHS:
            if len(self._tokens) >= length:
                self._ends[tuple(self._tokens[-length:])] = len(self._tokens)
        self._tokens.append(token)

    def draft(self, count: int) -> list[int]:
        """At most ``count`` tokens that followed the last ones where they occurred before."""
        for length in _LENGTHS:
            at = self._ends.get(tuple(self._tokens[-length:]))
            if at is not None and len(self._tokens) >= length:
                return self._tokens[at : at + count]
        return []


def stream(
    model: Any,
    tokenizer: TokenizerWrapper,
    prompt: list[int],
    *,
    prompt_cache: list[Any],
    max_tokens: int,
    num_draft_tokens: int,
    sampler: Sampler,
    logits_processors: list[Any],
    prefill_step_size: int = 2048,
    prompt_progress_callback: Callable[[int, int], None] | None = None,
    **quantization: Any,
) -> Iterator[GenerationResponse]:
    """As mlx-lm's ``stream_generate``, with drafts: at temperature 0 the same tokens.

    Args:
        prompt: ids of what the cache does not hold yet.
        prompt_cache: must be able to take tokens back; where it no longer can, nothing is drafted.
        num_draft_tokens: checked at a time, at most; kernels take up to 7 well.
        quantization: mlx-lm's ``kv_bits`` and ``quantized_kv_start``.
    """
    steps = _Steps(model, prompt_cache, sampler, logits_processors, quantization)
    detokenizer, index = tokenizer.detokenizer, Index(prompt)
    start = time.perf_counter()
    with wired_limit(model, [generation_stream]), mx.stream(generation_stream):
        token = steps.read(prompt, prefill_step_size, prompt_progress_callback)
        told = {"prompt_tokens": len(prompt), "prompt_tps": len(prompt) / _since(start)}
        start, count, pending = time.perf_counter(), 0, [(token, False)]
        while True:
            token, drafted = pending.pop(0)
            count += 1
            ended = token in tokenizer.eos_token_ids
            reason = "stop" if ended else "length" if count == max_tokens else None
            if not ended:
                detokenizer.add_token(token)
            if reason is not None:
                detokenizer.finalize()
            yield GenerationResponse(
                text=detokenizer.last_segment,
                token=token,
                logprobs=steps.logprobs,
                from_draft=drafted,
                generation_tokens=count,
                generation_tps=count / _since(start),
                peak_memory=mx.get_peak_memory() / 1e9,
                finish_reason=reason,
                **told,
            )
            if reason is not None:
                # Tokens that were read behind the last one are no part of the text.
                steps.forget(sum(drafted for _, drafted in pending))
                return
            index.add(token)
            if not pending:
                left = num_draft_tokens if max_tokens < 0 else max_tokens - count - 1
                room = steps.room(min(num_draft_tokens, left))
                pending = steps.go_on(token, index.draft(room))


def _since(start: float) -> float:
    return max(time.perf_counter() - start, 1e-9)


class _Steps:
    """Forward passes of a model over a cache."""

    def __init__(
        self,
        model: Any,
        cache: list[Any],
        sampler: Sampler,
        processors: list[Any],
        quantization: dict[str, Any],
    ) -> None:
        self._model, self._cache, self._sampler = model, cache, sampler
        self._processors = processors
        self._seen: list[int] = []
        self._quantization = {"kv_group_size": 64, "kv_bits": None, "quantized_kv_start": 0}
        self._quantization |= quantization
        self.logprobs = mx.array(0.0)

    def read(
        self, prompt: list[int], step: int, progress: Callable[[int, int], None] | None
    ) -> int:
        """Read the prompt and choose the token behind it."""
        done, told = 0, progress or (lambda done, total: None)
        told(0, len(prompt))
        while len(prompt) - done > 1:
            part = prompt[done : min(done + step, len(prompt) - 1)]
            self._logits(part)
            mx.eval([c.state for c in self._cache])
            done += len(part)
            told(done, len(prompt))
            mx.clear_cache()
        self._seen = prompt[:-1]
        ((token, _),) = self.go_on(prompt[-1], [])
        told(len(prompt), len(prompt))
        return token

    def go_on(self, token: int, draft: list[int]) -> list[tuple[int, bool]]:
        """The tokens behind ``token``, and whether each was drafted; the last one was not."""
        logits = self._logits([token, *draft])
        found: list[tuple[int, bool]] = []
        for i, guess in enumerate([*draft, None]):
            self._seen.append([token, *draft][i])
            chosen = self._choose(logits[:, i, :])
            found.append((chosen, chosen == guess))
            if chosen != guess:
                break
        surplus = len(draft) + 1 - len(found)
        if surplus:
            trim_prompt_cache(self._cache, surplus)
        return found

    def forget(self, count: int) -> None:
        """Take back what was read of tokens that were accepted and are not wanted."""
        if count:
            trim_prompt_cache(self._cache, count)

    def room(self, wanted: int) -> int:
        """How many of ``wanted`` tokens the caches could take back again."""
        for cache in self._cache:
            size = getattr(cache, "max_size", None) or getattr(cache, "window", None)
            if not cache.is_trimmable():
                return 0
            if size is not None:
                wanted = min(wanted, size - cache.offset - 1)
        return max(wanted, 0)

    def _logits(self, tokens: list[int]) -> mx.array:
        logits: mx.array = self._model(mx.array([tokens]), cache=self._cache)
        maybe_quantize_kv_cache(self._cache, **self._quantization)
        return logits

    def _choose(self, logits: mx.array) -> int:
        for processor in self._processors:
            logits = processor(mx.array(self._seen), logits)
        self.logprobs = logits - mx.logsumexp(logits, keepdims=True)
        return int(cast(int, self._sampler(self.logprobs).item()))
