"""One prompt to one answer: what ``mlx_lm.generate`` does, for the command line and scripts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import mlx.core as mx
from mlx_lm.generate import generation_stream, stream_generate
from mlx_lm.models.cache import (
    KVCache,
    RotatingKVCache,
    can_trim_prompt_cache,
    make_prompt_cache,
    trim_prompt_cache,
)
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..errors import MLXFuseError, UnsupportedError
from ..nn.kv.cache import CompressedKVCache
from ..nn.kv.options import KVOptions, check_model, compressed, describe
from ..ranks import Ranks, agreed
from . import lookup
from .answer import Answer, Result
from .parts import Parts, Whole, begins_in_reasoning
from .sampling import Sampling, StopTexts
from .structured import Grammars

_OPENING = 8  # tokens of a prompt's end among which a mark of reasoning is looked for


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings(Sampling):
    """The flags of ``mlx_lm.generate``, with its names and defaults; those of `Sampling` too.

    kv                  how to compress the key-value cache; None for mlx-lm's plain one.
    quantized_kv_start  tokens up to which it stays plain.
    kv_force            compress keys of models that are known to suffer from it.
    json_schema         what the answer is to be: JSON that is valid against this schema.
    prompt_lookup       draft tokens from what the text said before; `mlxfuse.generate.lookup`.
    num_draft_tokens    tokens that are drafted at a time, at most.
    """

    prompt: str = "hello"
    system_prompt: str | None = None
    prefill_response: str | None = None
    ignore_chat_template: bool = False
    chat_template_config: Mapping[str, Any] = field(default_factory=dict)
    max_kv_size: int | None = None
    prefill_step_size: int = 2048
    num_draft_tokens: int = 3
    prompt_lookup: bool = False
    kv: KVOptions | None = None
    quantized_kv_start: int = 0
    kv_force: bool = False
    json_schema: Mapping[str, Any] | None = None


def encode_prompt(
    tokenizer: TokenizerWrapper, settings: Settings, *, after_cache: bool = False
) -> list[int]:
    """Token ids of the prompt, in the model's chat template where it has one.

    Args:
        after_cache: the prompt follows a stored prompt cache, which already holds what the
            template puts before the user's text.

    Raises:
        MLXFuseError: nothing is left to generate from.
    """
    text = settings.prompt
    templated = tokenizer.has_chat_template and not settings.ignore_chat_template
    if templated:
        text = _render(tokenizer, settings, text)
        if after_cache:
            marker = "<query>"
            text = text[_render(tokenizer, settings, marker).index(marker) :]
    ids: list[int] = tokenizer.encode(text, add_special_tokens=not templated)
    if not ids:
        raise MLXFuseError("the prompt is empty: it has no tokens; give some text with --prompt")
    return ids


def _render(tokenizer: TokenizerWrapper, settings: Settings, text: str) -> str:
    messages = [{"role": "user", "content": text}]
    if settings.system_prompt is not None:
        messages.insert(0, {"role": "system", "content": settings.system_prompt})
    prefill = settings.prefill_response is not None
    if prefill:
        messages.append({"role": "assistant", "content": settings.prefill_response or ""})
    # What the template may be told never overrides what is rendered.
    values = dict(settings.chat_template_config) | {
        "tokenize": False,
        "continue_final_message": prefill,
        "add_generation_prompt": not prefill,
    }
    rendered: str = tokenizer.apply_chat_template(messages, **values)
    return rendered


def add_eos_tokens(tokenizer: TokenizerWrapper, tokens: tuple[str, ...]) -> None:
    """Let each of ``tokens`` (a token's text, or its id) end the text too.

    Raises:
        MLXFuseError: the vocabulary has no such token.
    """
    vocabulary = tokenizer.get_vocab() if tokens else {}
    for token in tokens:
        known = token in vocabulary or (token.isdecimal() and int(token) < len(vocabulary))
        if not known:
            raise MLXFuseError(f"--extra-eos-token {token!r} is not a token of this model")
        tokenizer.add_eos_token(token if token not in vocabulary else str(vocabulary[token]))


def seed(settings: Settings) -> None:
    """Begin MLX's random numbers where the settings say."""
    if settings.seed is not None:
        mx.random.seed(settings.seed)


def generate(
    model: Any,
    tokenizer: TokenizerWrapper,
    settings: Settings,
    *,
    draft_model: Any = None,
    prompt_cache: list[Any] | None = None,
    write: Callable[[str], None] | None = None,
    think: Callable[[str], None] | None = None,
    on_prompt: Callable[[int, int], None] | None = None,
    note: Callable[[str], None] | None = None,
    team: Ranks | None = None,
) -> Result:
    """Generate one answer.

    Args:
        model, tokenizer: a pair from ``mlxfuse.load`` or ``mlx_lm.load``.
        draft_model: a smaller model with the same vocabulary, for speculative decoding.
        prompt_cache: what ``mlxfuse.generate.prompt_cache.read`` returned; the prompt follows it.
        write: called with each piece of the answer as it is there.
        think: called with each piece of the model's reasoning as it is there.
        on_prompt: called as (prompt tokens processed, prompt tokens).
        note: called with what the user should know about the answer to come.
        team: the ranks that hold the model together; each must call this. The prompt is rank 0's.

    Raises:
        UnsupportedError: the model's cache cannot do what was asked.
        MLXFuseError: the prompt is empty.
    """
    seed(settings)
    add_eos_tokens(tokenizer, settings.extra_eos_token)
    prompt = encode_prompt(tokenizer, settings, after_cache=prompt_cache is not None)
    prompt = prompt if team is None else team.share(prompt)
    context = getattr(getattr(model, "args", None), "max_position_embeddings", None)
    if note and context and len(prompt) > context:
        note(
            f"the prompt has {len(prompt):,} tokens, the model was made for {context:,}; "
            "expect a poor answer, or shorten the prompt"
        )
    models = [model] if draft_model is None else [model, draft_model]
    if settings.kv is not None:
        for each in models:
            check_model(each, settings.kv, force=settings.kv_force)
    if prompt_cache is None:
        caches = [cache for each in models for cache in new_cache(each, settings)]
    else:
        caches = _compressed(prompt_cache, settings)
    options: dict[str, Any] = {"prompt_cache": caches}
    if draft_model is not None:
        expect_trimmable(model, prompt_cache, "--draft-model")
        options |= {"draft_model": draft_model, "num_draft_tokens": settings.num_draft_tokens}
    else:
        options["prompt_progress_callback"] = on_prompt
    result = run(model, tokenizer, prompt, settings, write=write, think=think, team=team, **options)
    return replace(result, kv_cache=describe(caches))


def run(
    model: Any,
    tokenizer: TokenizerWrapper,
    prompt: list[int],
    settings: Settings,
    *,
    write: Callable[[str], None] | None = None,
    think: Callable[[str], None] | None = None,
    stop: Callable[[], bool] | None = None,
    team: Ranks | None = None,
    **options: Any,
) -> Result:
    """``stream_generate`` to its end.

    Args:
        prompt: token ids.
        write: called with each piece of the answer as it is there.
        think: called with each piece of the model's reasoning as it is there.
        stop: asked after each token whether to end the answer there.
        team: the ranks that hold the model together; each must call this with the same prompt.
        options: more arguments of ``stream_generate``.

    Raises:
        MLXFuseError: no token was generated.
        GrammarError: the JSON schema cannot be followed.
    """
    answer = Answer(StopTexts(settings.stop), _parts(tokenizer, prompt, settings), write, think)
    stream, options = _streamed(model, settings, options)
    sampler, first = settings.sampler(tokenizer), team is None or team.first
    for step in stream(
        model,
        tokenizer,
        prompt,
        max_tokens=settings.max_tokens,
        sampler=sampler if team is None else agreed(sampler, team.group),
        # Rank 0 chooses for all.
        logits_processors=_processors(tokenizer, prompt, settings) if first else [],
        prefill_step_size=settings.prefill_step_size,
        **options,
    ):
        answer.add(step)
        if answer.stops.found is not None:
            answer.reason = "stop"
            break
        if stop is not None and stop():
            answer.reason = step.finish_reason or "interrupted"
            break
    if team is not None:
        mx.synchronize(generation_stream)  # a step that nobody waits for still needs every rank
    return answer.result(drafts=settings.prompt_lookup or "draft_model" in options)


def _streamed(
    model: Any, settings: Settings, options: dict[str, Any]
) -> tuple[Callable[..., Iterator[Any]], dict[str, Any]]:
    """What generates, mlx-lm's ``stream_generate`` or one like it, and its further arguments."""
    if settings.kv is not None and settings.quantized_kv_start:
        options |= {
            "kv_bits": settings.kv.v_bits,
            "quantized_kv_start": settings.quantized_kv_start,
        }
    if not settings.prompt_lookup:
        return stream_generate, options
    expect_trimmable(model, options.get("prompt_cache"), "--prompt-lookup")
    return lookup.stream, options | {"num_draft_tokens": settings.num_draft_tokens}


def _processors(tokenizer: TokenizerWrapper, prompt: list[int], settings: Settings) -> list[Any]:
    made = settings.logits_processors(tokenizer)
    if settings.json_schema is not None:
        plain = settings.ignore_chat_template or not tokenizer.has_chat_template
        opening = tokenizer.decode(prompt[-_OPENING:])
        reasoning = not plain and begins_in_reasoning(tokenizer, opening)
        grammars = Grammars(tokenizer)
        made.append(grammars.json_schema(settings.json_schema, reasoning=reasoning, plain=plain))
    return made


def _parts(tokenizer: TokenizerWrapper, prompt: list[int], settings: Settings) -> Parts | Whole:
    """What splits the answer to a prompt; without a chat template its text is all there is."""
    if settings.ignore_chat_template or not tokenizer.has_chat_template:
        return Whole()
    begun = settings.prefill_response
    opening = tokenizer.decode(prompt[-_OPENING:]) if begun is None else begun
    return Parts(tokenizer, opening, begun=begun is not None)


def new_cache(model: Any, settings: Settings) -> list[Any]:
    """The model's empty caches, bounded and compressed as the settings say.

    mlx-lm's own ``max_kv_size`` does nothing for the models that make their own caches.
    """
    made, size = make_prompt_cache(model), settings.max_kv_size
    return _compressed([_bounded(cache, size) for cache in made] if size else made, settings)


def _compressed(caches: list[Any], settings: Settings) -> list[Any]:
    if settings.kv is None:
        return caches
    return compressed(caches, settings.kv, settings.quantized_kv_start)


def _bounded(cache: Any, size: int) -> Any:
    if isinstance(cache, CompressedKVCache):
        cache.window = min(cache.window or size, size - cache.keep)
    elif type(cache) is KVCache or getattr(cache, "max_size", 0) > size:
        return RotatingKVCache(max_size=size, keep=4)
    return cache


def level(caches: list[Any]) -> int:
    """Bring the caches of a model and its draft, which drafts leave at different tokens, to the
    same one, and return how many tokens they hold.
    """
    offsets = [n for c in caches if (n := getattr(c, "offset", None)) is not None]
    held = min(offsets, default=0)
    for cache in caches:
        trim_prompt_cache([cache], cache.offset - held)
    return int(held)


def expect_trimmable(model: Any, prompt_cache: list[Any] | None, option: str) -> None:
    """Nothing where the caches can take tokens back, the model's empty ones if there are none.

    Raises:
        UnsupportedError: they cannot; ``option`` is what needs it.
    """
    if not can_trim_prompt_cache(prompt_cache or make_prompt_cache(model)):
        raise UnsupportedError(
            f"this model cannot be used with {option}: its cache cannot take tokens back"
        )
