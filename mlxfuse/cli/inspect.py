"""``mlxfuse inspect``."""

from __future__ import annotations

import json

from ._common import app, command, one_model, resolve_model
from ._options import Debug, Json, ModelArgument, ModelOption, Revision


@app.command("inspect", rich_help_panel="Look")
@command
def inspect_command(
    model: ModelArgument = None,
    model_option: ModelOption = None,
    revision: Revision = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show what a model's header tells; no weight is read."""
    from ..inspect import inspect, render

    summary = inspect(resolve_model(one_model(model, model_option), revision, True))
    print(json.dumps(summary) if as_json else render(summary))
