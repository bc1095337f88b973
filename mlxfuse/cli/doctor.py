"""``mlxfuse doctor``."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Annotated

import typer

from . import _options as opt
from ._common import command
from ._models import before_imports, expect_gguf


@dataclass(frozen=True, kw_only=True)
class Examined(opt.Model):
    model: Annotated[str | None, opt.model_argument("A model to judge: does it fit here?")] = None


@command("Look", "mlxfuse doctor model-Q4_K_M.gguf -c 8192")
def doctor_command(
    model: Examined,
    judged: opt.Judged,
    out: opt.Output,
) -> None:
    """Show this machine, the kernels' self-tests, and whether a model fits; loads no weights."""
    judged.check()
    bits = judged.bits()
    path = None if model.ref is None else expect_gguf(model.fetch(), "doctor")
    before_imports()
    from ..bench.doctor import diagnose, render
    from ..inspect.ranks import lines
    from ..inspect.room import machine
    from ..kernels import unavailable

    if judged.ranks is not None and path is None:
        raise typer.BadParameter("--ranks is about a model: say which")
    found = diagnose(path, judged.context, bits)
    ranks = judged.by_rank(path, machine(unavailable() is None)) if path is not None else []
    if ranks:
        found["ranks"] = ranks
    print(json.dumps(found) if out.as_json else render(found))
    if ranks and not out.as_json:
        print("", *lines(ranks), sep="\n")
