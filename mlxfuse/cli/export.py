"""``mlxfuse export``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from . import _options as opt
from ._common import app, before_imports, command, resolve_model
from .progress import status_line


@app.command("export", rich_help_panel="Convert")
@command
def export_command(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A .gguf file or a hub repository.")
    ],
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="The folder to write.")],
    revision: opt.Revision = None,
    mlx: Annotated[
        bool,
        typer.Option("--mlx", help="Write a plain MLX-LM checkpoint.", rich_help_panel=opt.OUTPUT),
    ] = False,
    force: Annotated[
        bool,
        typer.Option(
            "--force",
            help="Replace FOLDER if an earlier export wrote all of it.",
            rich_help_panel=opt.OUTPUT,
        ),
    ] = False,
    as_json: opt.Json = False,
    debug: opt.Debug = False,
) -> None:
    """Write a model as safetensors, in the order kernels read it: later loads need no GGUF.

    With --mlx, a checkpoint for stock mlx_lm: matrices of the types that MLX's own quantised
    layers hold exactly stay quantised, the others become float16.
    """
    path = resolve_model(model, revision, True)
    before_imports()
    with status_line(True) as say:

        def progress(done: int, total: int) -> None:
            say(f"writing {folder.name}: {done / 1e9:.2f} of {total / 1e9:.2f} GB")

        if mlx:
            from ..export.mlx_checkpoint import export_mlx

            summary = export_mlx(path, folder, force=force, progress=progress)
        else:
            from ..export.streams import export

            export(path, folder, force=force, progress=progress)
            summary = {}
    size = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
    if as_json:
        print(json.dumps({"folder": str(folder), "size": size, **summary}))
        return
    print(folder)
    for name, found in summary.items():
        print(f"{name}: {found}", file=sys.stderr)
