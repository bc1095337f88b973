"""OpenAI's answers: whole or in chunks, and its errors."""

from __future__ import annotations

import itertools
import json
import time
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper

from .answers import Answer, Call, Part
from .prompts import Plan
from .requests import ChatRequest, CompletionRequest, RequestError
from .text import Token

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    500: "server_error",
    503: "server_error",
}


def error_body(error: RequestError) -> dict[str, Any]:
    """The form in which OpenAI's clients read errors."""
    kind = _TYPES.get(error.status, "invalid_request_error")
    body = {"message": error.message, "type": kind, "param": error.param, "code": error.code}
    return {"error": body}


def event(data: dict[str, Any] | str, name: str | None = None) -> bytes:
    """A server-sent event; JSON in ASCII, as some clients break lines at U+2028."""
    text = data if isinstance(data, str) else json.dumps(data)
    return (f"event: {name}\n" if name else "").encode() + f"data: {text}\n\n".encode()


class Reply:
    """The answers to one request, in OpenAI's form.

    Args:
        name: of the model.
        plan: whose prompts were answered.
    """

    last = (event("[DONE]"),)

    def __init__(
        self,
        request: ChatRequest | CompletionRequest,
        plan: Plan,
        tokenizer: TokenizerWrapper,
        name: str,
    ) -> None:
        self._request, self._plan, self._tokenizer = request, plan, tokenizer
        self._chat = isinstance(request, ChatRequest)
        self.answers = [Answer(tokenizer, plan.form) for _ in range(plan.count)]
        self._told = [0] * plan.count  # tokens whose probabilities were sent
        self._calls = [0] * plan.count
        self._name = name
        self._id = f"{'chatcmpl' if self._chat else 'cmpl'}-{uuid.uuid4().hex}"
        self._created = int(time.time())

    # --- in chunks ------------------------------------------------------------------------------

    def begin(self) -> Iterator[bytes]:
        """What is sent before anything is generated."""
        for index in range(len(self.answers)):
            if self._chat:
                delta = {"role": "assistant", "content": ""}
                yield self._chunk(index, {"delta": delta, "logprobs": None})

    def parts(self, index: int, parts: Sequence[Part]) -> Iterator[bytes]:
        """The chunks for what an answer gained; its last has ``finish_reason``."""
        answer = self.answers[index]
        deltas = list(itertools.chain.from_iterable(self._deltas(index, part) for part in parts))
        told = self._request.top is None or len(answer.tokens) == self._told[index]
        if answer.finish is not None or not (deltas or told):
            deltas.append({} if self._chat else {"text": ""})
        for number, delta in enumerate(deltas):
            choice: dict[str, Any] = {"delta": delta} if self._chat else dict(delta)
            choice["logprobs"] = None
            if number == 0 and self._request.top is not None:
                choice["logprobs"] = self._logprobs(index, self._told[index])
                self._told[index] = len(answer.tokens)
            last = number == len(deltas) - 1
            yield self._chunk(index, choice, answer.finish if last else None)

    def _deltas(self, index: int, part: Part) -> Iterator[dict[str, Any]]:
        kind, value = part
        if not self._chat:
            yield {"text": value}
        elif kind == "content":
            yield {"content": value}
        elif kind == "reasoning":
            yield {"reasoning_content": value, "reasoning": value}
        else:
            number, self._calls[index] = self._calls[index], self._calls[index] + 1
            function = {"name": value.name, "arguments": ""}
            head = {"id": value.id, "type": "function", "function": function}
            for each in (head, {"function": {"arguments": value.arguments}}):
                yield {"tool_calls": [{"index": number, **each}]}

    def _chunk(self, index: int, choice: dict[str, Any], finish: str | None = None) -> bytes:
        choices = [{"index": index, **choice, "finish_reason": finish}]
        return event(self._head(".chunk") | {"choices": choices})

    def end(self) -> Iterator[bytes]:
        """What is sent after all answers."""
        if self._request.stream_options.include_usage:
            yield event(self._head(".chunk") | {"choices": [], "usage": self._usage()})
        yield from self.last

    @staticmethod
    def failed(error: RequestError) -> Iterator[bytes]:
        """What is sent where an answer that has begun cannot go on."""
        yield event(error_body(error))
        yield from Reply.last

    # --- whole ----------------------------------------------------------------------------------

    def whole(self) -> dict[str, Any]:
        """The answer to a request that is not streamed."""
        choices = [self._choice(index) for index in range(len(self.answers))]
        return self._head("") | {"choices": choices, "usage": self._usage()}

    def _choice(self, index: int) -> dict[str, Any]:
        answer = self.answers[index]
        told = None if self._request.top is None else self._logprobs(index, 0)
        made: dict[str, Any] = {"index": index}
        if self._chat:
            message: dict[str, Any] = {"role": "assistant", "content": answer.content}
            if answer.reasoning:
                message |= {"reasoning_content": answer.reasoning, "reasoning": answer.reasoning}
            if answer.calls:
                message["content"] = answer.content or None
                message["tool_calls"] = [_call(call) for call in answer.calls]
            made["message"] = message | {"refusal": None}
        else:
            made["text"] = answer.content
        return made | {"logprobs": told, "finish_reason": answer.finish}

    # --- both -----------------------------------------------------------------------------------

    def _head(self, chunk: str) -> dict[str, Any]:
        kind = f"chat.completion{chunk}" if self._chat else "text_completion"
        return {"id": self._id, "object": kind, "created": self._created, "model": self._name}

    def _usage(self) -> dict[str, Any]:
        prompt = sum(map(len, self._plan.prompts))
        made = sum(answer.count for answer in self.answers)
        firsts = self.answers[:: self._plan.n]
        return {
            "prompt_tokens": prompt,
            "completion_tokens": made,
            "total_tokens": prompt + made,
            "prompt_tokens_details": {"cached_tokens": sum(a.cached for a in firsts)},
        }

    def _logprobs(self, index: int, start: int) -> dict[str, Any]:
        answer = self.answers[index]
        tokens = answer.tokens[start:]
        if self._chat:
            content = [
                self._token(t.id, t.logprob)
                | {"top_logprobs": [self._token(*each) for each in t.top]}
                for t in tokens
            ]
            return {"content": content, "refusal": None}
        return {
            "tokens": [self._text(t.id) for t in tokens],
            "token_logprobs": [t.logprob for t in tokens],
            "top_logprobs": [self._alternatives(t) for t in tokens],
            "text_offset": [t.at for t in tokens],
        }

    def _alternatives(self, token: Token) -> dict[str, float] | None:
        """OpenAI's older form: the most likely tokens, and the one that was taken."""
        if token.logprob is None:
            return None
        return {self._text(i): logprob for i, logprob in (*token.top, (token.id, token.logprob))}

    def _token(self, token: int, logprob: float | None) -> dict[str, Any]:
        pieces = getattr(self._tokenizer, "pieces", None)
        if pieces is None:
            raw = self._tokenizer.decode([token]).encode()
        else:
            raw = pieces[token] if token < len(pieces) else b""
        return {"token": raw.decode("utf-8", "replace"), "logprob": logprob, "bytes": list(raw)}

    def _text(self, token: int) -> str:
        text: str = self._token(token, 0.0)["token"]
        return text


def _call(call: Call) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": call.id, "type": "function", "function": function}
