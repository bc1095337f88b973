"""Commands whose parameters are groups of options: each option is declared once."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import typing
from collections.abc import Callable
from typing import Any


def flat(function: Callable[..., None]) -> Callable[..., None]:
    """The command with the fields of its groups as parameters, in the groups' places.

    A group is a dataclass whose fields carry typer's annotations; each of the command's
    parameters is a group, or a parameter as typer reads it. typer reads the signature of what
    is returned, and ``function`` gets one instance of each group.
    """
    hints = typing.get_type_hints(function, include_extras=True)
    groups: dict[str, Any] = {n: h for n, h in hints.items() if dataclasses.is_dataclass(h)}
    parameters: list[inspect.Parameter] = []
    for name, plain in inspect.signature(function).parameters.items():
        if name not in groups:
            parameters.append(_parameter(name, hints[name], plain.default))
            continue
        of_fields = typing.get_type_hints(groups[name], include_extras=True)
        parameters += [
            _parameter(field.name, of_fields[field.name], _default(field))
            for field in dataclasses.fields(groups[name])
        ]

    @functools.wraps(function)
    def wrapper(**given: Any) -> None:
        made = {
            name: group(
                **{field.name: given.pop(field.name) for field in dataclasses.fields(group)}
            )
            for name, group in groups.items()
        }
        function(**made, **given)

    wrapper.__dict__["__signature__"] = inspect.Signature(parameters)
    wrapper.__annotations__ = {p.name: p.annotation for p in parameters}
    return wrapper


def _default(field: dataclasses.Field[Any]) -> Any:
    factory = field.default_factory
    return field.default if factory is dataclasses.MISSING else factory()


def _parameter(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    if default is dataclasses.MISSING:
        default = inspect.Parameter.empty
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation
    )
