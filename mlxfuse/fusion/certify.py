"""Is a class's `__call__` one of the known bodies? Compared as syntax, with what its names mean."""

from __future__ import annotations

import ast
import inspect
import re
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from types import CodeType, FunctionType
from typing import Any

import mlx.nn as nn

from .bodies.attentions import ATTENTIONS
from .bodies.delta_nets import DELTA_NETS
from .bodies.mlps import BODIES, WEIGHTED_SUMS, Body

KNOWN = (*ATTENTIONS, *BODIES, *DELTA_NETS)


@dataclass(frozen=True)
class Match:
    """A class's body is known.

    names  capitals of the known text -> attribute of this class.
    """

    body: Body
    names: dict[str, str]


def certify(cls: type[nn.Module], kind: str) -> Match | str:
    """The known body of ``kind`` that the class has, or why it has none."""
    call = cls.__call__
    # What names mean may change; text cannot.
    match = _elsewhere(cls) or _alike(cls, call, kind)
    if isinstance(match, Match):
        wrong = _wrong_global(match.body, call.__globals__)
        if wrong is not None:
            return f"{_name(cls)}.__call__ has another {wrong}"
    return match


def summing(cls: type[nn.Module]) -> tuple[str, Callable[..., Any]] | str:
    """The class's `__call__` with the weighted sum over experts left to them, or why there is none.

    All but the sum is as it was: the method's own text, with the same globals and defaults.

    Returns:
        Name of the experts, which are called with ``(x, ids, scores, cast=)``, and the function.
    """
    call = cls.__call__
    found = _elsewhere(cls) or _summing(cls, call)
    if not isinstance(found, str) and call.__globals__.get("mx") is not sys.modules["mlx.core"]:
        return f"{_name(cls)}.__call__ has another mx"
    return found


@cache
def _summing(
    cls: type[nn.Module], call: Callable[..., Any]
) -> tuple[str, Callable[..., Any]] | str:
    source = _source(cls, call)
    if not source.startswith("def "):
        return source
    text = ast.unparse(ast.parse(source)) + "\n"
    found = next(filter(None, (re.search(p, text, re.MULTILINE) for p in WEIGHTED_SUMS)), None)
    if found is None:
        return f"{_name(cls)}.__call__ has no weighted sum that is known"
    y, rest = found["y"], text[found.end() :]
    if found["into"] != f"{y} = " and re.search(rf"\b{y}\b", rest):
        return f"{_name(cls)}.__call__ uses {y} after the weighted sum"
    arguments = f"{found['x']}, {found['ids']}, {found['scores']}, cast={bool(found['cast'])}"
    whole = f"{found['into']}self.{found['experts']}({arguments})\n"
    # What is run is what runs now: the file may be another since it was imported.
    if not any(_same_code(call.__code__, code) for code in _compiled(_file(call))):
        return f"{_name(cls)}.__call__ has another source"
    # Within a class of the same name, for the sake of private names; nothing of it is executed.
    lines = f"class {cls.__name__}:\n" + textwrap.indent(
        text[: found.start("y")] + whole + rest, " "
    )
    body = next(code for code in _compiled(lines) if code.co_name == "__call__")
    made = FunctionType(body, call.__globals__, "__call__", call.__defaults__)
    made.__kwdefaults__ = call.__kwdefaults__
    return found["experts"], made


def _file(call: Callable[..., Any]) -> str:
    """All of the file, or of the notebook's cell, that a method is from."""
    return "".join(inspect.findsource(call.__code__)[0])


def _compiled(text: str) -> Iterator[CodeType]:
    # A notebook's cell may await.
    flags = ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
    return _codes(compile(text, "<without its sum>", "exec", flags, dont_inherit=True))


def _codes(code: CodeType) -> Iterator[CodeType]:
    """It and all within."""
    yield code
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from _codes(inner)


def _same_code(a: CodeType, b: CodeType) -> bool:
    same = ("co_firstlineno", "co_name", "co_code", "co_consts", "co_names", "co_varnames")
    return all(getattr(a, name) == getattr(b, name) for name in same)


def _elsewhere(cls: type[nn.Module]) -> str | None:
    if getattr(sys.modules.get(cls.__module__), cls.__qualname__, None) is not cls:
        return f"{_name(cls)} is not the class that its module has under this name"
    return None


def _name(cls: type[nn.Module]) -> str:
    return f"{cls.__module__.removeprefix('mlx_lm.models.')}.{cls.__qualname__}"


@cache
def _alike(cls: type[nn.Module], call: Callable[..., Any], kind: str) -> Match | str:
    """The known body of which the class's has the text, or why there is none."""
    source = _source(cls, call)
    if not source.startswith("def "):
        return source
    try:
        found = parse(source)
    except SyntaxError:
        return f"{_name(cls)}.__call__ has no source"
    for body in KNOWN:
        names = unify(_known(body.source), found) if body.kind == kind else None
        if names is not None:
            return Match(body, names)
    return f"{_name(cls)}.__call__ is not a body that is known"


def _source(cls: type[nn.Module], call: Callable[..., Any]) -> str:
    """The text of the class's own plain method, or why there is none."""
    name = _name(cls)
    if "__call__" not in vars(cls):
        # It may have changed anything that the body relies on.
        return f"{name} is a subclass without a __call__ of its own"
    code = getattr(call, "__code__", None)
    if code is None or call.__closure__ or hasattr(call, "__wrapped__"):
        return f"{name}.__call__ is wrapped"
    try:
        text = textwrap.dedent(inspect.getsource(code))
    except (OSError, TypeError):
        return f"{name}.__call__ has no source"
    return text if text.startswith("def ") else f"{name}.__call__ is no plain method"


def _wrong_global(body: Body, scope: dict[str, Any]) -> str | None:
    """The first global name that is not what the body needs."""
    for name, path in body.names.items():
        if name not in scope or scope[name] is not _resolve(path):
            return name
    return None


def _resolve(path: str) -> object:
    """A module, or an attribute of one, that is imported already."""
    if path in sys.modules:
        return sys.modules[path]
    module, _, name = path.rpartition(".")
    return getattr(sys.modules.get(module), name, None)


@cache
def _known(source: str) -> ast.FunctionDef:
    return parse(source)


def parse(source: str) -> ast.FunctionDef:
    """A method without docstring, annotations and differences that mean nothing.

    ``a, b = f(), g()`` is two assignments, keywords are in order, and what is only named to be
    returned is returned.
    """
    (function,) = ast.parse(textwrap.dedent(source)).body
    if not isinstance(function, ast.FunctionDef) or function.decorator_list:
        raise SyntaxError("not a plain method")
    function.returns = None
    for node in ast.walk(function):
        if isinstance(node, ast.arg):
            node.annotation = None
        elif isinstance(node, ast.Call):
            node.keywords.sort(key=lambda k: k.arg or "")
    first = function.body[0]
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
        del function.body[0]
    function.body = [s for statement in function.body for s in _apart(statement)]
    _return_at_once(function.body)
    return function


@cache
def readers(cls: type[nn.Module]) -> tuple[str, ...]:
    """The children that a class's `__call__` gives its own input to, as it is written."""
    try:
        function = parse(inspect.getsource(cls.__call__))
    except (OSError, SyntaxError, TypeError):
        return ()
    if len(function.args.args) < 2:
        return ()
    x, found = function.args.args[1].arg, dict[str, None]()
    for statement in function.body:
        for node in ast.walk(statement):
            match node:
                case ast.Call(
                    func=ast.Attribute(ast.Name("self"), name), args=[ast.Name(argument), *_]
                ) if argument == x:
                    found[name] = None
        if isinstance(statement, ast.Assign) and x in _locals(statement):
            break
    return tuple(found)


def _apart(statement: ast.stmt) -> list[ast.stmt]:
    """``a, b = f(), g()`` as two assignments, where g does not read a."""
    if not (isinstance(statement, ast.Assign) and len(statement.targets) == 1):
        return [statement]
    target, value = statement.targets[0], statement.value
    if not (isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple)):
        return [statement]
    written = {t.id for t in target.elts if isinstance(t, ast.Name)}
    read = {n.id for n in ast.walk(value) if isinstance(n, ast.Name)}
    if len(written) != len(value.elts) or written & read:
        return [statement]
    return [
        ast.Assign([t], v, lineno=statement.lineno)
        for t, v in zip(target.elts, value.elts, strict=True)
    ]


def _return_at_once(body: list[ast.stmt]) -> None:
    """``r = f(); return r`` as ``return f()``."""
    if len(body) < 2:
        return
    named, last = body[-2:]
    if (
        isinstance(last, ast.Return)
        and isinstance(last.value, ast.Name)
        and isinstance(named, ast.Assign)
        and isinstance(named.targets[0], ast.Name)
        and named.targets[0].id == last.value.id
    ):
        body[-2:] = [ast.Return(named.value)]


def unify(known: ast.AST, found: ast.AST) -> dict[str, str] | None:
    """What the capitals of ``known`` are in ``found``, or None if they are different methods."""
    slots: dict[str, str] = {}
    there: dict[str, str] = {}
    back: dict[str, str] = {}
    local, local_found = _locals(known), _locals(found)

    def same(a: Any, b: Any) -> bool:
        if isinstance(a, list):
            return (
                isinstance(b, list)
                and len(a) == len(b)
                and all(same(x, y) for x, y in zip(a, b, strict=True))
            )
        if type(a) is not type(b):
            return False
        if isinstance(a, ast.Name):
            if a.id in local or b.id in local_found:
                return there.setdefault(a.id, b.id) == b.id and back.setdefault(b.id, a.id) == a.id
            return bool(a.id == b.id)
        if isinstance(a, ast.Attribute) and a.attr.isupper():
            return same(a.value, b.value) and slots.setdefault(a.attr, b.attr) == b.attr
        if isinstance(a, ast.AST):
            return all(same(x, y) for (_, x), (_, y) in zip(_fields(a), _fields(b), strict=True))
        return bool(a == b)

    return slots if same(known, found) else None


def _locals(tree: ast.AST) -> set[str]:
    return {
        n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)
    }


def _fields(node: ast.AST) -> Iterable[tuple[str, Any]]:
    return [(f, getattr(node, f, None)) for f in node._fields if f not in ("ctx", "type_comment")]
