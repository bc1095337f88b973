"""Chat templates from untrusted files, rendered in jinja's immutable sandbox and within bounds.

The sandbox keeps a template from reaching Python; the bounds (`template_sandbox`) keep it from
using up memory or time. Otherwise a template sees what transformers gives it: ``tojson``,
``raise_exception``, ``strftime_now``, ``namespace``, ``{% break %}``, ``{% generation %}``.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import Any

import jinja2

from ..errors import MLXFuseError, UnsupportedError
from .template_budget import ACTIVE, DEPTH_LIMIT, Budget
from .template_sandbox import Bounds, Environment

SOURCE_LIMIT = 128 * 1024  # characters of a template; real ones have up to 30,000

# Failures of the template's own code, as opposed to ours.
_TEMPLATE_FAILURES = (
    *(jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, MemoryError),
    *(RuntimeError, SyntaxError, TypeError, ValueError, AssertionError),
)


def render(
    template: str,
    messages: Iterable[Mapping[str, Any]],
    *,
    tools: list[Any] | None = None,
    documents: list[Any] | None = None,
    add_generation_prompt: bool = False,
    continue_final_message: bool = False,
    **variables: Any,
) -> str:
    """The text of a conversation.

    Args:
        template: jinja source.
        messages: mappings with ``role`` and ``content``; keys whose value is None are left out,
            as by transformers.
        tools, documents: JSON-like lists or None.
        add_generation_prompt: ask the template for the opening of the reply.
        continue_final_message: end the text within the last message, for the model to go on.
        variables: more names for the template, such as ``bos_token`` or ``enable_thinking``.

    Raises:
        UnsupportedError: the template is malformed, does what is not allowed, or goes beyond a
            limit of this module.
        MLXFuseError: the template itself refuses the conversation (``raise_exception``).
    """
    chat = [_with_reasoning({k: v for k, v in m.items() if v is not None}) for m in messages]
    if continue_final_message:
        chat = _mark_end(chat)
    values = {
        "messages": _plain(chat),
        "tools": _plain(tools),
        "documents": _plain(documents),
        "add_generation_prompt": add_generation_prompt,
        **{name: _plain(value) for name, value in variables.items()},
    }
    code = compile_template(template)
    token = ACTIVE.set(Budget(values))
    try:
        text = code.render(values)
    except MLXFuseError:
        raise
    except _TEMPLATE_FAILURES as error:
        raise UnsupportedError(f"the chat template fails: {_describe(error)}") from error
    finally:
        ACTIVE.reset(token)
    return _cut_end(text) if continue_final_message else text


@functools.lru_cache(maxsize=16)
def compile_template(source: str) -> jinja2.Template:
    """``source`` with the bounds put in; raises UnsupportedError if it is malformed."""
    if len(source) > SOURCE_LIMIT:
        raise UnsupportedError(
            f"the chat template has {len(source)} characters; at most {SOURCE_LIMIT} are supported"
        )
    environment = Environment()
    try:
        tree = Bounds().visit(environment.parse(source))
        code = environment.compile(tree, name="chat template")
        return jinja2.Template.from_code(environment, code, environment.make_globals(None))
    except MLXFuseError:
        raise
    except _TEMPLATE_FAILURES as error:
        raise UnsupportedError(f"the chat template is malformed: {_describe(error)}") from error


def _describe(error: BaseException) -> str:
    if isinstance(error, RecursionError):
        return "it nests too deeply"
    line = getattr(error, "lineno", None)
    text = str(error) or type(error).__name__
    return f"{text[:500]} (line {line})" if line else text[:500]


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    """Templates read a model's reasoning under one of two names; servers send it under three."""
    names = ("reasoning_content", "thinking", "reasoning")
    text = next((message[name] for name in names if name in message), None)
    return message if text is None else {"thinking": text, **message, "reasoning_content": text}


def _plain(value: Any, depth: int = 0) -> Any:
    """``value`` out of plain JSON types, so that only their methods are within reach."""
    if depth > DEPTH_LIMIT:
        raise MLXFuseError(f"the conversation nests values more than {DEPTH_LIMIT} deep")
    if value is None or isinstance(value, bool):
        return value
    # A subclass has methods of its own: enumerations, markup, numpy's scalars.
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return int.__int__(value)
    if isinstance(value, float):
        return float.__float__(value)
    if isinstance(value, Mapping):
        return {_plain(k, depth + 1): _plain(v, depth + 1) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part, depth + 1) for part in value]
    dump = getattr(value, "model_dump", None)  # pydantic
    return _plain(dump(), depth + 1) if callable(dump) else f"<{type(value).__name__}>"


# Ends with a space: a template that trims takes it away, and would have trimmed the message.
_END = "<mlxfuse:end-of-message> "


def _mark_end(chat: list[dict[str, Any]]) -> list[dict[str, Any]]:
    if not chat or not isinstance(chat[-1].get("content"), str):
        raise MLXFuseError("continue_final_message needs a last message with a text as its content")
    return [*chat[:-1], {**chat[-1], "content": chat[-1]["content"] + _END}]


def _cut_end(text: str) -> str:
    cut = text.rfind(_END.rstrip())
    if cut < 0:
        raise MLXFuseError("the chat template drops the last message, so it cannot be continued")
    return text[:cut] if text.startswith(_END, cut) else text[:cut].rstrip()
