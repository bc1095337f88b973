"""Chat templates from untrusted files: rendered in jinja's immutable sandbox, within bounds.

The sandbox keeps a template from reaching Python; the bounds keep it from using up memory or time.
They rest on three rules, enforced on the parsed template and on every operation of it:

1. every loop turn, macro, call and filter counts a step, and steps check a deadline in CPU time;
2. no operation makes a value larger than a cap, which is known before it runs; so no step is long;
3. only functions, methods and filters known to keep rule 2 may be called.

Otherwise a template sees what transformers gives it: ``tojson``, ``raise_exception``,
``strftime_now``, ``namespace``, ``{% break %}``, ``{% generation %}``.
"""

from __future__ import annotations

import datetime
import functools
import json
import re
import time
import types
from collections.abc import Callable, Iterable, Mapping
from contextvars import ContextVar
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes, pass_context
from jinja2.ext import Extension
from jinja2.filters import FILTERS
from jinja2.parser import Parser
from jinja2.runtime import Context, LoopContext, Macro, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from .errors import MLXFuseError, UnsupportedError

SOURCE_LIMIT = 128 * 1024  # characters of a template; real ones have up to 30,000
TEXT_LIMIT = 4 * 1024 * 1024  # characters of any value and of the output, beyond 4 x the input
NODE_LIMIT = 400_000  # values inside any one container, beyond 4 x the input
SECONDS = 1.0  # CPU time of the rendering thread, and 50 us for each value of the input
_MADE = 16  # all values made together may be this many times one value's limit

_DEPTH_LIMIT = 60
_INT_BITS = 10_000
_WIDTH_LIMIT = 1000

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
    token = _BUDGET.set(_Budget(values))
    try:
        text = code.render(values)
    except MLXFuseError:
        raise
    except _TEMPLATE_FAILURES as error:
        raise UnsupportedError(f"the chat template fails: {_describe(error)}") from error
    finally:
        _BUDGET.reset(token)
    return _cut_end(text, chat) if continue_final_message else text


@functools.lru_cache(maxsize=16)
def compile_template(source: str) -> jinja2.Template:
    """``source`` with the bounds put in; raises UnsupportedError if it is malformed."""
    if len(source) > SOURCE_LIMIT:
        raise UnsupportedError(
            f"the chat template has {len(source)} characters; at most {SOURCE_LIMIT} are supported"
        )
    environment = _Environment()
    try:
        tree = _Bounds().visit(environment.parse(source))
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


def _refuse(what: str) -> NoReturn:
    raise UnsupportedError(f"the chat template is refused: it {what}")


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    """Templates read a model's reasoning under one of two names; servers send it under three."""
    names = ("reasoning_content", "thinking", "reasoning")
    text = next((message[name] for name in names if name in message), None)
    return message if text is None else {"thinking": text, **message, "reasoning_content": text}


def _plain(value: Any, depth: int = 0) -> Any:
    """``value`` out of plain JSON types, so that only their methods are within reach."""
    if depth > _DEPTH_LIMIT:
        raise MLXFuseError(f"the conversation nests values more than {_DEPTH_LIMIT} deep")
    if value is None or isinstance(value, bool):
        return value
    for kind in (str, int, float):
        if isinstance(value, kind):
            return value if type(value) is kind else kind.__new__(kind, value)
    if isinstance(value, Mapping):
        return {_plain(k, depth + 1): _plain(v, depth + 1) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part, depth + 1) for part in value]
    dump = getattr(value, "model_dump", None)  # pydantic
    return _plain(dump(), depth + 1) if callable(dump) else f"<{type(value).__name__}>"


_END = "<mlxfuse:end-of-message>"


def _mark_end(chat: list[dict[str, Any]]) -> list[dict[str, Any]]:
    if not chat or not isinstance(chat[-1].get("content"), str):
        raise MLXFuseError("continue_final_message needs a last message with a text as its content")
    return [*chat[:-1], {**chat[-1], "content": chat[-1]["content"] + _END}]


def _cut_end(text: str, chat: list[dict[str, Any]]) -> str:
    cut = text.rfind(_END)
    if cut < 0:
        raise MLXFuseError("the chat template drops the last message, so it cannot be continued")
    # A template that trims would have left no space before what the reply goes on with.
    trims = chat[-1]["content"].removesuffix(_END) not in text[:cut]
    return text[:cut].rstrip() if trims else text[:cut]


class _Budget:
    """The bounds of one rendering: sizes of values, steps taken, characters put out."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        # Sizes of the inputs' containers, which neither change nor go away meanwhile.
        self._known: dict[int, tuple[int, int, int]] = {}
        self.node_limit = self.text_limit = 1 << 62
        inputs = [self._size(value, self._known) for value in values.values()]
        count = sum(size[0] for size in inputs)
        self.node_limit = NODE_LIMIT + 4 * count
        self.text_limit = TEXT_LIMIT + 4 * sum(size[1] for size in inputs)
        self._steps = self._emitted = self._nodes_made = self._text_made = 0
        self._deadline = time.thread_time() + SECONDS + 5e-5 * count

    def step(self, count: int = 1) -> None:
        before = self._steps >> 6
        self._steps += count
        if self._steps >> 6 != before and time.thread_time() > self._deadline:
            _refuse(f"takes more than {SECONDS} seconds")

    def text(self, length: int) -> None:
        """Refuses a text of ``length`` characters that is about to be made."""
        if length > self.text_limit:
            _refuse(f"makes a text of {length} characters; the limit is {self.text_limit}")

    def emit(self, length: int) -> None:
        self.step()
        self._emitted += length
        self.text(self._emitted // 4)  # a macro's output is put out again by its caller

    def size(self, *values: Any) -> tuple[int, int, int]:
        """(values in it, characters of its repr, depth) of ``values`` together; refuses too much.

        A value counts as often as it is reached: ``[x, x]`` is twice ``x``.
        """
        total, seen = (0, 0, 0), dict(self._known)
        for value in values:
            n, chars, depth = self._size(value, seen)
            total = (total[0] + n, total[1] + chars, max(total[2], depth))
        self.step(1 + (total[0] >> 6))
        self.limit(*total[:2])
        return total

    def limit(self, count: int, chars: int) -> None:
        """Refuses a value of ``count`` values and ``chars`` characters."""
        if count > self.node_limit:
            _refuse(f"makes a list or mapping of more than {self.node_limit} values")
        self.text(chars)

    def _size(self, value: Any, seen: dict[int, tuple[int, int, int]]) -> tuple[int, int, int]:
        if isinstance(value, str | bytes):
            return 1, len(value) + 2, 0
        if isinstance(value, int):
            return 1, value.bit_length() // 3 + 6, 0
        if isinstance(value, range):
            return len(value) + 1, 8 * len(value), 0
        if isinstance(value, Mapping):
            parts: Iterable[Any] = (part for item in value.items() for part in item)
        elif isinstance(value, _CONTAINERS):
            parts = value
        else:
            return 1, 32, 0  # a number, or an object with a short repr
        known = seen.get(id(value))
        if known is not None:
            return known
        count, chars, depth = 1, 2, 0
        for part in parts:
            n, size, below = self._size(part, seen)
            count, chars, depth = count + n, chars + size + 2, max(depth, below)
            self.limit(count, chars)
        if depth >= _DEPTH_LIMIT:
            _refuse(f"nests values more than {_DEPTH_LIMIT} deep")
        seen[id(value)] = count, chars, depth + 1
        return count, chars, depth + 1

    def checked(self, value: Any) -> Any:
        """``value``, just made, within the limits; an iterator as a list."""
        if isinstance(value, types.GeneratorType | map | filter | zip | reversed):
            items, count, chars = [], 1, 2
            for item in value:
                self.step()
                items.append(item)
                n, size, _ = self.size(item)
                count, chars = count + n, chars + size + 2
                self.limit(count, chars)
            value = items
        if isinstance(value, int):
            if value.bit_length() > _INT_BITS:
                _refuse(f"makes an integer of more than {_INT_BITS} bits")
            return value
        n, size, _ = self.size(value)
        self._nodes_made += n
        self._text_made += size
        if self._nodes_made > _MADE * self.node_limit or self._text_made > _MADE * self.text_limit:
            _refuse("makes too many large values")
        return value


class _Namespace(Namespace):
    """jinja's, but opaque: what it holds is not in its repr, and so not in its size."""

    def __repr__(self) -> str:
        return "<Namespace>"


_CONTAINERS = list | tuple | set | frozenset | type({}.items()) | type({}.keys()) | type({}.values())
_BUDGET: ContextVar[_Budget] = ContextVar("chat template budget")


def _width(what: str, *widths: Any) -> None:
    for width in widths:
        if isinstance(width, int) and abs(width) > _WIDTH_LIMIT:
            _refuse(f"asks {what} for a width or count of {width}")


def _check_replace(text: Any, old: Any, new: Any, *_: Any) -> None:
    text, old, new = str(text), str(old), str(new)
    count = text.count(old) if old else len(text) + 1
    _BUDGET.get().text(len(text) + count * len(new))


def _check_join(separator: Any, values: Any) -> None:
    budget = _BUDGET.get()
    count, chars, _ = budget.size(values)
    budget.text(chars + count * len(str(separator)))


def _check_percent(form: str, values: Any) -> None:
    """Bounds ``form % values``: each conversion puts out at most the longest value or width."""
    budget = _BUDGET.get()
    if re.search(r"%[^%a-zA-Z]*(\*|\d{4,})", form):
        _refuse("formats with a width beyond 999")
    budget.text(len(form) + form.count("%") * (budget.size(values)[1] + _WIDTH_LIMIT))


# Methods that return at most a small multiple of what they are given, with their checks.
_METHODS: dict[type, dict[str, Callable[..., None] | None]] = {
    str: {
        **dict.fromkeys(
            """capitalize casefold count endswith find index isalnum isalpha isascii isdecimal
            isdigit isidentifier islower isnumeric isprintable isspace istitle isupper lower lstrip
            partition removeprefix removesuffix rfind rindex rpartition rsplit rstrip split
            splitlines startswith strip swapcase title upper""".split()
        ),
        "replace": _check_replace,
        "join": _check_join,
        **dict.fromkeys(
            ("center", "ljust", "rjust", "zfill"), lambda _, *args: _width("a method", *args)
        ),
    },
    dict: dict.fromkeys(("items", "keys", "values", "get", "copy")),
    list: dict.fromkeys(("index", "count", "copy")),
    tuple: dict.fromkeys(("index", "count")),
}


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    budget = _BUDGET.get()
    count, chars, depth = budget.size(value)
    step = indent if isinstance(indent, int) else len(indent or "")
    _width("tojson", step)
    marks = sum(map(len, separators)) if separators else 4
    budget.text(chars + count * (max(step, 0) * (depth + 1) + marks))
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: Any) -> NoReturn:
    raise MLXFuseError(f"the chat template refuses the conversation: {message}")


def _strftime_now(form: str) -> str:
    if len(form) > 200 or re.search(r"\d", form):  # glibc pads to a width
        _refuse("asks strftime_now for a width")
    return datetime.datetime.now().strftime(form)


def _plain_escape(value: Any) -> str:
    # Text stays str: nothing else here escapes, and Markup would on every operation.
    return str(FILTERS["escape"](value))


def _indent_check(text: Any, width: Any = 4, *_: Any, **__: Any) -> None:
    _width("indent", width)
    lines = str(text).count("\n") + 1
    _BUDGET.get().text(
        len(str(text)) + lines * (len(width) if isinstance(width, str) else int(width))
    )


def _sum_check(values: Any, *_: Any, **__: Any) -> None:
    # Adding lists up copies the sum at each turn.
    if hasattr(values, "__len__") and len(values) * _BUDGET.get().size(values)[0] > 10_000_000:
        if not all(isinstance(value, int | float) for value in values):
            _refuse("adds up too many lists")


# Filters by what must be known before they run; those that only read their input need nothing.
_READERS = "abs attr count d default first float int last length lower upper capitalize title trim"
_MAKERS = """batch center dictsort format groupby items list map max min reject rejectattr reverse
round select selectattr slice sort string truncate unique urlencode wordcount"""
_FILTERS: dict[str, Callable[..., Any]] = {
    **{name: FILTERS[name] for name in f"{_READERS} {_MAKERS} indent join replace sum".split()},
    **dict.fromkeys(("escape", "e", "forceescape"), _plain_escape),
    "safe": str,
    "tojson": _tojson,
}
_FILTER_CHECKS: dict[str, Callable[..., None]] = {
    "batch": lambda value, *args, **kw: _width("batch", *args, *kw.values()),
    "center": lambda value, *args, **kw: _width("center", *args, *kw.values()),
    "format": lambda form, *args, **kw: _check_percent(str(form), args or kw),
    "indent": _indent_check,
    "join": lambda value, d="", *_, **__: _check_join(d, value),
    "replace": lambda text, old, new, *_: _check_replace(text, old, new),
    "round": lambda value, *args, **kw: _width("round", *args, *kw.values()),
    "slice": lambda value, *args, **kw: _width("slice", *args, *kw.values()),
    "sum": _sum_check,
    "truncate": lambda value, *args, **kw: _width("truncate", *args, *kw.values()),
}


def _bounded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The filter ``function``, counted, its input measured and its output checked."""
    skip = 1 if hasattr(function, "jinja_pass_arg") else 0
    check = _FILTER_CHECKS.get(name)
    reads_only = name in _READERS.split()

    @functools.wraps(function)
    def bounded(*args: Any, **kwargs: Any) -> Any:
        budget = _BUDGET.get()
        budget.step()
        if not reads_only:
            budget.size(*args[skip:], *kwargs.values())
        if check is not None:
            check(*args[skip:], **kwargs)
        return budget.checked(function(*args, **kwargs))

    return bounded


def _concatenate(values: list[Any]) -> str:
    budget = _BUDGET.get()
    budget.step()
    budget.text(sum(budget.size(value)[1] for value in values))
    return "".join(map(str, values))


def _step(_: Any) -> bool:
    _BUDGET.get().step()
    return True


def _checked(value: Any) -> Any:
    budget = _BUDGET.get()
    budget.step()
    return budget.checked(value)


@pass_context  # a context keeps jinja from running it while compiling
def _finalize(_: Context, value: Any) -> Any:
    budget = _BUDGET.get()
    budget.emit(len(value) if isinstance(value, str) else budget.size(value)[1])
    return value


class _Generation(Extension):
    """``{% generation %}`` marks the assistant's part of a chat for training; here it is plain."""

    tags = frozenset({"generation"})  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), True)).set_lineno(line)


class _Environment(ImmutableSandboxedEnvironment):
    """transformers' environment, with every operation that can grow a value bounded."""

    intercepted_binops = frozenset(["+", "-", "*", "/", "//", "%", "**"])

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,  # nothing runs before there is a budget
            finalize=_finalize,
            extensions=[_Generation, "jinja2.ext.loopcontrols"],
        )
        self._functions = {
            "range": self.globals["range"],
            "namespace": _Namespace,
            "dict": dict,
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
        }
        self.globals.clear()
        self.globals.update(self._functions)
        self.filters = {name: _bounded(name, filter_) for name, filter_ in _FILTERS.items()}
        # Names that a template cannot spell; `_Bounds` puts them in.
        self.filters.update(
            {"mlxfuse step": _step, "mlxfuse checked": _checked, "mlxfuse ~": _concatenate}
        )

    def wrap_str_format(self, value: Any) -> None:
        if isinstance(value, types.BuiltinMethodType) and value.__name__ in ("format", "format_map"):
            _refuse("calls str.format")

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805, B902
        budget = _BUDGET.get()
        budget.step()
        budget.size(*args, *kwargs.values())
        owner = getattr(__obj, "__self__", None)
        if isinstance(__obj, types.BuiltinMethodType) and not isinstance(owner, types.ModuleType):
            methods = _METHODS.get(type(owner), {})
            if __obj.__name__ not in methods:
                _refuse(f"calls {type(owner).__name__}.{__obj.__name__}")
            check = methods[__obj.__name__]
            if check is not None:
                check(owner, *args, **kwargs)
        elif not (
            isinstance(__obj, Macro | LoopContext | Undefined)
            or isinstance(owner, LoopContext)
            or any(__obj is function for function in __self._functions.values())
        ):
            _refuse(f"calls {str(getattr(__obj, '__name__', type(__obj).__name__))!r}")
        return budget.checked(super().call(__context, __obj, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        budget = _BUDGET.get()
        budget.step()
        if operator == "%" and isinstance(left, str | bytes):
            _check_percent(str(left), right)
        elif operator == "*":
            for value, count in ((left, right), (right, left)):
                if isinstance(count, int) and isinstance(value, str | bytes | list | tuple):
                    count = max(count, 0)
                    if isinstance(value, str | bytes):
                        budget.text(count * len(value))
                    else:
                        n, chars, _ = budget.size(value)
                        budget.limit(count * n, count * chars)
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            if left.bit_length() * abs(right) > _INT_BITS:
                _refuse(f"raises {left} to a large power")
        elif operator == "+" and not isinstance(left, int | float):
            budget.size(left, right)
        return budget.checked(super().call_binop(context, operator, left, right))


class _Bounds(NodeTransformer):
    """Rewrites a parsed template so that what jinja does by itself is counted and measured too."""

    def _filter(self, name: str, node: nodes.Expr) -> nodes.Filter:
        return nodes.Filter(node, f"mlxfuse {name}", [], [], None, None, lineno=node.lineno)

    def _counted(self, node: nodes.For | nodes.Macro | nodes.CallBlock) -> nodes.Node:
        self.generic_visit(node)
        step = self._filter("step", nodes.Const(None, lineno=node.lineno))
        node.body.insert(0, nodes.ExprStmt(step, lineno=node.lineno))
        if isinstance(node, nodes.For) and node.test is not None:
            node.test = nodes.And(step, node.test, lineno=node.lineno)
        return node

    visit_For = visit_Macro = visit_CallBlock = _counted

    def _literal(self, node: Any) -> nodes.Node:
        self.generic_visit(node)
        stored = getattr(node, "ctx", "load") != "load"
        return node if stored else self._filter("checked", node)

    visit_List = visit_Tuple = visit_Dict = _literal

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        copies = isinstance(node.arg, nodes.Slice)
        return self._filter("checked", node) if copies else node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return self._filter("~", nodes.List(node.nodes, lineno=node.lineno))

    def visit_TemplateData(self, node: nodes.TemplateData) -> nodes.Node:
        return nodes.Const(node.data, lineno=node.lineno)  # goes through finalize

    def _refused(self, node: nodes.Node) -> NoReturn:
        _refuse(f"uses {{% {type(node).__name__.lower()} %}} (line {node.lineno})")

    visit_Include = visit_Import = visit_FromImport = visit_Extends = _refused
    visit_Block = visit_ScopedEvalContextModifier = visit_EvalContextModifier = _refused
