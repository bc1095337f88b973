"""``mlxfuse inspect``."""

from __future__ import annotations

import json

from . import _options as opt
from ._common import command


@command("Look", "mlxfuse inspect model-Q4_K_M.gguf --json")
def inspect_command(model: opt.Model, judged: opt.Judged, out: opt.Output) -> None:
    """Show what a model's header tells, and whether it fits here; no weight is read."""
    from ..hub.folders import is_checkpoint
    from ..inspect.checkpoint import inspect_checkpoint, render_checkpoint
    from ..inspect.header import inspect, render

    bits = judged.bits()
    path = model.fetch()
    whole = is_checkpoint(path)
    summary = inspect_checkpoint(path) if whole else inspect(path, judged.context, bits)
    shown = render_checkpoint if whole else render
    print(json.dumps(summary) if out.as_json else shown(summary))
