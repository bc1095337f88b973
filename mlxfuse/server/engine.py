"""The thread that generates: MLX-LM's continuous batching, kept alive whatever a request does."""

from __future__ import annotations

import itertools
import logging
import queue
import random
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
from mlx_lm.generate import BatchGenerator, StopSequences
from mlx_lm.models.cache import KVCache, LRUPromptCache, make_prompt_cache
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..generate.sampling import Sampling
from ..memory import machine
from ..nn.kv.cache import CompressedKVCache
from .one_by_one import OneByOne
from .sampling import Sampler, make_sampler
from .scoring import Scoring, told
from .text import Echo, Piece, StreamedText

log = logging.getLogger(__name__)

Event = Piece | Exception
_KEY = "model"  # LRUPromptCache keeps caches of several


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


class Engine:
    """Generates for the jobs that were submitted, together where the model's caches allow it.

    A job whose processor fails ends alone. Where generation itself fails, all that run get an
    `EngineError`, and a new batch begins if the model still computes; else ``on_death`` is called
    and nothing more is answered.

    Args:
        draft: a model for speculative decoding, with ``num_draft_tokens`` at a time.
        later: ``kv_bits`` and ``quantized_kv_start`` of caches that begin plain.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: TokenizerWrapper,
        limits: Limits,
        *,
        draft: Any = None,
        num_draft_tokens: int = 3,
        later: dict[str, Any] | None = None,
        on_death: Callable[[], None] = lambda: None,
    ) -> None:
        self._model, self._tokenizer, self._limits = model, tokenizer, limits
        self._draft, self._num_draft_tokens, self._later = draft, num_draft_tokens, later or {}
        self._on_death = on_death
        mx.eval(model.parameters())  # what is lazy belongs to this thread
        fresh = make_prompt_cache(model)
        mergeable = all(hasattr(cache, "merge") for cache in fresh)
        self._batches = mergeable and draft is None and not later
        # Caches that can always be cut need no copies at the boundaries of messages.
        self._cuttable = all(
            isinstance(c, KVCache) or (isinstance(c, CompressedKVCache) and c.window is None)
            for c in fresh
        )
        self._ends = StopSequences([(token,) for token in tokenizer.eos_token_ids])
        self._inbox: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._jobs: dict[int, Job] = {}
        self._scoring: dict[int, Scoring] = {}  # of jobs with numbers below 0
        self._samplers: dict[tuple[float, ...], Sampler] = {}
        newline = tokenizer.encode("\n", add_special_tokens=False)
        self._protected = [*newline, *sorted(tokenizer.eos_token_ids)]
        self._cache = self._new_cache()
        self._closing = False
        self.failure: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="mlxfuse-engine", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether jobs are still answered."""
        return self.failure is None and self._thread.is_alive() and not self._closing

    @property
    def needs_boundaries(self) -> bool:
        """Whether the caches at the ends of messages are kept, as they cannot be made shorter."""
        return not self._cuttable

    @property
    def running(self) -> int:
        """Answers that are being generated or wait for it."""
        return len(self._jobs) + self._inbox.qsize()

    def submit(self, *jobs: Job) -> None:
        """Begin ``jobs``; what comes of them is delivered."""
        for job in jobs:
            self._inbox.put(job)
            if not self.alive:
                self._refuse_waiting()

    def close(self) -> None:
        """End the thread; what still runs gets an error."""
        self._closing = True
        self._inbox.put(None)
        self._thread.join()

    # --- in the thread ----------------------------------------------------------------------

    def _run(self) -> None:
        mx.random.seed(random.getrandbits(63))
        while not self._closing:
            try:
                self._generate(self._new_batch())
            except Exception as error:  # whatever it is: the server outlives it
                log.exception("generation failed; starting it again")
                self._abandon(EngineError(f"generation failed: {error}"))
                try:
                    self._probe()
                except Exception as final:
                    log.exception("the model no longer computes")
                    self.failure = final
                    break
        self._abandon(EngineError("the server is shutting down"))
        # What the caches hold must go in the thread that made it.
        self._cache, self._samplers = self._new_cache(), {}
        if self.failure is not None:
            self._on_death()

    def _new_cache(self) -> LRUPromptCache:
        return LRUPromptCache(self._limits.prompt_caches, self._limits.prompt_cache_bytes)

    def _new_batch(self) -> Any:
        if not self._batches:
            return OneByOne(
                self._model,
                draft=self._draft,
                num_draft_tokens=self._num_draft_tokens,
                options={"prefill_step_size": self._limits.prefill_step_size, **self._later},
                removed=lambda uid: self._jobs[uid].cancelled or self._closing,
            )
        return BatchGenerator(
            self._model,
            completion_batch_size=self._limits.decode_concurrency,
            prefill_batch_size=self._limits.prompt_concurrency,
            prefill_step_size=self._limits.prefill_step_size,
            stream=mx.default_stream(mx.default_device()),
        )

    def _probe(self) -> None:
        """Raise unless the model still computes."""
        self._cache, self._samplers = self._new_cache(), {}
        mx.clear_cache()
        mx.eval(self._model(mx.array([[0]]), cache=make_prompt_cache(self._model)))

    def _abandon(self, error: EngineError) -> None:
        jobs, self._jobs, self._scoring = self._jobs, {}, {}
        for job in jobs.values():
            job.deliver(error)
        if self._closing or self.failure is not None:
            self._refuse_waiting()

    def _refuse_waiting(self) -> None:
        while True:
            try:
                job = self._inbox.get_nowait()
            except queue.Empty:
                return
            if job is not None:
                job.deliver(EngineError("the server is shutting down"))

    def _generate(self, batch: Any) -> None:
        while not self._closing:
            self._take(batch)
            if not self._jobs:
                continue
            self._score(batch)
            progress, generated = batch.next()
            for response in progress:
                if response.end_of_segment and not response.end_of_prompt:
                    self._keep_boundary(batch, response.uid)
            over = {r.uid for r in generated if self._advance(batch, r)}
            over |= {uid for uid, job in self._jobs.items() if job.cancelled or job.failure}
            batch.remove(list(over))
            for uid in over:
                job = self._jobs.pop(uid)
                self._scoring.pop(uid, None)
                if job.failure is not None:
                    job.deliver(job.failure)

    def _take(self, batch: Any) -> None:
        """Begin what waits; sleep where nothing is to be done."""
        while True:
            try:
                job = self._inbox.get(block=not self._jobs)
            except queue.Empty:
                return
            if job is None:
                return
            if job.cancelled:
                continue
            if job.echo is not None and job.top is not None:
                uid = min(self._scoring, default=0) - 1
                self._jobs[uid] = job
                self._scoring[uid] = Scoring(self._model, job.prompt, job.top, job.echo)
                continue
            self._try_to_begin(batch, job)

    def _score(self, batch: Any) -> None:
        """Read on in the first of the prompts whose tokens are to be told of."""
        for uid, scoring in itertools.islice(self._scoring.items(), 1):
            if scoring.step():
                job = self._jobs.pop(uid)
                del self._scoring[uid]
                self._try_to_begin(batch, job, scoring)
                return

    def _try_to_begin(self, batch: Any, job: Job, scored: Scoring | None = None) -> None:
        try:
            if job.echo is not None or not job.max_tokens:
                text = "" if job.echo is None else job.echo.text
                tokens = () if scored is None else tuple(scored.tokens)
                job.deliver(Piece(text, tokens, None if job.max_tokens else "length"))
            if job.max_tokens:
                self._begin(batch, job, scored)
        except Exception as error:  # it is in no batch yet: nothing else is touched
            log.exception("a request could not begin")
            job.deliver(EngineError(f"the request could not begin: {error}"))

    def _begin(self, batch: Any, job: Job, scored: Scoring | None) -> None:
        prompt, cache, held = job.prompt, None, 0
        # One token at least is left to be read.
        if scored is not None and self._draft is None:
            cache, held = scored.cache, len(prompt) - 1
        elif len(prompt) > 1:
            cache, rest = self._cache.fetch_nearest_cache(_KEY, prompt[:-1])
            job.cached = held = len(prompt) - 1 - len(rest)
        cuts = [] if self._cuttable else sorted(job.boundaries)
        edges = [held, *(b for b in cuts if held < b < len(prompt)), len(prompt)]
        sampler = self._sampler(job)
        begun = 0 if job.echo is None else len(job.echo.text)
        job.text = StreamedText(self._tokenizer.detokenizer, job.stops, begun)
        (uid,) = batch.insert_segments(
            segments=[[prompt[a:b] for a, b in itertools.pairwise(edges)]],
            max_tokens=[job.max_tokens],
            caches=[cache],
            all_tokens=[prompt[:held]],
            samplers=[sampler],
            logits_processors=[[_guarded(job, p) for p in job.processors]],
            stop_sequences=[self._ends],
        )
        self._jobs[uid] = job
        left = self._limits.prompt_cache_bytes - batch.prompt_cache_nbytes
        self._cache.trim_to(n_bytes=left)

    def _sampler(self, job: Job) -> Sampler:
        made = make_sampler(job.sampling, self._protected, job.seed)
        if job.seed is not None:
            return made
        # Jobs that share a sampler are sampled in one call.
        if len(self._samplers) > 64:
            self._samplers.clear()
        s = job.sampling
        key = (s.temp, s.top_p, s.top_k, s.min_p, s.min_tokens_to_keep)
        return self._samplers.setdefault((*key, s.xtc_probability, s.xtc_threshold), made)

    def _keep_boundary(self, batch: Any, uid: int) -> None:
        boundaries = self._jobs[uid].boundaries
        if self._cuttable or not boundaries:
            return
        for cache, tokens in batch.extract_cache([uid]).values():
            if kind := boundaries.get(len(tokens)):
                self._keep(tokens, cache, kind)

    def _keep(self, tokens: list[int], cache: list[Any], kind: str = "assistant") -> None:
        # A cache that is not evaluated holds on to the whole batch's.
        mx.eval([c.state for c in cache])
        self._cache.insert_cache(_KEY, tokens[:], cache, cache_type=kind)

    def _advance(self, batch: Any, response: Any) -> bool:
        """Deliver a token; whether it was the last."""
        job = self._jobs[response.uid]
        if job.cancelled or job.failure:
            return False
        assert job.text is not None
        job.count += 1
        reason = response.finish_reason
        (token,) = told(response.logprobs[None], [response.token], job.top)
        text, tokens, stop = job.text.add(token, reason)
        if stop is not None and reason is None:
            for cache, held in batch.extract_cache([response.uid]).values():
                self._keep(held, cache)
        elif reason is not None:
            self._keep(response.all_tokens, response.prompt_cache)
        finish = "stop" if stop is not None else reason
        if text or tokens or finish or job.count == 1:
            job.deliver(Piece(text, tokens, finish, stop, job.count, job.cached))
        return finish is not None


def memory_left() -> int:
    """Bytes that the model leaves of what this machine has for it and its caches."""
    # Elsewhere what MLX holds is not available, so it is counted already.
    held = mx.get_active_memory() if sys.platform == "darwin" else 0
    return max(0, machine().budget - held)


def _guarded(job: Job, processor: Any) -> Any:
    def process(tokens: mx.array, logits: mx.array) -> mx.array:
        try:
            result: mx.array = processor(tokens, logits)
        except Exception as error:  # ends its own request, and not those in the same batch
            job.failure = job.failure or error
            return logits
        return result

    return process
