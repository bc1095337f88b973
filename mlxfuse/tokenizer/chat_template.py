"""Chat templates from untrusted files, rendered in jinja's immutable sandbox and within bounds.

A template sees what transformers gives it. The sandbox keeps it from reaching Python. Loops, calls
and operators meet a deadline; operators, numbers that functions are given, the texts that filters
and methods make (`template_growth`), and the output meet a size.
"""

from __future__ import annotations

import datetime
import functools
import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import CodeType
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.filters import make_attrgetter
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from ..errors import MLXFuseError, UnsupportedError
from .template_growth import TEXTS, extent, grown

SECONDS = 1.0
"""CPU time of one rendering; a second more for every million characters of the conversation."""
SIZE = 1 << 24
"""Characters of a value and of the output, and a range's numbers, beyond 16 times the input."""

_BIT = 1000  # how many characters an integer's bit counts as
_WIDE = re.compile(r"%[^%a-zA-Z]*(\*|\d{5})")

# Failures of the template's own code, as opposed to ours.
_FAILURES = (
    *(jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, MemoryError),
    *(RuntimeError, SyntaxError, TypeError, ValueError, AssertionError),
)


class _Meter:
    """What one rendering has used of its time and size."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        given = len(repr(values))
        self._size, self._made = SIZE + 16 * given, 0
        self._deadline = time.thread_time() + SECONDS + given / 1e6

    def tick(self) -> None:
        if time.thread_time() > self._deadline:
            raise UnsupportedError(f"the chat template takes more than {SECONDS} seconds")

    def check(self, size: int) -> None:
        """Refuse a value of ``size`` characters, items or bits before it is made."""
        self.tick()
        if size > self._size:
            raise UnsupportedError(
                f"the chat template makes something of more than {self._size} characters"
            )

    def check_text(self, value: Any) -> None:
        """Refuse the text of a value before it is made."""
        if not isinstance(value, str):
            self.check(extent(value, self.check))

    def add(self, size: int) -> None:
        """As `check`, for what all counts together."""
        self._made += size
        self.check(self._made)


class _Namespace(Namespace):
    """jinja's, which cannot be given the attributes of Python's own machinery."""

    def __setitem__(self, name: str, value: Any) -> None:
        if str(name).startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a namespace takes no name like {name!r}")
        super().__setitem__(name, value)


class _Generation(Extension):
    """``{% generation %}`` marks the assistant's part of a chat for training; here it is plain."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), True)).set_lineno(line)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: Any) -> NoReturn:
    raise MLXFuseError(f"the chat template refuses the conversation: {message}")


class _Environment(ImmutableSandboxedEnvironment):
    """transformers' environment with the `_Meter` of one rendering, which has it to itself."""

    intercepted_binops = frozenset(["+", "*", "%", "**"])

    def __init__(self, meter: _Meter) -> None:
        self._meter = meter
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,  # nothing runs while compiling
            finalize=self._output,
            extensions=[_Generation, "jinja2.ext.loopcontrols"],
        )
        self.globals |= {
            "range": self._range,
            "namespace": _Namespace,
            "raise_exception": _raise_exception,
            "strftime_now": lambda form: datetime.datetime.now().strftime(form),
        }
        del self.globals["lipsum"]  # makes as much as it is asked for
        self.filters["tojson"] = _tojson
        for name in ("batch", "center", "indent", "round", "slice", "tojson"):
            self.filters[name] = self._widths_checked(self.filters[name])
        for name in TEXTS:
            self.filters[name] = self._growth_checked(name, self.filters[name])
        self.filters["join"] = self._join_checked(self.filters["join"])
        self.filters["sum"] = self._sum_checked(self.filters["sum"])
        # Names that a template cannot spell.
        self.filters |= {"mlxfuse turns": self._turns, "mlxfuse glued": self._glued}

    @jinja2.pass_context  # a context keeps jinja from running it while compiling
    def _output(self, _: Context, value: Any) -> Any:
        self._meter.check_text(value)
        self._meter.add(len(str(value)))
        return value

    def _range(self, *bounds: int) -> range:
        numbers = range(*bounds)
        self._meter.add(8 * len(numbers))
        return numbers

    def _turns(self, values: Iterable[Any]) -> Iterator[Any]:
        """What a loop goes over, with the clock looked at."""
        for value in values:
            self._meter.tick()
            yield value

    def _glued(self, values: list[Any]) -> str:
        """``a ~ b``."""
        for value in values:
            self._meter.check_text(value)
        parts = [str(value) for value in values]
        self._meter.check(sum(map(len, parts)))
        return "".join(parts)

    def _growth_checked(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The filter of that name, of which `grown` knows how much it makes."""
        given = int(hasattr(function, "jinja_pass_arg"))  # what jinja itself gives it

        @functools.wraps(function)
        def checked(*args: Any, **kwargs: Any) -> Any:
            self._meter.check(grown(name, self._meter.check, *args[given:], **kwargs))
            return function(*args, **kwargs)

        return checked

    def _join_checked(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The filter ``join``, with values that are all there before it begins."""

        @functools.wraps(function)
        def checked(context: Any, values: Iterable[Any], d: str = "", attribute: Any = None) -> Any:
            items = list(self._turns(values))
            if attribute is not None:
                items = [*map(make_attrgetter(context.environment, attribute), items)]
            self._meter.check(grown("join", self._meter.check, str(d), items))
            return function(context, items, d)

        return checked

    def _sum_checked(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The filter ``sum``, which joins lists too."""

        @functools.wraps(function)
        def checked(environment: Any, values: Iterable[Any], *args: Any, **kwargs: Any) -> Any:
            items = list(self._turns(values))
            self._meter.check_text(items)
            return function(environment, items, *args, **kwargs)

        return checked

    def _widths_checked(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A filter whose first argument is a value, and whose others may be widths or counts."""

        @functools.wraps(function)
        def checked(*args: Any, **kwargs: Any) -> Any:
            self._check_widths(*args[1:], *kwargs.values())
            return function(*args, **kwargs)

        return checked

    def _check_widths(self, *values: Any) -> None:
        self._meter.check(max((abs(v) for v in values if isinstance(v, int)), default=0))

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)

        def filtered(kind: str, node: nodes.Node) -> nodes.Filter:
            name = f"mlxfuse {kind}"
            return nodes.Filter(
                node, name, [], [], None, None, lineno=node.lineno, environment=self
            )

        for loop in tree.find_all(nodes.For):
            loop.iter = filtered("turns", loop.iter)
        for concat in tree.find_all(nodes.Concat):
            items = nodes.List(concat.nodes, lineno=concat.lineno)
            concat.nodes = [filtered("glued", items)]
        return tree

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        meter = __self._meter
        meter.tick()
        method = getattr(__obj, "__wrapped__", __obj)  # jinja's own format
        text = getattr(method, "__self__", None)
        if isinstance(text, str):
            __self._check_widths(*args, *kwargs.values())
            if method.__name__ == "join" and args:
                args = ([*__self._turns(args[0])],)
            meter.check(grown(method.__name__, meter.check, text, *args, **kwargs))
        return super().call(__context, __obj, *args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        meter = self._meter
        meter.tick()
        if operator == "*" and not isinstance(left, int):
            left, right = right, left
        match operator, left, right:
            case "+", (str() | list() | tuple()), (str() | list() | tuple()):
                meter.check(len(left) + len(right))
            case "*", int(), (str() | list() | tuple()):
                meter.add(left * len(right))
            case (("+" | "*"), int(), int()):
                meter.check(_BIT * (left.bit_length() + right.bit_length()))
            case "**", int(), int():
                meter.check(_BIT * left.bit_length() * abs(right))
            case "%", str(), _ if _WIDE.search(left):
                raise UnsupportedError("the chat template formats with a width beyond 9999")
            case "%", str(), _:
                meter.check(grown("format", meter.check, left, right))
        return super().call_binop(context, operator, left, right)


@functools.lru_cache(maxsize=16)
def _compiled(source: str) -> CodeType:
    """Raises UnsupportedError if ``source`` is malformed."""
    try:
        return _Environment(_Meter({})).compile(source)
    except _FAILURES as error:
        raise UnsupportedError(f"the chat template is malformed: {_describe(error)}") from error


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
    code = _compiled(template)
    given = {"messages": list(messages), "tools": tools, "documents": documents, **variables}
    try:
        values = {name: _plain(value) for name, value in given.items()}
        chat = [_with_reasoning(message) for message in values["messages"]]
        values["messages"] = _mark_end(chat) if continue_final_message else chat
        values["add_generation_prompt"] = add_generation_prompt
        text = _rendered(code, values)
    except MLXFuseError:
        raise
    except _FAILURES as error:
        raise UnsupportedError(f"the chat template fails: {_describe(error)}") from error
    return _cut_end(text) if continue_final_message else text


def _rendered(code: CodeType, values: Mapping[str, Any]) -> str:
    meter = _Meter(values)
    environment = _Environment(meter)
    template = jinja2.Template.from_code(environment, code, environment.make_globals(None))
    pieces = []
    for piece in template.generate(values):
        meter.add(len(piece))
        pieces.append(piece)
    return "".join(pieces)


def _describe(error: BaseException) -> str:
    if isinstance(error, RecursionError):
        return "it nests too deeply"
    line = getattr(error, "lineno", None)
    text = str(error) or type(error).__name__
    return f"{text[:500]} (line {line})" if line else text[:500]


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    """A message without what is None, and with a model's reasoning under both names that templates
    read; servers send it under three."""
    message = {name: value for name, value in message.items() if value is not None}
    names = ("reasoning_content", "thinking", "reasoning")
    text = next((message[name] for name in names if name in message), None)
    return message if text is None else {"thinking": text, **message, "reasoning_content": text}


def _plain(value: Any) -> Any:
    """``value`` out of plain JSON types, so that only their methods are within reach."""
    match value:
        # A subclass has methods of its own: enumerations, markup, numpy's scalars.
        case None | bool():
            return value
        case str():
            return str.__str__(value)
        case int():
            return int.__int__(value)
        case float():
            return float.__float__(value)
        case Mapping():
            return {_plain(key): _plain(item) for key, item in value.items()}
        case list() | tuple():
            return (list if isinstance(value, list) else tuple)(_plain(item) for item in value)
    dump = getattr(value, "model_dump", None)  # pydantic
    return _plain(dump()) if callable(dump) else f"<{type(value).__name__}>"


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
