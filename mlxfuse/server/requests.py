"""What a request may say: OpenAI's chat and text completions, checked before anything is done."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Set
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError, from_json

# Clients send these; they change nothing of an answer here.
IGNORED = {
    *("background_tasks", "chat_id", "conversation_id", "features", "files", "id", "metadata"),
    *("prompt_cache_key", "prompt_cache_retention", "safety_identifier", "service_tier"),
    *("session_id", "store", "tool_ids", "user", "variables", "verbosity"),
    *("cache_prompt", "id_slot", "keep_alive", "return_progress", "timings_per_token"),
    *("include_reasoning", "reasoning_format"),
}
# What is not supported may be sent with the value that leaves it off.
OFF: dict[str, tuple[Any, ...]] = {
    "adapters": ("", [], {}),
    "audio": (),
    "best_of": (1,),
    "draft_model": ("", "default_model"),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "mirostat": (0,),
    "modalities": (["text"],),
    "num_ctx": (),
    "prediction": (),
    "role_mapping": (),
    "suffix": ("",),
    "top_a": (0,),
    "typical_p": (1,),
    "web_search_options": (),
}
MAX_CHOICES = 128
_HINTS = {"functions": "; use tools", "function_call": "; use tool_choice"}


class RequestError(Exception):
    """A request that is refused, and what its answer says.

    Args:
        param: the parameter that is wrong, if it is one.
        code, status: OpenAI's name of the error, and the HTTP status.
    """

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        status: int = 400,
    ) -> None:
        super().__init__(message)
        self.message, self.param, self.code, self.status = message, param, code, status


def wrong(message: str) -> PydanticCustomError:
    """What a validator raises."""
    return PydanticCustomError("wrong", "{message}", {"message": message})


def _flat_text(content: Any) -> Any:
    """The text of a message, which may be a list of text parts."""
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list):
        raise wrong("expected a string or a list of text parts")
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in ("text", "input_text", "output_text", "refusal"):
            raise wrong(f"this model reads text only; found a part of type {str(kind)[:40]!r}")
        text = part.get("refusal" if kind == "refusal" else "text")
        if not isinstance(text, str):
            raise wrong(f"expected a string as the text of a part of type {kind!r}")
        texts.append(text)
    return "".join(texts)


def _stops(stop: Any) -> Any:
    stops = [stop] if isinstance(stop, str) else stop
    if not isinstance(stops, list) or not all(isinstance(s, str) for s in stops):
        raise wrong("expected a string or a list of strings")
    if len(stops) > 64 or sum(map(len, stops)) > 4096:
        raise wrong("expected at most 64 strings of 4,096 characters together")
    return [s for s in stops if s]


def _prompts(prompt: Any) -> Any:
    """A list of prompts, each a text or a list of token ids."""
    whole = isinstance(prompt, str) or (
        isinstance(prompt, list) and bool(prompt) and type(prompt[0]) is int
    )
    prompts = [prompt] if whole else prompt
    if not isinstance(prompts, list) or not 1 <= len(prompts) <= MAX_CHOICES:
        raise wrong(
            f"expected a string, a list of token ids, or a list of 1 to {MAX_CHOICES} of these"
        )
    for each in prompts:
        ids = isinstance(each, list) and all(type(i) is int for i in each)
        if not (ids or isinstance(each, str)):
            raise wrong("expected a string or a list of whole numbers")
    return prompts


def _bias(bias: Any) -> Any:
    if not isinstance(bias, dict):
        raise wrong("expected an object of token id to number")
    found: dict[int, float] = {}
    for token, value in bias.items():
        if type(value) not in (int, float) or not -100 <= value <= 100:
            raise wrong(f"expected numbers from -100 to 100; found {str(value)[:40]!r}")
        if not (token.isascii() and token.isdecimal() and len(token) < 12):
            raise wrong(f"expected token ids; found {token[:40]!r}")
        found[int(token)] = float(value)
    return found


class Model(BaseModel):
    """Values have exactly the types that are named; null is as if it were not there."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        return {name: value for name, value in values.items() if value is not None}


class Open(Model):
    """And names that are not known are let through."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)


class StreamOptions(Open):
    include_usage: bool = False


class CalledFunction(Open):
    name: str
    arguments: str | dict[str, Any] = "{}"


class ToolCall(Open):
    id: str = ""
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(Open):
    role: Annotated[str, Field(min_length=1, max_length=64)]
    content: Annotated[str, BeforeValidator(_flat_text)] = ""
    tool_calls: list[ToolCall] = []

    def for_template(self) -> dict[str, Any]:
        """As chat templates take it: the arguments of tool calls as an object."""
        made = self.model_dump(exclude_unset=True) | {"content": self.content}
        if not made.get("tool_calls"):
            made.pop("tool_calls", None)
        for call in made.get("tool_calls", ()):
            arguments = call["function"].get("arguments", {})
            if isinstance(arguments, str):
                # A model wrote it: where it is no JSON, the next answer may mend it.
                with contextlib.suppress(ValueError, RecursionError):
                    arguments = json.loads(arguments)
            call["function"]["arguments"] = arguments
        return made


class Function(Open):
    name: Annotated[str, Field(min_length=1, max_length=256)]
    parameters: dict[str, Any] = {}


class Tool(Open):
    type: Literal["function"]
    function: Function


class JSONSchema(Open):
    schema_: Annotated[dict[str, Any], Field(alias="schema")] = {}


class ResponseFormat(Model):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JSONSchema | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None


Fraction = Annotated[float, Field(ge=0, le=1)]
_Penalty = Annotated[float, Field(ge=-100, le=100)]
_Count = Annotated[int, Field(ge=0)]


class _Completion(Model):
    """The parameters that chat and text completions share; with mlx-lm's names where OpenAI has
    none. What a request does not give is as the server's own settings say.
    """

    model: str = ""
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    max_tokens: _Count | None = None
    max_completion_tokens: _Count | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Fraction | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    min_p: Fraction | None = None
    xtc_probability: Fraction | None = None
    xtc_threshold: Annotated[float, Field(ge=0, le=0.5)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0, le=100)] | None = None
    repetition_context_size: _Count | None = None
    presence_penalty: _Penalty | None = None
    presence_context_size: _Count | None = None
    frequency_penalty: _Penalty | None = None
    frequency_context_size: _Count | None = None
    logit_bias: Annotated[dict[int, float], BeforeValidator(_bias)] = {}
    seed: int | None = None
    stop: Annotated[list[str], BeforeValidator(_stops)] = []
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] = 1
    response_format: ResponseFormat | None = None
    grammar: str = ""

    @property
    def limit(self) -> int | None:
        """Tokens to generate at most."""
        newer = self.max_completion_tokens
        return self.max_tokens if newer is None else newer


class ChatRequest(_Completion):
    """A request to ``/v1/chat/completions``."""

    messages: Annotated[list[Message], Field(min_length=1)]
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: list[Tool] = []
    tool_choice: str | dict[str, Any] = "auto"
    parallel_tool_calls: bool = True
    reasoning_effort: str | None = None
    chat_template_kwargs: dict[str, Any] = {}
    continue_final_message: bool = False

    @property
    def top(self) -> int | None:
        """Most likely tokens to tell; None: nothing of probabilities."""
        if self.top_logprobs and not self.logprobs:
            raise RequestError("top_logprobs needs logprobs to be true", param="top_logprobs")
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(_Completion):
    """A request to ``/v1/completions``."""

    prompt: Annotated[list[str | list[int]], BeforeValidator(_prompts)]
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool = False

    @property
    def top(self) -> int | None:
        """Most likely tokens to tell; None: nothing of probabilities."""
        return self.logprobs


R = TypeVar("R", bound=BaseModel)


def read_body(body: bytes) -> dict[str, Any]:
    """The JSON object in a request's body.

    Raises:
        RequestError: it is none.
    """
    try:
        found = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise RequestError(f"the body is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise RequestError(f"expected a JSON object, found {type(found).__name__}")
    return found


def parse(kind: type[R], body: dict[str, Any], ignored: Set[str] = IGNORED) -> R:
    """``body`` as a request of this kind.

    Args:
        ignored: names that are let through.

    Raises:
        RequestError: a parameter is missing, unknown, not supported, or has a wrong value.
    """
    given = {k: v for k, v in body.items() if k not in ignored and v not in OFF.get(k, ())}
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        param = ".".join(str(part) for part in first["loc"])
        message = f"{param}: {first['msg']}"
        if first["type"] == "extra_forbidden":
            message = f"{param[:200]} is not supported{_HINTS.get(param, '')}"
        raise RequestError(message, param=param[:200]) from None
