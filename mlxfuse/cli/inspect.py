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
    from ..inspect.ranks import lines
    from ..memory import machine

    judged.check()
    bits = judged.bits()
    path = model.fetch()
    whole = is_checkpoint(path)
    summary = inspect_checkpoint(path) if whole else inspect(path, judged.context, bits)
    ranks = judged.by_rank(path, machine())
    if ranks:
        summary["ranks"] = ranks
    shown = render_checkpoint if whole else render
    print(json.dumps(summary) if out.as_json else shown(summary))
    if ranks and not out.as_json:
        print("", *lines(ranks), sep="\n")
