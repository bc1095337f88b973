"""How large a chat template's filters and methods of texts may make what they are given.

Each function tells a size before anything of it is made; what counts is checked while it counts,
so that a list that holds one long text a million times is never gone through whole.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from typing import Any

Check = Callable[[int], None]
"""Refuses a size; called while sizes are counted."""

# Filters that begin with the text of their value, whatever it is.
TEXTS = (
    *("capitalize", "center", "e", "escape", "forceescape", "format", "indent", "lower", "pprint"),
    *("replace", "string", "striptags", "title", "tojson", "trim", "truncate", "upper"),
    *("urlencode", "urlize", "wordcount", "wordwrap", "xmlattr"),
)
_FIELD = re.compile(r"\{[^{}]*\d{5}")


def extent(value: Any, check: Check) -> int:
    """Characters of the text of ``value``, about: of plain data all that it holds."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Mapping):
        parts: Iterable[Any] = chain.from_iterable(value.items())
    elif isinstance(value, list | tuple):
        parts = value
    else:
        return 1
    total = 2
    check(3 * len(value))
    for part in parts:
        total += 2 + extent(part, check)
        check(total)
    return total


def grown(name: str, check: Check, value: Any, /, *args: Any, **kwargs: Any) -> int:
    """Characters that the filter or the method ``name`` makes of ``value`` at most, about."""
    size = extent(value, check)
    given = [*args, *kwargs.values()]
    texts = sum(extent(item, check) for item in given if not isinstance(item, int))
    numbers = sum(abs(item) for item in given if isinstance(item, int))
    text = value if isinstance(value, str) else ""
    if name == "replace" and len(given) > 1:
        return size + (text.count(str(given[0])) if text else size) * extent(given[1], check)
    if name == "format":
        if _FIELD.search(text):
            return size + 10**10
        return size + (text.count("{") + text.count("%")) * texts
    if name == "indent":
        return size + (text.count("\n") + 1) * (texts + numbers)
    if name == "expandtabs":
        return size + text.count("\t") * numbers
    if name == "tojson":
        return size * (1 + texts + numbers)
    if name in ("format_map", "translate", "wordwrap", "urlize"):
        return size * (1 + texts)
    if name == "join":  # a method of what is between the values
        return size * len(given[0]) + texts
    return size
