"""What tokens cost: log-probabilities of those that were generated, and of a prompt's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache

from .sampling import finite
from .text import Echo, Token

_LOGITS = 1 << 25  # float32 numbers of a step


def told(logprobs: mx.array, tokens: Sequence[int], top: int | None) -> list[Token]:
    """``tokens``, each with what it cost and the ``top`` most likely ones in its place.

    Args:
        logprobs: [tokens, vocabulary], of any float type.
        top: None for nothing of probabilities.
    """
    if top is None:
        return [Token(token) for token in tokens]
    top = min(top, logprobs.shape[-1] - 1)
    own = mx.take_along_axis(logprobs, mx.array(list(tokens))[:, None], axis=-1)
    best = mx.argpartition(-logprobs, top, axis=-1)[:, :top]
    costs = mx.take_along_axis(logprobs, best, axis=-1).astype(mx.float32)
    found: list[Token] = []
    rows: Any = (tokens, own[:, 0].astype(mx.float32).tolist(), best.tolist(), costs.tolist())
    for token, cost, ids, each in zip(*rows, strict=True):
        pairs = sorted(zip(ids, map(finite, each), strict=True), key=lambda pair: -pair[1])
        found.append(Token(token, logprob=finite(cost), top=tuple(pairs)))
    return found


class Scoring:
    """Reads a prompt for what its tokens cost, some at a time.

    ``tokens`` are those that are read so far, and ``cache`` holds all of them but the last.

    Args:
        prompt: token ids, at least one.
        top: as for `told`.
        echo: where in the text the tokens are.
    """

    def __init__(self, model: Any, prompt: Sequence[int], top: int, echo: Echo) -> None:
        self._model, self._prompt, self._top, self._echo = model, prompt, top, echo
        self._step = 16  # until the size of the vocabulary is known
        self.cache = make_prompt_cache(model)
        self.tokens = [Token(prompt[0], logprob=None)]

    def step(self) -> bool:
        """Read on; whether all is read."""
        start = len(self.tokens) - 1
        stop = min(start + self._step, len(self._prompt) - 1)
        if start < stop:
            logits = self._model(mx.array([self._prompt[start:stop]]), cache=self.cache)[0]
            logits = logits.astype(mx.float32)
            self._step = max(1, _LOGITS // logits.shape[-1])
            logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
            tokens = told(logprobs, self._prompt[start + 1 : stop + 1], self._top)
            offsets = self._echo.offsets[start + 1 : stop + 1]
            found = zip(tokens, offsets, strict=True)
            self.tokens += [replace(token, at=at) for token, at in found]
            mx.eval([c.state for c in self.cache])
            mx.clear_cache()
        return stop == len(self._prompt) - 1
