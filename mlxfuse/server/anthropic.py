"""Anthropic's ``/v1/messages``, as a translation into a chat request and back."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

from mlx_lm.tokenizer_utils import TokenizerWrapper
from pydantic import BeforeValidator, Field

from .answers import Answer, Part
from .prompts import Plan
from .replies import event
from .requests import ChatRequest, Fraction, Model, Open, RequestError, parse, wrong

IGNORED = {
    *("metadata", "service_tier", "context_management", "inference_geo", "betas", "speed"),
    *("cache_control", "anthropic_version", "user_profile_id"),
}
_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    500: "api_error",
    503: "overloaded_error",
}
_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


def _blocks(content: Any) -> Any:
    """Content as a list of blocks."""
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if not isinstance(content, list) or not all(isinstance(block, dict) for block in content):
        raise wrong("expected a string or a list of content blocks")
    for block in content:
        kind = str(block.get("type"))[:40]
        if kind in ("image", "document"):
            raise wrong(f"this model reads text only; found a block of type {kind!r}")
        if kind == "text" and not isinstance(block.get("text"), str):
            raise wrong("expected a string as the text of a text block")
    return content


_Blocks = Annotated[list[dict[str, Any]], BeforeValidator(_blocks)]


class Message(Open):
    role: Literal["user", "assistant", "system"]
    content: _Blocks


class Tool(Open):
    name: Annotated[str, Field(min_length=1, max_length=256)]
    type: Literal["custom"] = "custom"
    description: str = ""
    input_schema: dict[str, Any]


class ToolChoice(Open):
    type: Literal["auto", "any", "tool", "none"]
    name: str = ""
    disable_parallel_tool_use: bool = False


class Thinking(Open):
    type: Literal["enabled", "disabled", "adaptive"]


class OutputFormat(Open):
    type: Literal["json_schema"]
    schema_: Annotated[dict[str, Any], Field(alias="schema")]


class OutputConfig(Open):
    format: OutputFormat | None = None


class MessagesRequest(Model):
    """A request to ``/v1/messages``; ``max_tokens`` is needed, but not to count tokens."""

    model: str = ""
    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    system: _Blocks = Field(default_factory=list)
    stream: bool = False
    stop_sequences: list[str] = Field(default_factory=list)
    temperature: Fraction | None = None
    top_p: Fraction | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    tools: list[Tool] = Field(default_factory=list)
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None

    def chat(self) -> ChatRequest:
        """The same request, as OpenAI's protocol has it.

        Raises:
            RequestError: a message has content that cannot be there.
        """
        messages = [{"role": "system", "content": _text(self.system)}] if self.system else []
        for message in self.messages:
            messages += _translated(message)
        body: dict[str, Any] = {
            "messages": messages,
            "stream": self.stream,
            "stop": self.stop_sequences,
            "continue_final_message": messages[-1]["role"] == "assistant",
            "tools": [_tool(tool) for tool in self.tools],
        }
        for name in ("max_tokens", "temperature", "top_p", "top_k"):
            body[name] = getattr(self, name)
        if self.thinking is not None:
            enabled = self.thinking.type != "disabled"
            body["chat_template_kwargs"] = {"enable_thinking": enabled}
        if self.output_config is not None and self.output_config.format is not None:
            schema = {"name": "output", "schema": self.output_config.format.schema_}
            body["response_format"] = {"type": "json_schema", "json_schema": schema}
        if choice := self.tool_choice:
            named = {"type": "function", "function": {"name": choice.name}}
            kinds: dict[str, Any] = {"any": "required", "tool": named}
            body["tool_choice"] = kinds.get(choice.type, choice.type)
            body["parallel_tool_calls"] = not choice.disable_parallel_tool_use
        return parse(ChatRequest, body)


def _text(blocks: Sequence[dict[str, Any]]) -> str:
    return "\n".join(block["text"] for block in blocks if block.get("type") == "text")


def _tool(tool: Tool) -> dict[str, Any]:
    function = {"name": tool.name, "description": tool.description}
    return {"type": "function", "function": function | {"parameters": tool.input_schema}}


def _translated(message: Message) -> Iterator[dict[str, Any]]:
    """OpenAI's messages for one of Anthropic's: results of tools are messages of their own."""
    made: dict[str, Any] = {"role": message.role, "content": _text(message.content)}
    calls = []
    for block in message.content:
        kind = block.get("type")
        if kind == "tool_use":
            arguments = json.dumps(block.get("input") or {}, ensure_ascii=False)
            function = {"name": block.get("name"), "arguments": arguments}
            calls.append({"id": block.get("id"), "type": "function", "function": function})
        elif kind == "tool_result":
            inner = block.get("content") or ""
            content = inner if isinstance(inner, str) else _text(_blocks(inner))
            yield {"role": "tool", "tool_call_id": block.get("tool_use_id"), "content": content}
        elif kind == "thinking":
            made["reasoning_content"] = block.get("thinking")
        elif kind not in ("text", "redacted_thinking"):
            raise RequestError(
                f"messages: a block of type {str(kind)[:40]!r} is not supported", param="messages"
            )
    if calls:
        made["tool_calls"] = calls
    if calls or made["content"] or not any(b.get("type") == "tool_result" for b in message.content):
        yield made


def error_body(error: RequestError) -> dict[str, Any]:
    """The form in which Anthropic's clients read errors."""
    kind = _TYPES.get(error.status, "invalid_request_error")
    return {"type": "error", "error": {"type": kind, "message": error.message}}


class Reply:
    """The answer to one request, in Anthropic's form; see `replies.Reply`."""

    def __init__(self, plan: Plan, tokenizer: TokenizerWrapper, name: str) -> None:
        self._plan, self._name = plan, name
        self._id = f"msg_{uuid.uuid4().hex}"
        self.answers = [Answer(tokenizer, plan.form)]
        self._blocks = 0  # that have ended
        self._open: str | None = None

    def begin(self) -> Iterator[bytes]:
        """What is sent before anything is generated."""
        message = self._message([]) | {"stop_reason": None, "stop_sequence": None}
        yield event({"type": "message_start", "message": message}, "message_start")

    def parts(self, index: int, parts: Sequence[Part]) -> Iterator[bytes]:
        """The events for what the answer gained."""
        for kind, value in parts:
            if kind == "call":
                yield from self._close()
                block = {"type": "tool_use", "id": value.id, "name": value.name, "input": {}}
                yield self._begin_block(kind, block)
                yield self._delta({"type": "input_json_delta", "partial_json": value.arguments})
                continue
            if kind != self._open:
                yield from self._close()
                empty: dict[str, Any] = {"type": "text", "text": ""}
                if kind == "reasoning":
                    empty = {"type": "thinking", "thinking": "", "signature": ""}
                yield self._begin_block(kind, empty)
            name = "thinking" if kind == "reasoning" else "text"
            yield self._delta({"type": f"{name}_delta", name: value})

    def _begin_block(self, kind: str, block: dict[str, Any]) -> bytes:
        self._open = kind
        data = {"type": "content_block_start", "index": self._blocks, "content_block": block}
        return event(data, "content_block_start")

    def _delta(self, delta: dict[str, Any]) -> bytes:
        data = {"type": "content_block_delta", "index": self._blocks, "delta": delta}
        return event(data, "content_block_delta")

    def _close(self) -> Iterator[bytes]:
        if self._open is not None:
            data = {"type": "content_block_stop", "index": self._blocks}
            yield event(data, "content_block_stop")
            self._open, self._blocks = None, self._blocks + 1

    def end(self) -> Iterator[bytes]:
        """What is sent after the answer."""
        yield from self._close()
        data = {"type": "message_delta", "delta": self._stopped(), "usage": self._usage()}
        yield event(data, "message_delta")
        yield event({"type": "message_stop"}, "message_stop")

    @staticmethod
    def failed(error: RequestError) -> Iterator[bytes]:
        """What is sent where an answer that has begun cannot go on."""
        yield event(error_body(error), "error")

    def whole(self) -> dict[str, Any]:
        """The answer to a request that is not streamed."""
        answer = self.answers[0]
        content: list[dict[str, Any]] = []
        if answer.reasoning:
            thinking = {"type": "thinking", "thinking": answer.reasoning, "signature": ""}
            content.append(thinking)
        if answer.content or not answer.calls:
            content.append({"type": "text", "text": answer.content})
        for call in answer.calls:
            block = {"type": "tool_use", "id": call.id, "name": call.name}
            content.append(block | {"input": _input(call.arguments)})
        return self._message(content) | self._stopped()

    def _message(self, content: list[dict[str, Any]]) -> dict[str, Any]:
        head = {"id": self._id, "type": "message", "role": "assistant", "model": self._name}
        return head | {"content": content, "usage": self._usage()}

    def _stopped(self) -> dict[str, Any]:
        answer = self.answers[0]
        reason = _REASONS[answer.finish or "stop"]
        if answer.stopped_by is not None and not answer.calls:
            reason = "stop_sequence"
        return {"stop_reason": reason, "stop_sequence": answer.stopped_by}

    def _usage(self) -> dict[str, Any]:
        answer = self.answers[0]
        return {
            "input_tokens": len(self._plan.prompts[0]) - answer.cached,
            "cache_read_input_tokens": answer.cached,
            "cache_creation_input_tokens": 0,
            "output_tokens": answer.count,
        }


def _input(arguments: str) -> dict[str, Any]:
    try:
        found = json.loads(arguments)
    except ValueError:
        found = None
    return found if isinstance(found, dict) else {"arguments": arguments}
