"""``mlxfuse doctor``."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from . import _options as opt
from ._common import app, before_imports, command, one_model, resolve_model


@app.command("doctor", rich_help_panel="Look")
@command
def doctor_command(
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="A model to judge: does it fit here?")
    ] = None,
    model_option: opt.ModelOption = None,
    revision: opt.Revision = None,
    context: Annotated[
        int,
        opt.of_model(
            "Tokens it is to be used with (default: all it can).", "-c", "--ctx-size", min=0
        ),
    ] = 0,
    as_json: opt.Json = False,
    debug: opt.Debug = False,
) -> None:
    """Show this machine, the kernels' self-tests, and whether a model fits; loads no weights."""
    ref = one_model(model, model_option)
    path = None if ref is None else resolve_model(ref, revision, True)
    before_imports()
    from ..bench.doctor import diagnose, render

    found = diagnose(path, context)
    print(json.dumps(found) if as_json else render(found))
