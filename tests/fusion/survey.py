"""``python -m tests.fusion.survey``: the classes that each known body covers."""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Iterator
from importlib import import_module
from itertools import chain
from pkgutil import iter_modules

import mlx.nn as nn
import mlx_lm.models

from mlxfuse.fusion.certify import KNOWN, certify, is_known
from mlxfuse.models import families

PACKAGES = (mlx_lm.models, families)


def classes() -> Iterator[type[nn.Module]]:
    """Every module with a ``__call__`` of its own that mlx-lm's model files and ours define, and
    two of MLX's that they use.
    """
    yield from (nn.RMSNorm, nn.RoPE)
    for found in chain(*(iter_modules(p.__path__, p.__name__ + ".") for p in PACKAGES)):
        try:
            module = import_module(found.name)
        except (ImportError, SystemExit):  # olmo ends the process where ai2-olmo is missing
            continue
        for value in vars(module).values():
            if (
                inspect.isclass(value)
                and issubclass(value, nn.Module)
                and value.__module__ == module.__name__
                and "__call__" in vars(value)
            ):
                yield value


def covered() -> dict[int, list[str]]:
    """Index in `KNOWN` -> names of the classes that have the body."""
    found: dict[int, list[str]] = defaultdict(list)
    for cls in classes():
        for kind in dict.fromkeys(body.kind for body in KNOWN):
            if is_known(cls, kind):
                match = certify(cls, kind)
                name = f"{cls.__module__.rpartition('.')[2]}.{cls.__qualname__}"
                for body in (match.body, *match.functions):
                    found[KNOWN.index(body)].append(name)
    return found


def main() -> None:
    found = covered()
    print("| body of | classes | such as |\n| --- | --- | --- |")
    for i, body in enumerate(KNOWN):
        names = found[i]
        print(f"| {body.kind} | {len(names)} | {', '.join(names[:4])} |")
    for kind in ("attention", "mlp", "block"):
        total = sum(len(found[i]) for i, body in enumerate(KNOWN) if body.kind == kind)
        print(f"{kind}: {total} classes")


if __name__ == "__main__":
    main()
