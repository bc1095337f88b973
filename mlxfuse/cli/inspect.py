"""``mlxfuse inspect``."""

from __future__ import annotations

import json

from . import _options as opt
from ._common import command


@command("Look", "mlxfuse inspect model-Q4_K_M.gguf --json")
def inspect_command(model: opt.Model, out: opt.Output) -> None:
    """Show what a model's header tells; no weight is read."""
    from ..inspect.header import inspect, render

    summary = inspect(model.fetch())
    print(json.dumps(summary) if out.as_json else render(summary))
