"""What the engine is asked to generate."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..generate.sampling import Sampling
from .sampling import Sampler
from .text import Piece, StreamedText

Event = Piece | Exception


class EngineError(RuntimeError):
    """Generation failed, through no fault of the request."""


@dataclass(slots=True)
class Job:
    """One answer to generate.

    prompt      token ids within the vocabulary, at least one.
    max_tokens  at least 1.
    sampling    how tokens are chosen, but for its penalties, stops and seed.
    seed        as for `make_sampler`.
    processors  MLX-LM's logits processors, of this job only.
    stops       strings before which the answer ends.
    top         most likely tokens to tell of each token; None: nothing about probabilities.
    boundaries  tokens of the prompt up to the end of a message -> ``system`` or ``user``.
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
    cancelled: bool = False
    # The engine's own.
    uid: int = -1
    like: int = -1
    sampler: Sampler | None = None
    text: StreamedText | None = None
    count: int = 0
    cached: int = 0
    failure: Exception | None = None
