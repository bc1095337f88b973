"""How a token is chosen: MLX-LM's filters, with random numbers of each request's own."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence

import mlx.core as mx
from mlx_lm.sample_utils import apply_min_p, apply_top_k, apply_top_p, apply_xtc, greedy_sampler

from ..generate.sampling import Sampling

Sampler = Callable[[mx.array], mx.array]


def make_sampler(sampling: Sampling, protected: Sequence[int], seed: int | None) -> Sampler:
    """A sampler of log-probabilities [rows, vocabulary], to be made in the thread that uses it.

    Args:
        sampling: ``top_k`` is below the size of the vocabulary.
        protected: tokens that XTC never removes.
        seed: from 0 to 2**64 - 1: the tokens depend on nothing but the log-probabilities and it.
    """
    if sampling.temp < 1e-5 or sampling.top_p <= 0:
        greedy: Sampler = greedy_sampler
        return greedy
    return _Seeded(sampling, list(protected), random.getrandbits(64) if seed is None else seed)


class _Seeded:
    def __init__(self, sampling: Sampling, protected: list[int], seed: int) -> None:
        self._sampling, self._protected = sampling, protected
        self._key = mx.random.key(seed)
        self._coin = random.Random(seed)

    def __call__(self, logprobs: mx.array) -> mx.array:
        s = self._sampling
        logprobs = logprobs.astype(mx.float32)
        if s.top_p < 1:
            logprobs = apply_top_p(logprobs, s.top_p)
        if s.min_p > 0:
            logprobs = apply_min_p(logprobs, s.min_p, s.min_tokens_to_keep)
        # MLX-LM would toss the coin with random numbers that all requests share.
        if s.xtc_probability > self._coin.random():
            logprobs = apply_xtc(logprobs, 1.0, s.xtc_threshold, self._protected)
        if s.top_k > 0:
            logprobs = apply_top_k(logprobs, s.top_k)
        self._key, key = mx.random.split(self._key)
        return mx.random.categorical(logprobs * (1.0 / s.temp), key=key)


def finite(logprob: float) -> float:
    """A log-probability as JSON can hold it: OpenAI's -9999 for what is impossible."""
    return logprob if math.isfinite(logprob) else -9999.0
