"""What the engine is asked to generate, and within which limits."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

from ..generate.sampling import Sampling
from ..memory import machine
from .sampling import Sampler
from .text import Echo, Piece, StreamedText

Event = Piece | Exception


class EngineError(RuntimeError):
    """Generation failed, through no fault of the request."""


@dataclass(slots=True)
class Job:
    """One answer to generate.

    prompt      token ids within the vocabulary, at least one.
    max_tokens  0: the prompt alone.
    sampling    how tokens are chosen, but for its penalties, stops and seed.
    seed        as for `make_sampler`.
    processors  MLX-LM's logits processors, of this job only.
    stops       strings before which the answer ends.
    top         most likely tokens to tell of each token; None: nothing about probabilities.
    boundaries  tokens of the prompt up to the end of a message -> ``system`` or ``user``.
    echo        the prompt comes first, and with ``top`` also what its tokens cost.
    deliver     is called in the engine's thread, with an exception or the piece that has
                ``finish`` last.
    """

    prompt: list[int]
    max_tokens: int
    deliver: Callable[[Event], None]
    sampling: Sampling = field(default_factory=Sampling)
    seed: int | None = None
    processors: Sequence[Any] = ()
    stops: Sequence[str] = ()
    top: int | None = None
    boundaries: Mapping[int, str] = field(default_factory=dict)
    echo: Echo | None = None
    cancelled: bool = False
    # The engine's own.
    uid: int = -1
    like: int = -1
    sampler: Sampler | None = None
    text: StreamedText | None = None
    count: int = 0
    cached: int = 0
    failure: Exception | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How much is done at a time, and kept."""

    decode_concurrency: int = 32
    prompt_concurrency: int = 8
    prefill_step_size: int = 2048
    prompt_caches: int = 10
    prompt_cache_bytes: int = 1 << 63


def memory_left() -> int:
    """Bytes that the model leaves of what this machine has for it and its caches."""
    # Elsewhere what MLX holds is not available, so it is counted already.
    held = mx.get_active_memory() if sys.platform == "darwin" else 0
    return max(0, machine().budget - held)
