"""The thread that generates: MLX-LM's continuous batching, kept alive whatever a request does."""

from __future__ import annotations

import itertools
import logging
import queue
import random
import threading
from collections.abc import Callable
from typing import Any

import mlx.core as mx
from mlx_lm.generate import BatchGenerator, StopSequences
from mlx_lm.models.cache import KVCache, LRUPromptCache, make_prompt_cache
from mlx_lm.sample_utils import greedy_sampler
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..errors import MLXFuseError
from ..nn.kv.cache import CompressedKVCache
from ..ranks import Ranks, agreed
from . import turns
from .jobs import EngineError, Job, Limits
from .one_by_one import OneByOne
from .sampling import Sampler, make_sampler
from .scoring import Scoring, told
from .text import Piece, StreamedText
from .turns import Turn

log = logging.getLogger(__name__)

_KEY = "model"  # LRUPromptCache keeps caches of several


class Engine:
    """Generates for the jobs that were submitted, together where the model's caches allow it.

    A job whose processor fails ends alone. Where generation itself fails, all that run get an
    `EngineError`, and a new batch begins if the model still computes; else ``on_death`` is called
    and nothing more is answered.

    Args:
        draft: a model for speculative decoding, with ``num_draft_tokens`` at a time.
        later: ``kv_bits`` and ``quantized_kv_start`` of caches that begin plain.
        team: the ranks that hold the model together, each with an engine. Jobs are submitted to
            rank 0's; the others do the same steps. A failure of generation ends all.
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
        team: Ranks | None = None,
    ) -> None:
        self._team = team
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
        self._grown = False  # whether the prompt caches may be more than is to be kept
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
        self.wait()

    def wait(self) -> None:
        """Return when the thread has ended."""
        self._thread.join()

    def expect_alive(self) -> None:
        """Raise what ended the thread, if something did.

        Raises:
            MLXFuseError: the model no longer computes.
        """
        if self.failure is not None:
            raise MLXFuseError(f"the model no longer computes: {self.failure}")

    # --- in the thread ----------------------------------------------------------------------

    def _run(self) -> None:
        mx.random.seed(random.getrandbits(63))
        while not self._closing:
            try:
                self._generate(self._new_batch())
            except Exception as error:  # whatever it is: the server outlives it
                log.exception("generation failed; starting it again")
                try:
                    self._recover(error)
                except Exception as final:
                    log.exception("the model no longer computes")
                    self.failure = final
                    break
        if self._team is not None and self.failure is None:
            if self._team.first:
                turns.close(self._team)
            mx.synchronize()  # a step that nobody waits for still needs every rank
        self._abandon(EngineError("the server is shutting down"))
        # What the caches hold must go in the thread that made it.
        self._cache, self._samplers = self._new_cache(), {}
        if self.failure is not None:
            self._on_death()

    def _recover(self, error: Exception) -> None:
        """Answer what ran with an error; raise unless the model still computes, on one rank."""
        if self._team is not None:
            self._team.settle()  # it may be that another rank was lost
            raise error
        self._abandon(EngineError(f"generation failed: {error}"))
        self._cache, self._samplers = self._new_cache(), {}
        mx.clear_cache()
        mx.eval(self._model(mx.array([[0]]), cache=make_prompt_cache(self._model)))

    def _new_cache(self) -> LRUPromptCache:
        # Ranks hold caches of different sizes: rank 0 tells how many are kept.
        most = self._limits.prompt_cache_bytes if self._team is None else 1 << 63
        return LRUPromptCache(self._limits.prompt_caches, most)

    def _new_batch(self) -> Any:
        if not self._batches:
            return OneByOne(
                self._model,
                draft=self._draft,
                num_draft_tokens=self._num_draft_tokens,
                options={"prefill_step_size": self._limits.prefill_step_size, **self._later},
                removed=self._removed,
            )
        return BatchGenerator(
            self._model,
            completion_batch_size=self._limits.decode_concurrency,
            prefill_batch_size=self._limits.prompt_concurrency,
            prefill_step_size=self._limits.prefill_step_size,
            stream=mx.default_stream(mx.default_device()),
        )

    def _removed(self, uid: int) -> bool:
        """Whether a prompt need not be read to its end; several ranks stop between steps only."""
        return self._team is None and (self._jobs[uid].cancelled or self._closing)

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
            self._end(batch, [r.uid for r in generated if self._advance(batch, r)])

    def _end(self, batch: Any, over: list[int]) -> None:
        batch.remove(over)
        for uid in over:
            job = self._jobs.pop(uid)
            self._scoring.pop(uid, None)
            if job.failure is not None:
                job.deliver(job.failure)

    def _take(self, batch: Any) -> None:
        """End what is wanted no more and begin what waits; sleep where nothing is to be done."""
        if self._team is not None and not self._team.first:
            self._follow(batch, self._team)
            return
        waiting = self._waiting()
        dropped = [uid for uid, job in self._jobs.items() if job.cancelled or job.failure]
        self._end(batch, dropped)
        begun = [job for job in waiting if self._enter(batch, job)]
        if begun or self._grown:
            left = self._limits.prompt_cache_bytes - batch.prompt_cache_nbytes
            self._cache.trim_to(n_bytes=left)
            self._grown = False
        if self._team is not None:
            turns.tell(self._team, Turn(dropped, begun, len(self._cache)), self._jobs.values())

    def _waiting(self) -> list[Job]:
        found: list[Job] = []
        while True:
            try:
                job = self._inbox.get(block=not (self._jobs or found))
            except queue.Empty:
                return found
            if job is None:
                return found
            if not job.cancelled:
                found.append(job)

    def _follow(self, batch: Any, team: Ranks) -> None:
        """Do what rank 0 did in `_take`."""
        turn = turns.told(team)
        if turn is None:
            self._closing = True
            return
        self._end(batch, turn.dropped)
        for job in turn.begun:
            like = self._jobs.get(job.like)
            job.sampler = like.sampler if like else agreed(greedy_sampler, team.group)
            expected = job.uid, job.cached
            if not self._enter(batch, job) or (job.uid, job.cached) != expected:
                raise EngineError("the ranks have come to hold different conversations")
        self._cache.trim_to(n_sequences=turn.kept)

    def _enter(self, batch: Any, job: Job, scored: Scoring | None = None) -> bool:
        """Begin with a job; whether anything is left to be done for it."""
        try:
            if job.sampler is None:
                job.sampler = self._sampler(job)
            if scored is not None or job.echo is None or job.top is None:
                return self._begin(batch, job, scored)
            job.uid = min(self._scoring, default=0) - 1
            self._scoring[job.uid] = Scoring(self._model, job.prompt, job.top, job.echo)
            self._jobs[job.uid] = job
        except Exception as error:  # it is in no batch yet: nothing else is touched
            if scored is not None and self._team is not None:
                raise  # the other ranks have begun
            log.exception("a request could not begin")
            job.deliver(EngineError(f"the request could not begin: {error}"))
            return False
        return True

    def _score(self, batch: Any) -> None:
        """Read on in the first of the prompts whose tokens are to be told of."""
        for uid, scoring in itertools.islice(self._scoring.items(), 1):
            if scoring.step():
                job = self._jobs.pop(uid)
                del self._scoring[uid]
                self._enter(batch, job, scoring)
                return

    def _begin(self, batch: Any, job: Job, scored: Scoring | None) -> bool:
        """Generate for a job from the next step on, unless it wants its prompt alone."""
        if job.echo is not None or not job.max_tokens:
            text = "" if job.echo is None else job.echo.text
            tokens = () if scored is None else tuple(scored.tokens)
            job.deliver(Piece(text, tokens, None if job.max_tokens else "length"))
        if not job.max_tokens:
            return False
        prompt, cache, held = job.prompt, None, 0
        # One token at least is left to be read.
        if scored is not None and self._draft is None:
            cache, held = scored.cache, len(prompt) - 1
        elif len(prompt) > 1:
            cache, rest = self._cache.fetch_nearest_cache(_KEY, prompt[:-1])
            job.cached = held = len(prompt) - 1 - len(rest)
        cuts = [] if self._cuttable else sorted(job.boundaries)
        edges = [held, *(b for b in cuts if held < b < len(prompt)), len(prompt)]
        begun = 0 if job.echo is None else len(job.echo.text)
        job.text = StreamedText(self._tokenizer.detokenizer, job.stops, begun)
        (job.uid,) = batch.insert_segments(
            segments=[[prompt[a:b] for a, b in itertools.pairwise(edges)]],
            max_tokens=[job.max_tokens],
            caches=[cache],
            all_tokens=[prompt[:held]],
            samplers=[job.sampler],
            logits_processors=[[_guarded(job, p) for p in job.processors]],
            stop_sequences=[self._ends],
        )
        self._jobs[job.uid] = job
        return True

    def _sampler(self, job: Job) -> Sampler:
        made = make_sampler(job.sampling, self._protected, job.seed)
        if self._team is not None:
            made = agreed(made, self._team.group)
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
        self._grown = True

    def _advance(self, batch: Any, response: Any) -> bool:
        """Deliver a token; whether it was the last."""
        job = self._jobs[response.uid]
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
        # Whoever cancelled it, and rank 0 alone knows: the steps of all ranks are the same.
        wanted = not (job.cancelled or job.failure)
        if wanted and (text or tokens or finish or job.count == 1):
            job.deliver(Piece(text, tokens, finish, stop, job.count, job.cached))
        return finish is not None


def _guarded(job: Job, processor: Any) -> Any:
    def process(tokens: mx.array, logits: mx.array) -> mx.array:
        try:
            result: mx.array = processor(tokens, logits)
        except Exception as error:  # ends its own request, and not those in the same batch
            job.failure = job.failure or error
            return logits
        return result

    return process
