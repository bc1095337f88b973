"""The models that are on this machine already, and removing those in the caches."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .. import env
from ..errors import ModelRefError
from ..gguf.exported import is_export
from ..terminal import one_line
from .demo import demo_path
from .folders import candidates, checkpoint_files, choose, is_checkpoint, is_complete, label
from .resolve import parse

if TYPE_CHECKING:
    from huggingface_hub import CachedRepoInfo, CachedRevisionInfo

_DEPTH = 4  # folders below a program's folder of models


@dataclass(frozen=True, slots=True)
class Found:
    """A model on this machine.

    ref    what to type for it.
    path   its GGUF file (the first shard) or folder.
    place  whose folder it lies in.
    """

    ref: str
    path: Path
    place: str


def installed() -> list[Found]:
    """The models in Hugging Face's cache, ours, and the folders of LM Studio and llama.cpp."""
    cached: dict[str, Found] = {}
    for repo, revision in _cached():
        for path, choice in _models_of(revision):
            ref = repo.repo_id + (f":{choice}" if choice else "")
            cached.setdefault(ref, Found(ref, path, "Hugging Face"))
    found = list(cached.values())
    if demo_path().is_file():
        found.append(Found("the demo model", demo_path(), "mlxfuse"))
    for place, folder in _folders():
        found += [Found(str(path), path, place) for path in _in_folder(folder)]
    return found


def _folders() -> list[tuple[str, Path]]:
    home = Path.home()
    studio = [home / ".lmstudio" / "models", home / ".cache" / "lm-studio" / "models"]
    return [("llama.cpp", env.llama_cache()), *(("LM Studio", folder) for folder in studio)]


def _in_folder(folder: Path, depth: int = _DEPTH) -> Iterator[Path]:
    """GGUF files (first shards) and folders that are models."""
    try:
        entries = sorted(folder.iterdir())
    except OSError:
        return
    for model in candidates([p.name for p in entries if p.is_file()]):
        yield folder / model.files[0]
    for entry in entries:
        if entry.is_dir() and depth:
            if is_export(entry) or is_checkpoint(entry):
                yield entry
            else:
                yield from _in_folder(entry, depth - 1)


def _cached() -> Iterator[tuple[CachedRepoInfo, CachedRevisionInfo]]:
    """The revisions of each model's repository in Hugging Face's cache, the newest first."""
    from huggingface_hub import constants, scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        repos = scan_cache_dir(constants.HF_HUB_CACHE).repos
    except CacheNotFound:
        return
    for repo in sorted(repos, key=lambda r: r.repo_id.lower()):
        if repo.repo_type == "model":
            for revision in sorted(repo.revisions, key=lambda r: r.last_modified, reverse=True):
                yield repo, revision


def _names(revision: CachedRevisionInfo) -> dict[str, Path]:
    folder = revision.snapshot_path
    return {f.file_path.relative_to(folder).as_posix(): f.file_path for f in revision.files}


def _models_of(revision: CachedRevisionInfo) -> Iterator[tuple[Path, str | None]]:
    """Paths, and what is behind the colon to name each; None for a checkpoint."""
    names = _names(revision)
    models = candidates(names)
    for model in models:
        yield names[model.files[0]], label(model, models)
    folder = Path(revision.snapshot_path)
    if checkpoint_files(names) and not models and is_complete(folder, names):
        yield folder, None


@dataclass(frozen=True, slots=True)
class Removal:
    """What `remove` would delete: files, and whole folders; ``size`` in bytes."""

    files: tuple[Path, ...]
    folders: tuple[Path, ...]
    size: int


def removal(ref: str) -> Removal:
    """What removing a model deletes: files of the caches of Hugging Face and mlxfuse, no others.

    Args:
        ref: ``org/repo`` for all of it, ``org/repo:choice`` for one model; ``demo``.

    Raises:
        ModelRefError: nothing in these caches has that name, or it names a revision.
    """
    if ref == "demo":
        if not demo_path().is_file():
            raise ModelRefError(f"the demo model is not at {demo_path()}")
        return Removal((demo_path(),), (), demo_path().stat().st_size)
    if Path(ref).expanduser().exists():
        raise ModelRefError(
            f"{one_line(ref)} is a path: mlxfuse removes only models of the caches, by their names "
            "(mlxfuse ls); remove other files yourself"
        )
    wanted = parse(ref)
    if wanted.revision:
        raise ModelRefError(
            f"{one_line(ref)}: a model is removed with all its revisions; leave out "
            f"@{wanted.revision}"
        )
    from huggingface_hub import constants, scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        repos = [
            r for r in scan_cache_dir(constants.HF_HUB_CACHE).repos if r.repo_id == wanted.repo
        ]
    except CacheNotFound:
        repos = []
    repos = [r for r in repos if r.repo_type == "model"]
    if not repos:
        raise ModelRefError(f"{wanted.repo} is not in Hugging Face's cache")
    (repo,) = repos
    if wanted.choice is None:
        return Removal((), (Path(repo.repo_path),), repo.size_on_disk)
    links, missing = [], None
    for names in map(_names, repo.revisions):
        try:
            links += [names[name] for name in choose(wanted.repo, wanted.choice, list(names))]
        except ModelRefError as error:  # another revision may have it
            missing = error
    if missing and not links:
        raise missing
    blobs = {link.resolve() for link in links}
    others = {f.file_path for r in repo.revisions for f in r.files} - set(links)
    blobs -= {other.resolve() for other in others}
    size = sum(blob.stat().st_size for blob in blobs if blob.exists())
    return Removal((*links, *sorted(blobs - set(links))), (), size)


def remove(what: Removal) -> None:
    """Delete it.

    Raises:
        OSError: something of it cannot be deleted.
    """
    for path in what.files:
        path.unlink(missing_ok=True)
    for folder in what.folders:
        shutil.rmtree(folder)


def cache_root() -> Path:
    """Where downloads go, for messages."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)
