"""Is a class's `__call__` one of the known bodies? Compared as syntax, with what its names mean."""

from __future__ import annotations

import ast
import inspect
import sys
import textwrap
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..errors import NotFusible
from .bodies.attentions import ATTENTIONS
from .bodies.delta_nets import DELTA_NETS
from .bodies.layers import LAYERS
from .bodies.mambas import MAMBAS
from .bodies.mlps import BODIES, Body
from .bodies.moes import MOES

KNOWN = (*ATTENTIONS, *BODIES, *LAYERS, *MOES, *DELTA_NETS, *MAMBAS)


@dataclass(frozen=True)
class Match:
    """A class's body is known.

    names      capitals of the known text -> attribute of this class.
    functions  the known functions that it calls.
    """

    body: Body
    names: dict[str, str]
    functions: tuple[Body, ...] = ()

    @property
    def form(self) -> Mapping[str, Any]:
        return {k: v for body in (self.body, *self.functions) for k, v in body.form.items()}


def certify(cls: type[nn.Module], kind: str) -> Match:
    """The known body of ``kind`` that the class has.

    Raises:
        NotFusible: it has none.
    """
    call = cls.__call__
    _check_plain(cls, call)
    match = _alike(cls, call, kind)
    if match is None:
        raise NotFusible(f"{_name(cls)}.__call__ is not a body that is known")
    # What names mean may change; text cannot.
    for name, path in match.body.names.items():
        if call.__globals__.get(name) is not _resolve(path):
            raise NotFusible(f"{_name(cls)}.__call__ has another {name}")
    wanted = match.body.functions.items()
    functions = (_function(cls, call.__globals__.get(name), name, known) for name, known in wanted)
    return replace(match, functions=tuple(functions))


def _function(cls: type[nn.Module], found: Any, name: str, kind: str) -> Body:
    """The known function that a method calls by a global name; it may be compiled by MLX."""
    if vars(sys.modules[cls.__module__]).get("mx") is mx:
        with suppress(OSError, TypeError, SyntaxError):
            text = textwrap.dedent(inspect.getsource(found)).removeprefix("@mx.compile\n")
            match = _matching(parse(text), kind)
            if match is not None:
                return match.body
    raise NotFusible(f"{_name(cls)}.__call__ has another {name}")


def certify_method(cls: type[nn.Module], name: str, bodies: Iterable[Body]) -> None:
    """Whether the method, the class's own or inherited, is one of the bodies.

    Raises:
        NotFusible: it is none.
    """
    method, which = getattr(cls, name, None), f"{_name(cls)}.{name}"
    if not inspect.isfunction(method) or method.__closure__ or hasattr(method, "__wrapped__"):
        raise NotFusible(f"{which} is no plain method")
    found = _parsed(cls, method)
    for body in bodies:
        if unify(_known(body.source), found) is None:
            continue
        for known, path in body.names.items():
            if method.__globals__.get(known) is not _resolve(path):
                raise NotFusible(f"{which} has another {known}")
        return
    raise NotFusible(f"{which} is not a body that is known")


def is_known(cls: type[nn.Module], kind: str) -> bool:
    """Whether `certify` finds a body."""
    try:
        certify(cls, kind)
    except NotFusible:
        return False
    return True


def _check_plain(cls: type[nn.Module], call: Callable[..., Any]) -> None:
    """Raise unless the class has a plain method of its own."""
    name = _name(cls)
    if getattr(sys.modules.get(cls.__module__), cls.__qualname__, None) is not cls:
        raise NotFusible(f"{name} is not the class that its module has under this name")
    if "__call__" not in vars(cls):
        # It may have changed anything that the body relies on.
        raise NotFusible(f"{name} is a subclass without a __call__ of its own")
    if getattr(call, "__code__", None) is None or call.__closure__ or hasattr(call, "__wrapped__"):
        raise NotFusible(f"{name}.__call__ is wrapped")


def _name(cls: type[nn.Module]) -> str:
    return f"{cls.__module__.removeprefix('mlx_lm.models.')}.{cls.__qualname__}"


@cache
def _alike(cls: type[nn.Module], call: Callable[..., Any], kind: str) -> Match | None:
    """The known body of which the class's has the text, if there is one."""
    return _matching(_parsed(cls, call), kind)


def _matching(found: ast.FunctionDef, kind: str) -> Match | None:
    for body in KNOWN:
        if body.kind == kind:
            unified = find_fragment if body.fragment else unify
            names = unified(_known(body.source), found)
            if names is not None:
                return Match(body, names)
    return None


@cache
def _parsed(cls: type[nn.Module], call: Callable[..., Any]) -> ast.FunctionDef:
    """The class's own plain method."""
    name = f"{_name(cls)}.{call.__name__}"
    try:
        text = textwrap.dedent(inspect.getsource(call.__code__))
    except (OSError, TypeError) as error:
        raise NotFusible(f"{name} has no source") from error
    if not text.startswith("def "):
        raise NotFusible(f"{name} is no plain method")
    try:
        return parse(text)
    except SyntaxError as error:
        raise NotFusible(f"{name} has no source") from error


def _resolve(path: str) -> object:
    """A module, or an attribute of one, that is imported already."""
    if path in sys.modules:
        return sys.modules[path]
    module, _, name = path.rpartition(".")
    return getattr(sys.modules.get(module), name, NotFusible)


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


def inputs(cls: type[nn.Module]) -> tuple[str, ...]:
    """The children that a class's plain `__call__` calls once, whatever happens, and with nothing
    but its own input, as it came: their results may be computed beforehand.

    Raises:
        NotFusible: there is no such method.
    """
    _check_plain(cls, cls.__call__)
    return _inputs(cls, cls.__call__)


@cache
def _inputs(cls: type[nn.Module], call: Callable[..., Any]) -> tuple[str, ...]:
    function = _parsed(cls, call)
    if len(function.args.args) < 2:
        return ()
    x = function.args.args[1].arg
    uses = Counter(n.attr for n in ast.walk(function) if isinstance(n, ast.Attribute))
    found: list[str] = []
    for statement in function.body:
        for node in _always(statement):
            match node:
                case ast.Call(
                    func=ast.Attribute(ast.Name("self"), name), args=[ast.Name(given)], keywords=[]
                ) if given == x and uses[name] == 1:
                    found.append(name)
        if x in _locals(statement) or any(_sets_part_of(x, n) for n in ast.walk(statement)):
            break
    return tuple(found)


def _sets_part_of(x: str, node: ast.AST) -> bool:
    """Whether it is ``x[...]`` that is assigned to."""
    if not (isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store)):
        return False
    return isinstance(node.value, ast.Name) and node.value.id == x


# What is within these may be evaluated later, several times or not at all.
_SOMETIMES = (
    *(ast.If, ast.For, ast.While, ast.Try, ast.With, ast.FunctionDef, ast.Lambda),
    *(ast.IfExp, ast.BoolOp, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp),
)


def _always(node: ast.AST) -> Iterator[ast.AST]:
    """The node and the nodes in it that are evaluated exactly once."""
    if not isinstance(node, _SOMETIMES):
        yield node
        for child in ast.iter_child_nodes(node):
            yield from _always(child)


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
    return _unified(known, found, _locals(known), _locals(found))


def find_fragment(known: ast.FunctionDef, found: ast.FunctionDef) -> dict[str, str] | None:
    """`unify` for the statements of ``known`` somewhere in ``found``, one after the other.

    The last one gives a value, which may be assigned or returned. What the statements assign is
    not used by any other, but for that value; attributes in capitals occur nowhere else.
    """
    last = known.body[-1]
    assert isinstance(last, ast.Return)
    local = {n.id for n in ast.walk(known) if isinstance(n, ast.Name)} - {"self", "mx"}
    everywhere = (_locals(found) | {a.arg for a in found.args.args}) - {"self"}
    count = len(known.body)
    for body in _bodies(found):
        for at in range(len(body) - count + 1):
            *before, end = body[at : at + count]
            if not isinstance(end, ast.Assign | ast.Return) or end.value is None:
                continue
            # The value alone, whatever becomes of it.
            whole = ast.Module([*before, ast.Return(end.value)], [])
            names = _unified(ast.Module(known.body, []), whole, local, everywhere)
            if names is not None and _used_once(found, before, end, set(names.values())):
                return names
    return None


def _bodies(node: ast.FunctionDef | ast.If) -> Iterator[list[ast.stmt]]:
    """Every list of statements in it that is run once."""
    for statements in (node.body, getattr(node, "orelse", [])):
        yield statements
        for statement in statements:
            if isinstance(statement, ast.If):
                yield from _bodies(statement)


def _used_once(
    function: ast.FunctionDef, before: Sequence[ast.stmt], end: ast.stmt, attributes: set[str]
) -> bool:
    """Whether a fragment's attributes are used in it alone, and its variables not behind it."""
    own = {name for statement in before for name in _locals(statement)} - _locals(end)
    inside = {id(n) for statement in (*before, end) for n in ast.walk(statement)}
    return not any(
        (isinstance(n, ast.Name) and n.id in own and n.lineno > end.lineno)
        or (isinstance(n, ast.Attribute) and n.attr in attributes)
        for n in ast.walk(function)
        if id(n) not in inside
    )


def _unified(
    known: ast.AST, found: ast.AST, local: set[str], local_found: set[str]
) -> dict[str, str] | None:
    slots: dict[str, str] = {}
    there: dict[str, str] = {}
    back: dict[str, str] = {}

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
