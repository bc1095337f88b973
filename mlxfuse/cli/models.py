"""``mlxfuse ls``, ``mlxfuse pull`` and ``mlxfuse rm``: the models on this machine."""

from __future__ import annotations

import json
import sys
from typing import Annotated, Any

import typer

from ..errors import MLXFuseError
from ..terminal import one_line
from . import _options as opt
from ._common import command
from ._models import resolve_model
from .progress import print_table, status_line


@command("Models", "mlxfuse ls")
def ls_command(out: opt.Output) -> None:
    """List the models on this machine: whether each runs, and whether it fits in memory.

    Looks in the caches of Hugging Face and mlxfuse, and where LM Studio and llama.cpp keep theirs.
    """
    from ..hub.inventory import cache_root, installed

    with status_line(not out.as_json) as say:
        found = []
        for model in installed():
            say(f"reading {model.path.name}")
            found.append({"ref": model.ref, "place": model.place, **_about(model.path)})
    if out.as_json:
        print(json.dumps(found))
        return
    if not found:
        print(f"no models yet; mlxfuse pull org/repo:Q4_K_M puts one in {cache_root()}")
        return
    rows = [
        (
            m["ref"],
            m["place"],
            "" if m["size"] is None else f"{m['size'] / 1e9:.2f} GB",
            m["type"],
            m["architecture"],
            m["problem"] or "yes",
            {True: "yes", False: "no", None: ""}[m["fits"]],
        )
        for m in found
    ]
    header = ("model", "where", "size", "type", "architecture", "runs", "fits")
    print_table(header, rows, sys.stdout)


def _about(path: Any) -> dict[str, Any]:
    """What the header tells, and why the model would not run."""
    from ..hub.folders import is_checkpoint
    from ..inspect.checkpoint import inspect_checkpoint
    from ..inspect.header import inspect
    from ..memory import machine

    row: dict[str, Any] = {"path": str(path), "size": None, "type": "", "architecture": ""}
    try:
        if is_checkpoint(path):
            found = inspect_checkpoint(path)
            fits = found["size"] < machine().budget
            problem = ""
        else:
            found = inspect(path)
            fits = found["memory"]["longest_context"] > 0
            problem = "; ".join(found["unsupported"])
    except (MLXFuseError, OSError) as error:
        return {**row, "problem": one_line(f"no: {error}", 200), "fits": None}
    kinds = found["tensor_types"]
    return {
        **row,
        "size": found["size"],
        "type": kinds[0]["type"] if kinds else "",
        "architecture": found["architecture"],
        "problem": one_line(f"no: {problem}", 200) if problem else "",
        "fits": fits,
    }


@command("Models", "mlxfuse pull org/repo:Q4_K_M")
def pull_command(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A hub repository such as org/repo:Q4_K_M.")
    ],
    debug: opt.Debug,
    revision: opt.Revision = None,
) -> None:
    """Download a model into Hugging Face's cache, where other programs find it too."""
    print(resolve_model(model, revision, True))


@command("Models", "mlxfuse rm org/repo:Q4_K_M")
def rm_command(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="org/repo, org/repo:Q4_K_M, or demo.")
    ],
    debug: opt.Debug,
    yes: Annotated[bool, opt.of_text("Do not ask.", "--yes", "-y")] = False,
) -> None:
    """Remove a downloaded model from the caches of Hugging Face and mlxfuse; asks before it does.

    Nothing outside these caches is ever removed.
    """
    from ..hub.inventory import removal, remove

    what = removal(model)
    for path in (*what.files, *what.folders):
        print(path, file=sys.stderr)
    if not yes:
        if not sys.stdin.isatty():
            raise typer.BadParameter("nobody can be asked here: say --yes to remove it")
        typer.confirm(f"Remove these, {what.size / 1e9:.2f} GB?", abort=True, err=True)
    remove(what)
    print(f"{what.size / 1e9:.2f} GB are free again", file=sys.stderr)
