"""The Metal sources: where they are, and the parts of them that a kernel needs."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

from ...errors import KernelError

_PACKAGE = Path(__file__).resolve().parents[2]
_SECTION = re.compile(r"^//@ (\w+):(.*)$", re.M)
_COMMENT = re.compile(r"//[^\n]*")
# A space between two names, or between two operators that might make a third, stays.
_SPACE = re.compile(
    r"(?<=\w) (?=\W)|(?<=\W) (?=\w)|(?<=[^\w+\-&|<>=*/]) (?=\W)|(?<=\W) (?=[^\w+\-&|<>=*/])"
)


def checkout() -> Path:
    """The folder that holds the package; the root of the repository in a checkout."""
    return _PACKAGE.parent


def metal_dir() -> Path:
    """``mlxfuse/metal`` as the wheel installs it, else ``metal`` beside the package.

    Raises:
        KernelError: neither exists.
    """
    for folder in (_PACKAGE / "metal", checkout() / "metal"):
        if (folder / "common.h").is_file():
            return folder
    raise KernelError(
        f"the Metal sources are missing: expected {_PACKAGE / 'metal'} or {checkout() / 'metal'}; "
        "reinstall mlxfuse"
    )


@cache
def header(parts: tuple[str, ...]) -> str:
    """The text of ``common.h`` and of the parts, each once and after what it needs.

    Args:
        parts: ``"file"`` for what precedes the first section of a file, which comes along with
            any of its sections, or ``"file:section"``.

    MLX rebuilds and hashes a kernel's whole text at every call, so comments, blank lines and
    spaces that separate nothing are left out.
    """
    wanted: dict[str, None] = {"common.h": None}
    for part in parts:
        _need(part, wanted)
    return "".join(_sections(part.partition(":")[0])[part.partition(":")[2]][1] for part in wanted)


def _need(part: str, wanted: dict[str, None]) -> None:
    file, _, section = part.partition(":")
    sections = _sections(file)
    if section not in sections:
        raise KernelError(f"{file} has no section {section!r}; it has {sorted(sections)}")
    wanted.setdefault(file)
    for other in sections[section][0]:
        _need(f"{file}:{other}", wanted)
    wanted.setdefault(part)


@cache
def _sections(file: str) -> dict[str, tuple[tuple[str, ...], str]]:
    """Section name -> (the sections it needs, its text); the head of the file is ''."""
    text = (metal_dir() / file).read_text(encoding="ascii")
    head, *rest = _SECTION.split(text)
    found: dict[str, tuple[tuple[str, ...], str]] = {"": ((), _squeeze(head))}
    for name, needs, body in zip(rest[::3], rest[1::3], rest[2::3], strict=True):
        found[name] = (tuple(needs.split()), _squeeze(body))
    return found


def _squeeze(text: str) -> str:
    lines = (line.strip() for line in _COMMENT.sub("", text).splitlines())
    # In a preprocessor's line a space may end the name of a macro.
    return "".join(f"{x if x[0] == '#' else _SPACE.sub('', x)}\n" for x in lines if x)
