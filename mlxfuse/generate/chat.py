"""A conversation with a model: every answer goes on from the prompt cache of the one before."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import takewhile
from typing import Any

from mlx_lm.models.cache import can_trim_prompt_cache, trim_prompt_cache
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..errors import MLXFuseError, RanksError
from ..nn.kv.options import check_model
from ..ranks import Ranks
from .answer import Result
from .run import Settings, add_eos_tokens, expect_trimmable, level, new_cache, run, seed

# Of the context, what is left for an answer when old messages have to go, at most.
ROOM = 0.25


class Interrupted(Exception):
    """``stop`` said so while the prompt was read."""


class Chat:
    """A conversation that keeps what the model has read.

    The whole conversation is rendered for each answer; only what differs from the tokens in the
    cache is read. A cache that cannot take tokens back is begun anew where it would have to.

    Args:
        model, tokenizer: a pair from ``mlxfuse.load`` or ``mlx_lm.load``.
        settings: as for ``generate``; ``prompt`` is not used.
        team: the ranks that hold the model together. Rank 0 has the conversation; the others
            `follow`.
        draft_model: a smaller model with the same vocabulary, for speculative decoding; not with
            a team.

    Raises:
        UnsupportedError: a model's cache cannot do what was asked.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: TokenizerWrapper,
        settings: Settings,
        team: Ranks | None = None,
        *,
        draft_model: Any = None,
    ) -> None:
        self._team = team
        self._models = [model] if draft_model is None else [model, draft_model]
        for each in self._models:
            if settings.kv is not None:
                check_model(each, settings.kv, force=settings.kv_force)
            if draft_model is not None:
                expect_trimmable(each, None, "--draft-model")
        self._drafting: dict[str, Any] = {}
        if draft_model is not None:
            count = settings.num_draft_tokens
            self._drafting = {"draft_model": draft_model, "num_draft_tokens": count}
        self._model, self._tokenizer, self._settings = model, tokenizer, settings
        add_eos_tokens(tokenizer, settings.extra_eos_token)
        seed(settings)
        self.reset()

    def reset(self) -> None:
        """Forget the conversation, but not the system prompt."""
        system = self._settings.system_prompt
        self.messages = [] if system is None else [{"role": "system", "content": system}]
        # The other ranks begin anew with the next prompt.
        self._begin()

    @property
    def system_prompt(self) -> str | None:
        """The message that the conversation begins with; set, it takes the place of the old one."""
        return self._settings.system_prompt

    @system_prompt.setter
    def system_prompt(self, text: str | None) -> None:
        self._settings = replace(self._settings, system_prompt=text)
        rest = [m for m in self.messages if m["role"] != "system"]
        self.messages = [*([] if text is None else [{"role": "system", "content": text}]), *rest]

    def resume(self, messages: list[dict[str, str]]) -> None:
        """Go on from another conversation, with its system prompt."""
        system = next((m["content"] for m in messages if m["role"] == "system"), None)
        self.messages = list(messages)
        self._settings = replace(self._settings, system_prompt=system)

    @property
    def context(self) -> int | None:
        """Tokens that the model was made for, if it says so and its cache forgets none before."""
        if self._settings.max_kv_size is not None:
            return None
        found = getattr(getattr(self._model, "args", None), "max_position_embeddings", None)
        return found if isinstance(found, int) and found > 0 else None

    @property
    def fill(self) -> float | None:
        """The share of the context that the conversation takes."""
        return None if self.context is None else len(self._ids) / self.context

    def _begin(self) -> None:
        self._cache: list[Any] = [c for m in self._models for c in new_cache(m, self._settings)]
        self._ids: list[int] = []

    @property
    def cached_tokens(self) -> int:
        """Tokens that the prompt cache has seen; 0 where it does not tell."""
        offsets = (getattr(cache, "offset", None) for cache in self._cache)
        return int(next((n for n in offsets if n is not None), 0))

    def say(
        self,
        text: str,
        *,
        write: Callable[[str], None] | None = None,
        think: Callable[[str], None] | None = None,
        on_prompt: Callable[[int, int], None] | None = None,
        stop: Callable[[], bool] | None = None,
        note: Callable[[str], None] | None = None,
    ) -> Result | None:
        """Add the user's ``text`` and the answer to the conversation.

        Args:
            write: called with each piece of the answer as it is there.
            think: called with each piece of the model's reasoning as it is there.
            on_prompt: called as (prompt tokens processed, prompt tokens to process).
            stop: asked after each token, and each step of a long prompt, whether to stop there.
            note: called with what was forgotten, where the context is full.

        Returns:
            The answer, whole or up to where it was stopped; its ``prompt_tokens`` are those that
            were read. None if it was stopped before its first token: then nothing was added.

        Raises:
            MLXFuseError: as for ``generate``, or the message alone is longer than the context.
            RanksError: it failed while other ranks computed with this one; they must end.
        """
        messages, ids = self._fitting([*self.messages, {"role": "user", "content": text}], note)
        rest, settings = self._reuse(ids), self._bounded(len(ids))
        if self._team is not None:
            self._team.share([len(ids) - len(rest), ids, settings.max_tokens])

        def progress(done: int, total: int) -> None:
            if on_prompt is not None:
                on_prompt(done, total)
            if stop is not None and stop():
                raise Interrupted

        try:
            result = self._run(
                ids, rest, settings, write=write, think=think, stop=stop, progress=progress
            )
        except Interrupted:
            return None
        except MLXFuseError as error:
            raise error if self._team is None else RanksError(str(error)) from error
        answer = {"role": "assistant", "content": result.text}
        # The template decides whether the model sees its earlier reasoning again.
        thought = {"reasoning_content": result.reasoning} if result.reasoning else {}
        self.messages = [*messages, {**answer, **thought}]
        return replace(result, prompt_tokens=len(rest))

    def follow(self) -> None:
        """Compute with rank 0, as another rank, until its conversation has ended.

        Raises:
            RanksError: this rank does not hold what rank 0 holds.
        """
        assert self._team is not None
        told: Any = None
        while (told := self._team.share(told)) is not None:
            held, ids, max_tokens = told
            if not held:
                self._begin()
            rest = self._reuse(ids)
            if len(ids) - len(rest) != held:
                raise RanksError("the ranks have come to hold different conversations")
            self._run(ids, rest, replace(self._settings, max_tokens=max_tokens))

    def close(self) -> None:
        """End the conversation on the other ranks too."""
        if self._team is not None:
            self._team.share(None)

    def _run(
        self,
        ids: list[int],
        rest: list[int],
        settings: Settings,
        *,
        progress: Callable[[int, int], None] | None = None,
        **more: Any,
    ) -> Result:
        """Answer the prompt ``ids``, of which the cache lacks ``rest``."""
        self._ids = ids
        result = run(
            self._model,
            self._tokenizer,
            rest,
            settings,
            team=self._team,
            prompt_cache=self._cache,
            prompt_progress_callback=progress,
            **self._drafting,
            **more,
        )
        end = [] if result.end_token is None else [result.end_token]
        self._ids = [*ids, *result.tokens, *end]
        return result

    def _fitting(
        self, messages: list[dict[str, str]], note: Callable[[str], None] | None
    ) -> tuple[list[dict[str, str]], list[int]]:
        """The messages and their tokens, without the oldest ones where the context is too small."""
        ids, before = self._encode(messages), len(messages)
        context = self.context
        if context is None:
            return messages, ids
        wanted = self._settings.max_tokens
        room = int(context * ROOM) if wanted < 0 else min(wanted, int(context * ROOM))
        while len(ids) + room > context and (oldest := _exchange(messages)):
            messages = [m for i, m in enumerate(messages) if i not in oldest]
            ids = self._encode(messages)
        if len(ids) >= context:
            raise MLXFuseError(
                f"the message has {len(ids):,} tokens with what belongs to it; the model can read "
                f"{context:,}: shorten it"
            )
        if note is not None and len(messages) < before:
            note(
                f"the context of {context:,} tokens is full: the {before - len(messages)} oldest "
                "messages are forgotten"
            )
        return messages, ids

    def _bounded(self, prompt: int) -> Settings:
        """The settings, with no more tokens to generate than the context has left."""
        if self.context is None:
            return self._settings
        left, wanted = self.context - prompt, self._settings.max_tokens
        return replace(self._settings, max_tokens=left if wanted < 0 else min(left, wanted))

    def _encode(self, messages: list[dict[str, str]]) -> list[int]:
        tokenizer, settings = self._tokenizer, self._settings
        if tokenizer.has_chat_template and not settings.ignore_chat_template:
            values = dict(settings.chat_template_config)
            values |= {"tokenize": False, "add_generation_prompt": True}
            text = tokenizer.apply_chat_template(messages, **values)
            ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
            return ids
        ids = tokenizer.encode("".join(m["content"] for m in messages), add_special_tokens=True)
        return ids

    def _reuse(self, ids: list[int]) -> list[int]:
        """Bring the cache to a beginning of ``ids``, and give the rest, of one token at least."""
        if self._drafting:
            level(self._cache)
        held = self.cached_tokens
        pairs = zip(self._ids[:held], ids[:-1], strict=False)
        common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        surplus = held - common
        if held and not surplus:
            return ids[common:]
        if common and can_trim_prompt_cache(self._cache):
            trim_prompt_cache(self._cache, surplus)
            if self.cached_tokens == common:
                return ids[common:]
        self._begin()
        return ids


def _exchange(messages: list[dict[str, str]]) -> range:
    """Where the oldest message of the user and its answers are; empty if there is only one."""
    users = [i for i, m in enumerate(messages) if m["role"] == "user"]
    return range(users[0], users[1]) if len(users) > 1 else range(0)
