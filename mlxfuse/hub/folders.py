"""Models in folders: GGUF files, MLX-LM checkpoints, and what names of files tell of them.

Names may come from a hub's listing, which is untrusted: they are checked before they are used.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from ..errors import ModelRefError
from ..gguf.exported import is_export
from ..terminal import one_line

DEFAULT_QUANT = "Q4_K_M"
MAX_SHARDS = 1000

_SHARD = re.compile(r"(?P<stem>.+)-(?P<index>\d{5})-of-(?P<count>\d{5})")
# The quantisation stands at the end of a file's name: model-Q4_K_M, model.i1-IQ3_XXS, UD-Q2_K_XL.
_QUANT = re.compile(
    r"(?:^|[-._])(?P<quant>(?:UD-)?(?:I?Q\d(?:_[A-Z0-9]+)*|TQ\d_\d|MXFP4(?:_MOE)?|NVFP4|BF16|F(?:P)?(?:16|32)))$",
    re.IGNORECASE,
)
# Files beside a model that are not the model.
_COMPANION = re.compile(
    r"(?:^|[-._/])(?:mmproj|imatrix|draft|mtp|eagle3?)(?:[-._/]|$)", re.IGNORECASE
)
# What mlx-lm reads of a checkpoint, without the Python files that it could run.
_CHECKPOINT = (
    *("*.json", "model*.safetensors", "tokenizer.model", "*.tiktoken", "tiktoken.model"),
    *("*.txt", "*.jsonl", "*.jinja"),
)
_INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Candidate:
    """One model of a repository: its quantisation, if its name tells, and all its shards."""

    quant: str | None
    files: tuple[str, ...]


def is_checkpoint(path: Path) -> bool:
    """Whether it is a folder that mlx-lm loads, and none that ``mlxfuse export`` wrote."""
    return (path / "config.json").is_file() and not is_export(path)


def checkpoint_files(names: Iterable[str]) -> list[str]:
    """The files of a repository that make an MLX-LM checkpoint; empty if they make none."""
    wanted = [
        name
        for name in sorted(set(names))
        if "/" not in name and is_safe(name) and any(fnmatchcase(name, p) for p in _CHECKPOINT)
    ]
    weights = any(name.endswith(".safetensors") for name in wanted)
    return wanted if weights and "config.json" in wanted else []


def is_complete(folder: Path, names: Collection[str]) -> bool:
    """Whether every shard that a checkpoint's index names is there."""
    if _INDEX not in names:
        return True
    try:
        shards = set(json.loads((folder / _INDEX).read_text("utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return False
    return shards <= set(names)


def in_folder(folder: Path, choice: str | None = None) -> Path:
    """The model of a folder: itself if it is one, else the GGUF file that ``choice`` names.

    Raises:
        ModelRefError: there is none, or several match; the message lists what there is.
    """
    if choice is None and (is_export(folder) or is_checkpoint(folder)):
        return folder
    names = [p.name for p in folder.iterdir() if p.is_file()]
    if not candidates(names):
        raise ModelRefError(
            f"{one_line(str(folder))} is a folder that has no model; expected a .gguf file, "
            "config.json and safetensors of an MLX-LM checkpoint, or what mlxfuse export wrote"
        )
    try:
        return folder / choose(one_line(str(folder)), choice, names)[0]
    except ModelRefError as error:
        raise ModelRefError(f"in the folder {error}") from None


def candidates(names: Iterable[str]) -> list[Candidate]:
    """The models among file names; incomplete shard sets are left out.

    Projectors, importance matrices and draft models are never among them.
    """
    found: list[Candidate] = []
    shards: dict[tuple[str, int], dict[int, str]] = {}
    for name in sorted(set(names)):
        if not is_safe(name) or not name.lower().endswith(".gguf"):
            continue
        stem = name[: -len(".gguf")]
        if _COMPANION.search(stem):
            continue
        if shard := _SHARD.fullmatch(stem):
            key = (shard["stem"], int(shard["count"]))
            shards.setdefault(key, {})[int(shard["index"])] = name
        else:
            found.append(Candidate(_quant(stem), (name,)))
    for (stem, count), parts in shards.items():
        if count <= MAX_SHARDS and sorted(parts) == list(range(1, count + 1)):
            found.append(Candidate(_quant(stem), tuple(parts[i] for i in sorted(parts))))
    return found


def _quant(stem: str) -> str | None:
    match = _QUANT.search(stem.rpartition("/")[2])
    return match["quant"].upper() if match else None


def is_safe(name: str) -> bool:
    """Whether a listed name is a plain relative path of printable characters."""
    parts = name.split("/")
    return (
        name.isprintable()
        and "\\" not in name
        and len(name) <= 1000
        and all(0 < len(part.encode()) <= 255 and part not in (".", "..") for part in parts)
    )


def choose(place: str, choice: str | None, names: Sequence[str]) -> tuple[str, ...]:
    """The file names, in shard order, of the one model that ``choice`` names.

    Args:
        place: the repository or folder, for messages.
        choice: a quantisation or a file's name, in any case; None for the only model there is,
            else `DEFAULT_QUANT`.

    Raises:
        ModelRefError: none or several match; the message lists what there is.
    """
    models = candidates(names)
    if choice is None:
        wanted = DEFAULT_QUANT
        matches = [m for m in models if m.quant == wanted] or (models if len(models) == 1 else [])
    else:
        wanted = choice
        matches = _named(wanted.lower(), models, names)
    if len(matches) == 1:
        return matches[0].files
    if not models:
        raise ModelRefError(f"{place} has no complete GGUF model")
    listed = sorted({label(m, models) for m in (matches or models)}, key=str.lower)
    problem = "names several models" if matches else "is not there"
    raise ModelRefError(
        f"{place}: {one_line(wanted)} {problem}; choose with {place}:NAME among\n  "
        + "\n  ".join(map(one_line, listed))
    )


def _named(wanted: str, models: Sequence[Candidate], names: Sequence[str]) -> list[Candidate]:
    """The models of a quantisation or, if there are none, of a file's path or its name."""
    # A draft model is there for who names its file: --draft-model needs it.
    files = [n for n in names if is_safe(n) and n.lower().endswith(".gguf")]
    every = [
        *models,
        *(Candidate(None, (n,)) for n in files if not any(n in m.files for m in models)),
    ]
    tries: tuple[Callable[[Candidate], str | None], ...] = (
        lambda model: model.quant,
        lambda model: model.files[0],
        lambda model: model.files[0].rpartition("/")[2],
    )
    found = ([m for m in every if (name(m) or "").lower() == wanted] for name in tries)
    return next(filter(None, found), [])


def label(model: Candidate, models: Sequence[Candidate]) -> str:
    """The quantisation where it is enough to name the model, else its first file."""
    if model.quant and sum(m.quant == model.quant for m in models) == 1:
        return model.quant
    return model.files[0]
