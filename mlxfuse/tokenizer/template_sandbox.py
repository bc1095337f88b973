"""The jinja environment of chat templates: transformers', with every operation bounded.

1. Every loop turn, macro, call and filter counts a step, and steps check a deadline.
2. No operation makes a value beyond a limit, which is checked before it runs; so no step is long.
3. Only functions, methods and filters known to keep rule 2 may be called.
"""

from __future__ import annotations

import datetime
import functools
import json
import re
import types
from collections.abc import Callable
from typing import Any, NoReturn

from jinja2 import nodes, pass_context
from jinja2.ext import Extension
from jinja2.filters import FILTERS
from jinja2.parser import Parser
from jinja2.runtime import Context, LoopContext, Macro, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.tests import TESTS
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from ..errors import MLXFuseError
from .template_budget import current, refuse

_WIDTH_LIMIT = 1000


class _Namespace(Namespace):
    """jinja's, but opaque: what it holds is not in its repr, and so not in its size."""

    def __repr__(self) -> str:
        return "<Namespace>"


def _width(what: str, *widths: Any) -> None:
    for width in widths:
        if isinstance(width, int) and abs(width) > _WIDTH_LIMIT:
            refuse(f"asks {what} for a width or count of {width}")


def _check_replace(text: Any, old: Any, new: Any, *_: Any) -> None:
    text, old, new = str(text), str(old), str(new)
    count = text.count(old) if old else len(text) + 1
    current().text(len(text) + count * (len(new) - len(old)))


def _check_join(separator: Any, values: Any) -> None:
    budget = current()
    count, chars, _ = budget.size(values)
    budget.text(chars + count * len(str(separator)))


def _check_percent(form: str, values: Any) -> None:
    """Bounds ``form % values``: each conversion puts out at most the longest value or width."""
    budget = current()
    if re.search(r"%[^%a-zA-Z]*(\*|\d{4,})", form):
        refuse("formats with a width beyond 999")
    budget.text(len(form) + form.count("%") * (budget.size(values)[1] + _WIDTH_LIMIT))


_STR_METHODS = """capitalize casefold count endswith find index isalnum isalpha isascii isdecimal
isdigit isidentifier islower isnumeric isprintable isspace istitle isupper lower lstrip partition
removeprefix removesuffix rfind rindex rpartition rsplit rstrip split splitlines startswith strip
swapcase title upper"""
# Methods that return at most a small multiple of what they are given, with their checks.
_METHODS: dict[type, dict[str, Callable[..., None] | None]] = {
    str: {
        **dict.fromkeys(_STR_METHODS.split()),
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
    budget = current()
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
        refuse("asks strftime_now for a width")
    return datetime.datetime.now().strftime(form)


def _plain_escape(value: Any) -> str:
    # Text stays str: nothing else here escapes, and Markup would on every operation.
    return str(FILTERS["escape"](value))


def _indent_check(text: Any, width: Any = 4, *_: Any, **__: Any) -> None:
    _width("indent", width)
    lines = str(text).count("\n") + 1
    current().text(len(str(text)) + lines * (len(width) if isinstance(width, str) else int(width)))


def _sum_check(values: Any, *_: Any, **__: Any) -> None:
    # Adding lists up copies the sum at each turn.
    if all(isinstance(value, int | float) for value in values):
        return
    if len(values) * current().size(values)[0] > 10_000_000:
        refuse("adds up too many lists")


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
        budget = current()
        budget.step()
        if not reads_only:
            budget.size(*args[skip:], *kwargs.values())
        if check is not None:
            check(*args[skip:], **kwargs)
        return budget.checked(function(*args, **kwargs))

    return bounded


def _stepped(test: Any) -> Callable[..., Any]:
    """The test ``test``, counted: filters like select run one on every value by themselves."""

    @functools.wraps(test)
    def stepped(*args: Any, **kwargs: Any) -> Any:
        current().step()
        return test(*args, **kwargs)

    return stepped


def _concatenate(values: list[Any]) -> str:
    budget = current()
    budget.step()
    budget.text(sum(budget.size(value)[1] for value in values))
    text: str = budget.checked("".join(map(str, values)))
    return text


def _step(_: Any) -> bool:
    current().step()
    return True


def _checked(value: Any) -> Any:
    budget = current()
    budget.step()
    return budget.checked(value)


def _sliced(value: Any) -> Any:
    # A slice is within the limits if what it was cut from is.
    current().count(len(value) if isinstance(value, str) else 8 * len(value))
    return value


@pass_context  # a context keeps jinja from running it while compiling
def _finalize(_: Context, value: Any) -> Any:
    budget = current()
    budget.emit(len(value) if isinstance(value, str) else budget.size(value)[1])
    return value


class _Generation(Extension):
    """``{% generation %}`` marks the assistant's part of a chat for training; here it is plain."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), True)).set_lineno(line)


class Environment(ImmutableSandboxedEnvironment):
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
        self.tests = {name: _stepped(test) for name, test in TESTS.items()}
        # Names that a template cannot spell; `Bounds` puts them in.
        self.filters.update(
            {
                "mlxfuse step": _step,
                "mlxfuse checked": _checked,
                "mlxfuse sliced": _sliced,
                "mlxfuse ~": _concatenate,
            }
        )

    def wrap_str_format(self, value: Any) -> None:
        if isinstance(value, types.BuiltinMethodType) and value.__name__ in (
            "format",
            "format_map",
        ):
            refuse("calls str.format")

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        budget = current()
        budget.step()
        budget.size(*args, *kwargs.values())
        owner = getattr(__obj, "__self__", None)
        if isinstance(__obj, types.BuiltinMethodType) and not isinstance(owner, types.ModuleType):
            methods = _METHODS.get(type(owner), {})
            if __obj.__name__ not in methods:
                refuse(f"calls {type(owner).__name__}.{__obj.__name__}")
            budget.size(owner)
            check = methods[__obj.__name__]
            if check is not None:
                check(owner, *args, **kwargs)
        elif not (
            isinstance(__obj, Macro | LoopContext | Undefined)
            or isinstance(owner, LoopContext)
            or any(__obj is function for function in __self._functions.values())
        ):
            refuse(f"calls {str(getattr(__obj, '__name__', type(__obj).__name__))!r}")
        return budget.checked(super().call(__context, __obj, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        budget = current()
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
            budget.bits(left.bit_length() * abs(right))
        elif operator == "+" and not isinstance(left, int | float):
            budget.size(left, right)
        return budget.checked(super().call_binop(context, operator, left, right))


class Bounds(NodeTransformer):
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

    visit_List = visit_Tuple = visit_Dict = visit_Compare = _literal

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        return self._filter("sliced", node) if isinstance(node.arg, nodes.Slice) else node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return self._filter("~", nodes.List(node.nodes, lineno=node.lineno))

    def visit_TemplateData(self, node: nodes.TemplateData) -> nodes.Node:
        return nodes.Const(node.data, lineno=node.lineno)  # goes through finalize

    def _refused(self, node: nodes.Node) -> NoReturn:
        refuse(f"uses {{% {type(node).__name__.lower()} %}} (line {node.lineno})")

    visit_Include = visit_Import = visit_FromImport = visit_Extends = _refused
    visit_Block = visit_ScopedEvalContextModifier = visit_EvalContextModifier = _refused
