"""From a request to what the engine is to generate, and how its text is to be read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import mlx.core as mx
from mlx_lm.sample_utils import make_logits_processors
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..errors import GrammarError, MLXFuseError
from ..generate.parts import begins_in_reasoning
from ..generate.run import Settings
from ..generate.sampling import Sampling, suppressed
from ..generate.structured import Constraint, Grammars
from .answers import Form
from .jobs import Job
from .requests import MAX_CHOICES, ChatRequest, CompletionRequest, RequestError
from .text import Echo

# What a request may not tell the template: it is how the template is rendered.
_RESERVED = {
    *("conversation", "messages", "tools", "documents", "chat_template"),
    *("add_generation_prompt", "continue_final_message", "tokenize", "return_dict"),
}
_OPENING = 64  # characters of a prompt's end in which a mark of reasoning is looked for
_UNLIMITED = 1 << 20  # tokens, for a model that does not say how many it was made for


@dataclass(frozen=True, slots=True)
class Plan:
    """What a request comes to.

    prompts  of which each has ``n`` answers.
    make     makes the job of one answer, by its number.
    form     how its text is to be read.
    """

    prompts: list[list[int]]
    make: Callable[[int, Callable[..., None]], Job]
    n: int = 1
    form: Form = field(default_factory=Form)

    @property
    def count(self) -> int:
        """How many answers there are."""
        return len(self.prompts) * self.n


class Planner:
    """Checks requests against the model, and plans them; for one thread at a time.

    Args:
        settings: what holds where a request says nothing.
        boundaries: whether the ends of messages are to be found, see `Job`.
    """

    def __init__(
        self, model: Any, tokenizer: TokenizerWrapper, settings: Settings, boundaries: bool
    ) -> None:
        self._tokenizer, self._settings, self._boundaries = tokenizer, settings, boundaries
        self.context = context_length(model)
        self.vocabulary = len(tokenizer)
        self._grammars = Grammars(tokenizer)

    def chat(self, request: ChatRequest) -> Plan:
        """Raises:
        RequestError: the template, the grammar, the context or the vocabulary refuses it.
        """
        top = request.top
        tools = self._tools(request)
        ids, text, boundaries = self._conversation(request, tools)
        forced = self._forced(request, tools)
        reasoning = begins_in_reasoning(self._tokenizer, text)
        constraint = self._constraint(request, forced, reasoning, bool(tools))
        form = Form(
            opening=text[-_OPENING:],
            begun=request.continue_final_message,
            tools=tools,
            parallel=request.parallel_tool_calls,
            forced=forced is not None,
        )
        make = self._maker(request, [ids], top, constraint, boundaries)
        return Plan([ids], make, request.n, form)

    def completion(self, request: CompletionRequest) -> Plan:
        """Raises:
        RequestError: a prompt is empty, or the context or the vocabulary refuses it.
        """
        if len(request.prompt) * request.n > MAX_CHOICES:
            raise RequestError(f"expected at most {MAX_CHOICES} answers in all", param="n")
        prompts, echoes = [], []
        for prompt in request.prompt:
            ids = self._tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
            if not ids:
                raise RequestError("the prompt is empty: it has no tokens", param="prompt")
            if not all(0 <= token < self.vocabulary for token in ids):
                raise self._outside("prompt")
            self._fits(ids, room=request.limit != 0)
            prompts.append(ids)
            echoes.append(self._echo(prompt, ids, request.top is not None))
        constraint = self._constraint(request, None, False, False)
        make = self._maker(request, prompts, request.top, constraint, {})
        if not request.echo:
            return Plan(prompts, make, request.n)

        def echoing(index: int, deliver: Callable[..., None]) -> Job:
            return replace(make(index, deliver), echo=echoes[index // request.n])

        return Plan(prompts, echoing, request.n)

    def _echo(self, prompt: str | list[int], ids: list[int], places: bool) -> Echo:
        text = prompt if isinstance(prompt, str) else self._tokenizer.decode(ids)
        if not places:
            return Echo(text)
        # What the tokenizer put in front of a text is not in it.
        plain = self._tokenizer.encode(text, add_special_tokens=False)
        added = len(ids) - len(plain) if isinstance(prompt, str) else 0
        detokenizer, offsets = self._tokenizer.detokenizer, [0] * added
        for token in ids[added:]:
            offsets.append(min(len(detokenizer.text), len(text)))
            detokenizer.add_token(token)
        return Echo(text, tuple(offsets))

    # --- the prompt ---------------------------------------------------------------------------

    def _tools(self, request: ChatRequest) -> list[dict[str, Any]]:
        choice = request.tool_choice
        if isinstance(choice, str) and choice not in ("none", "auto", "required"):
            raise RequestError(
                "tool_choice: expected none, auto, required, or an object that names a function",
                param="tool_choice",
            )
        if choice == "none":
            return []
        return [tool.model_dump() for tool in request.tools]

    def _conversation(
        self, request: ChatRequest, tools: list[dict[str, Any]]
    ) -> tuple[list[int], str, dict[int, str]]:
        """The prompt as ids and text, and the ends of its messages."""
        if not self._tokenizer.has_chat_template:
            raise RequestError(
                "this model has no chat template: use /v1/completions, or give the server one "
                "with --chat-template"
            )
        values = dict(self._settings.chat_template_config) | request.chat_template_kwargs
        if reserved := _RESERVED & request.chat_template_kwargs.keys():
            raise RequestError(
                f"chat_template_kwargs: {', '.join(sorted(reserved))} cannot be set",
                param="chat_template_kwargs",
            )
        if request.reasoning_effort is not None:
            values.setdefault("reasoning_effort", request.reasoning_effort)
            if request.reasoning_effort in ("none", "minimal"):
                values.setdefault("enable_thinking", False)
        messages = [message.for_template() for message in request.messages]
        if "developer" not in str(self._tokenizer.chat_template):
            messages = [m | {"role": "system"} if m["role"] == "developer" else m for m in messages]

        def render(some: list[dict[str, Any]], **how: bool) -> str:
            rendered: str = self._tokenizer.apply_chat_template(
                some, tools=tools or None, tokenize=False, **{**values, **how}
            )
            return rendered

        last = request.continue_final_message
        try:
            text = render(messages, add_generation_prompt=not last, continue_final_message=last)
        except Exception as error:  # the template is the model's own code
            if not isinstance(error, MLXFuseError):
                error = MLXFuseError(f"the chat template fails: {error}")
            raise RequestError(str(error), param="messages") from error
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False)
        if not ids:
            raise RequestError("the conversation is empty: it has no tokens", param="messages")
        self._fits(ids)
        found = self._ends(messages, ids, render) if self._boundaries else {}
        return ids, text, found

    def _ends(
        self, messages: list[dict[str, Any]], ids: list[int], render: Callable[..., str]
    ) -> dict[int, str]:
        """Where the system prompt, the last user message and the last message end in ``ids``."""
        roles = [message["role"] for message in messages]
        system = next((i for i, role in enumerate(roles) if role != "system"), len(roles))
        user = max((i + 1 for i, role in enumerate(roles) if role == "user"), default=0)
        found: dict[int, str] = {}
        for count, kind in ((len(roles), "user"), (user, "user"), (system, "system")):
            some = messages[:count]
            if kind == "system" and some:
                some = [*some, {"role": "user", "content": ""}]
            try:
                text = render(some, add_generation_prompt=False) if some else ""
            except Exception:  # a template may refuse a part of a conversation
                continue
            part = self._tokenizer.encode(text, add_special_tokens=False)
            pairs = enumerate(zip(part, ids[:-1], strict=False))  # the last is read by itself
            most = min(len(part), len(ids) - 1)
            if common := next((i for i, (a, b) in pairs if a != b), most):
                found[common] = kind
        return found

    def _fits(self, ids: list[int], room: bool = True) -> None:
        if len(ids) + room > self.context:
            raise RequestError(
                f"the prompt has {len(ids):,} tokens; the model's context of {self.context:,} "
                "has no room for it and an answer",
                param="messages",
                code="context_length_exceeded",
            )

    def _outside(self, param: str) -> RequestError:
        return RequestError(
            f"{param}: token ids are from 0 to {self.vocabulary - 1:,}", param=param
        )

    # --- the answer ---------------------------------------------------------------------------

    def _forced(self, request: ChatRequest, tools: list[dict[str, Any]]) -> dict[str, Any] | None:
        """The schema of the tool call that the answer must be, if it must be one."""
        choice, known = request.tool_choice, {t["function"]["name"]: t["function"] for t in tools}
        if isinstance(choice, dict):
            named = choice.get("function", choice)
            name = named.get("name") if isinstance(named, dict) else None
            if not isinstance(name, str) or name not in known:
                raise RequestError("tool_choice: it names none of the tools", param="tool_choice")
            known = {name: known[name]}
        elif choice != "required":
            return None
        if not known:
            raise RequestError("tool_choice: required, and there are no tools", param="tools")
        calls = [_call_schema(name, each.get("parameters", {})) for name, each in known.items()]
        return calls[0] if len(calls) == 1 else {"anyOf": calls}

    def _constraint(
        self,
        request: ChatRequest | CompletionRequest,
        forced: dict[str, Any] | None,
        reasoning: bool,
        tools: bool,
    ) -> Constraint | None:
        wanted, schema = request.response_format, forced
        how: dict[str, Any] = {"reasoning": reasoning, "tools": tools and forced is None}
        how["plain"] = isinstance(request, CompletionRequest)
        if forced is not None and (request.grammar or (wanted and wanted.type != "text")):
            raise RequestError(
                "tool_choice: a call that is required cannot have a response_format or grammar",
                param="tool_choice",
            )
        if wanted and wanted.type != "text":
            if request.grammar:
                raise RequestError("give response_format or grammar, not both", param="grammar")
            inner = wanted.json_schema.schema_ if wanted.json_schema else wanted.schema_
            if wanted.type == "json_schema" and inner is None:
                raise RequestError(
                    "response_format: json_schema is missing", param="response_format"
                )
            schema = {"type": "object"} if inner is None else inner
        try:
            if schema is not None:
                return self._grammars.json_schema(schema, lenient=forced is not None, **how)
            return self._grammars.grammar(request.grammar, **how) if request.grammar else None
        except GrammarError as error:
            param = "grammar" if request.grammar else "response_format"
            raise RequestError(str(error), param=param if forced is None else "tools") from None

    def _maker(
        self,
        request: ChatRequest | CompletionRequest,
        prompts: list[list[int]],
        top: int | None,
        constraint: Constraint | None,
        boundaries: Mapping[int, str],
    ) -> Callable[[int, Callable[..., None]], Job]:
        sampling = self._sampling(request)
        if not all(0 <= token < self.vocabulary for token in sampling.logit_bias):
            raise self._outside("logit_bias")
        limit = sampling.max_tokens
        if limit == 0 and isinstance(request, ChatRequest):
            raise RequestError("max_tokens: expected 1 or more", param="max_tokens")

        def make(index: int, deliver: Callable[..., None]) -> Job:
            prompt = prompts[index // request.n]
            left = self.context - len(prompt)
            seed = sampling.seed
            # The grammar comes last: nothing may lift what it forbids.
            own = [] if constraint is None else [constraint.copy()]
            return Job(
                prompt,
                left if limit < 0 else min(limit, left),
                deliver,
                sampling,
                None if seed is None else (seed + index) % 2**64,
                [*self._processors(request, sampling), *own],
                sampling.stop,
                top,
                boundaries,
            )

        return make

    def _sampling(self, request: ChatRequest | CompletionRequest) -> Sampling:
        """The server's own settings, with what the request gives in their place."""
        names = {field.name for field in fields(Sampling)} - {"max_tokens"}
        asked = {name: getattr(request, name) for name in names & request.model_fields_set}
        if "temperature" in request.model_fields_set:
            asked["temp"] = request.temperature
        if request.limit is not None:
            asked["max_tokens"] = request.limit
        made = replace(self._settings, **asked)
        return replace(
            made,
            top_k=made.top_k if 0 < made.top_k < self.vocabulary else 0,
            repetition_penalty=made.repetition_penalty or 1.0,
            repetition_context_size=min(made.repetition_context_size, self.context),
            stop=tuple(made.stop),
            seed=None if made.seed == -1 else made.seed,
        )

    def _processors(
        self, request: ChatRequest | CompletionRequest, sampling: Sampling
    ) -> Iterable[Any]:
        yield from make_logits_processors({**sampling.logit_bias, **suppressed(self._tokenizer)})
        if sampling.repetition_penalty != 1 and sampling.repetition_context_size:
            yield from make_logits_processors(
                repetition_penalty=max(sampling.repetition_penalty, 0.01),
                repetition_context_size=sampling.repetition_context_size,
            )
        for kind in ("presence", "frequency"):
            penalty, size = (
                getattr(sampling, f"{kind}_penalty"),
                getattr(request, f"{kind}_context_size"),
            )
            if penalty and size != 0:
                size = self.context if size is None else min(size, self.context)
                how = {f"{kind}_penalty": penalty, f"{kind}_context_size": size}
                yield from map(_of_the_answer, make_logits_processors(**how))


def _call_schema(name: str, parameters: dict[str, Any]) -> dict[str, Any]:
    closed = {"type": "object", "additionalProperties": False}
    arguments = {**(closed if parameters.get("properties") else {"type": "object"}), **parameters}
    properties = {"name": {"const": name}, "arguments": arguments}
    return {**closed, "properties": properties, "required": list(properties)}


def _of_the_answer(processor: Any) -> Any:
    """Of OpenAI's penalties, which are for tokens that were generated, not for the prompt's."""
    start: int | None = None

    def process(tokens: mx.array, logits: mx.array) -> Any:
        nonlocal start
        start = tokens.size if start is None else start
        return processor(tokens[start:], logits)

    return process


def context_length(model: Any) -> int:
    """Tokens that the model was made for."""
    args = getattr(model, "args", None)
    inner = getattr(args, "text_config", None) or {}
    found = inner.get("max_position_embeddings", getattr(args, "max_position_embeddings", None))
    return found if isinstance(found, int) and found > 0 else _UNLIMITED
