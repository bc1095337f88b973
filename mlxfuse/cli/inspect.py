"""``mlxfuse inspect``."""

from __future__ import annotations

import json

from . import _options as opt
from ._common import app, command, one_model, resolve_model


@app.command("inspect", rich_help_panel="Look")
@command
def inspect_command(
    model: opt.ModelArgument = None,
    model_option: opt.ModelOption = None,
    revision: opt.Revision = None,
    as_json: opt.Json = False,
    debug: opt.Debug = False,
) -> None:
    """Show what a model's header tells; no weight is read."""
    from ..inspect.header import inspect, render

    summary = inspect(resolve_model(one_model(model, model_option), revision, True))
    print(json.dumps(summary) if as_json else render(summary))
