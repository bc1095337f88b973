"""``mlxfuse export``."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from . import _options as opt
from ._common import command
from ._models import before_imports, expect_gguf, resolve_model
from .progress import status_line


@dataclass(frozen=True, kw_only=True)
class Written(opt.Output):
    mlx: Annotated[bool, opt.of_output("Write a plain MLX-LM checkpoint.", "--mlx")] = False
    force: Annotated[
        bool, opt.of_output("Replace FOLDER if an earlier export wrote all of it.", "--force")
    ] = False


@command("Convert", "mlxfuse export model-Q4_K_M.gguf folder --mlx")
def export_command(
    model: Annotated[str, opt.model_argument("A .gguf file or a hub repository.")],
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="The folder to write.")],
    out: Written,
    revision: opt.Revision = None,
) -> None:
    """Write a model as safetensors, in the order kernels read it: later loads need no GGUF.

    With --mlx, a checkpoint for stock mlx_lm: matrices of the types that MLX's own quantised
    layers hold exactly stay quantised, the others become float16.
    """
    path = expect_gguf(resolve_model(model, revision, True), "export")
    before_imports()
    with status_line(True) as say:

        def progress(done: int, total: int) -> None:
            say(f"writing {folder.name}: {done / 1e9:.2f} of {total / 1e9:.2f} GB")

        if out.mlx:
            from ..export.mlx_checkpoint import export_mlx

            summary = export_mlx(path, folder, force=out.force, progress=progress)
        else:
            from ..export.streams import export

            export(path, folder, force=out.force, progress=progress)
            summary = {}
    size = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
    if out.as_json:
        print(json.dumps({"folder": str(folder), "size": size, **summary}))
        return
    print(folder)
    for name, said in (("exact", "kept exactly"), ("float16", "rounded to float16")):
        if found := summary.get(name):
            held = ", ".join(f"{count:,} of {kind}" for kind, count in found.items())
            print(f"matrices {said}: {held}", file=sys.stderr)
