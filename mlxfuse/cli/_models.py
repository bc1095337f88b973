"""From what a user types to a model's path."""

from __future__ import annotations

import os
from pathlib import Path

from ..process import fail
from .progress import download_bar


def before_imports() -> None:
    """What must come before mlx and transformers, which advises to install torch."""
    from .. import blas

    blas.preload()
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


def resolve_model(ref: str | None, revision: str | None, shown: bool) -> Path:
    """`hub.resolve`, with a bar that shows how far a download has come."""
    from ..hub.resolve import resolve

    with download_bar(shown) as progress:
        return resolve(ref, revision=revision, progress=progress, note=fail)


def expect_gguf(path: Path, what: str) -> Path:
    """The path, unless it is that of a checkpoint, which ``what`` is not for."""
    from ..errors import ModelRefError
    from ..hub.folders import is_checkpoint

    if is_checkpoint(path):
        raise ModelRefError(f"{path} is an MLX-LM checkpoint; {what} takes GGUF files")
    return path


def complete_model(incomplete: str) -> list[str]:
    """What a shell offers for MODEL: folders, and the GGUF files in them."""
    folder = Path(incomplete).expanduser()
    start = ""
    if not incomplete.endswith("/"):
        folder, start = folder.parent, folder.name
    try:
        found = [p for p in folder.iterdir() if p.name.startswith(start)]
    except OSError:
        return []
    stem = incomplete[: len(incomplete) - len(start)]
    return [stem + p.name + "/" * p.is_dir() for p in sorted(found) if _is_offered(p)]


def _is_offered(path: Path) -> bool:
    return path.suffix.lower() == ".gguf" or (path.is_dir() and not path.name.startswith("."))
