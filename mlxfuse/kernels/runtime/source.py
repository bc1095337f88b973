"""The Metal sources: where they are, the parts of them that a kernel needs, and their bench."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

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


@cache
def bench() -> Callable[..., Any]:
    """The test bench's stand-in for `mx.fast.metal_kernel`.

    It is loaded by its path under a private name, so that no other ``tests`` package is ever
    imported in its place.
    """
    folder = checkout() / "tests" / "msl"
    name = "_mlxfuse_msl"
    if not (folder / "emulate.py").is_file():
        raise KernelError(
            f"MLXFUSE_KERNELS=emulated needs a checkout: expected the test bench at {folder}"
        )
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(
            name, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    factory: Callable[..., Any] = sys.modules[name].metal_kernel
    return factory
