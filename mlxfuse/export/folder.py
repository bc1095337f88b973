"""The folder that an export writes: made beside its place, and replaced only where it is known.

Every export leaves a list of what it wrote (`LIST`). ``--force`` replaces a folder whose files are
all on that list and have the sizes that they had; it removes nothing else.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from .. import __version__
from ..errors import MLXFuseError

LIST = "mlxfuse_export.json"
"""In every exported folder: the version that wrote it, and its files with their sizes."""

_PARTIAL, _OLD = "mlxfuse-partial", "mlxfuse-old"
_LIST_LIMIT = 1 << 24
_FINDERS = ".DS_Store"  # macOS puts it into folders that were looked at


@contextmanager
def new_folder(
    target: Path, *, force: bool, nbytes: int, sources: Iterable[Path]
) -> Iterator[Path]:
    """A folder beside ``target`` that takes its place once it is whole.

    When the body fails, the new folder is removed and ``target`` stays as it was. A process that
    is killed leaves a hidden folder beside ``target``, which the next export to it removes.

    Args:
        force: replace an earlier export.
        nbytes: how much will be written.
        sources: the files or the folder that are read meanwhile.

    Raises:
        MLXFuseError: ``target`` is no folder, holds what no export wrote, or holds or is inside a
            source; another export writes it now; the disk is too full.
        OSError: it cannot be written.
    """
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise MLXFuseError(f"{target} is not a folder; give another name")
    target = target.resolve()
    _apart(target, sources)
    made, old = (target.with_name(f".{target.name}.{end}") for end in (_PARTIAL, _OLD))
    _check(target, force)
    _room(target, nbytes)
    target.parent.mkdir(parents=True, exist_ok=True)
    with _claimed(made, target):
        try:
            _recover(target, old)
            _check(target, force)
            yield made
            _settle(made)
            _check(target, force)  # once more: the writing may have taken minutes
            if target.is_dir() and any(target.iterdir()):
                os.replace(target, old)
                os.replace(made, target)
                _remove(old)
            else:
                os.replace(made, target)  # a folder may replace an empty one
        finally:
            shutil.rmtree(made, ignore_errors=True)


def _apart(target: Path, sources: Iterable[Path]) -> None:
    """Refuse a target that holds a source, or lies inside one."""
    for source in sources:
        for path in (source.absolute(), source.resolve()):
            if any(_same(folder, target) for folder in (path, *path.parents)):
                raise MLXFuseError(f"{target} holds {source}, which is exported; give another name")
            if path.is_dir() and any(_same(folder, path) for folder in target.parents):
                raise MLXFuseError(
                    f"{target} is inside {source}, which is exported; give another name"
                )


def _same(one: Path, other: Path) -> bool:
    """Whether two paths are one folder, however its name is spelt."""
    return one == other or (one.exists() and other.exists() and one.samefile(other))


def _check(target: Path, force: bool) -> None:
    """Refuse a folder that is not empty, unless it may be replaced and is an earlier export."""
    if not target.is_dir() or all(path.name == _FINDERS for path in target.iterdir()):
        return
    if foreign := _foreign(target):
        raise MLXFuseError(
            f"{target} is not empty, and {foreign} in it is not as an export wrote it; "
            "give another name, or move it away"
        )
    if not force:
        raise MLXFuseError(f"{target} is an earlier export; --force replaces it")


def _foreign(folder: Path) -> str | None:
    """The first entry of a folder that no export wrote, or that was changed since; None if none."""
    known = _listed(folder)
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_dir() and not path.is_symlink():
            if not any(file.startswith(f"{name}/") for file in known):
                return f"{name}/"
        elif name not in (LIST, _FINDERS) and (
            path.is_symlink() or known.get(name) != path.stat().st_size
        ):
            return name
    return None if known else LIST


def _listed(folder: Path) -> Mapping[str, int]:
    """What a folder's list says: the size of each of its files; empty without a list."""
    try:
        with (folder / LIST).open("rb") as file:
            found = json.loads(file.read(_LIST_LIMIT))["files"]
            return {str(name): int(size) for name, size in found.items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return {}


def _room(target: Path, nbytes: int) -> None:
    there = next(folder for folder in target.parents if folder.exists())
    free = shutil.disk_usage(there).free
    if free < nbytes:
        raise MLXFuseError(
            f"{there} has {free / 1e9:.2f} GB left; {nbytes / 1e9:.2f} GB are needed"
        )


@contextmanager
def _claimed(made: Path, target: Path) -> Iterator[None]:
    """An empty folder ``made``, which this process alone writes; a killed export's is emptied."""
    busy = MLXFuseError(f"another export writes {target} at this moment")
    made.mkdir(exist_ok=True)
    handle = os.open(made, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise busy from None
        except OSError:
            pass  # a file system without locks
        if not made.exists() or not os.path.samestat(os.fstat(handle), made.stat()):
            raise busy  # which has just ended
        left = [path.name for path in made.iterdir()]
        if left and LIST not in left:
            raise MLXFuseError(f"{made} is no export's; move it away")
        # The list goes last, so that an export killed here is known as one.
        for name in sorted(left, key=lambda name: name == LIST):
            path = made / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        (made / LIST).write_text("{}\n", "utf-8")
        yield
    finally:
        os.close(handle)


def _recover(target: Path, old: Path) -> None:
    """Put back, or remove, the earlier export that a killed one was replacing."""
    if old.is_dir():
        if target.exists():
            _remove(old)
        else:
            os.replace(old, target)


def _settle(made: Path) -> None:
    """Write the list, make everything readable for all, and have it on the disk."""
    files = [path for path in sorted(made.rglob("*")) if path.is_file() and path.name != LIST]
    sizes = {path.relative_to(made).as_posix(): path.stat().st_size for path in files}
    record = {"mlxfuse_version": __version__, "files": sizes}
    (made / LIST).write_text(json.dumps(record, indent=2) + "\n", "utf-8")
    for path in (made, *made.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _remove(folder: Path) -> None:
    """Remove the files of an earlier export by their names, and the folders that are empty then."""
    folders = [path for path in folder.rglob("*") if path.is_dir()]
    for name in (*_listed(folder), _FINDERS, LIST):
        (folder / name).unlink(missing_ok=True)
    for path in (*sorted(folders, reverse=True), folder):
        with suppress(OSError):  # something was put into it meanwhile: it stays
            path.rmdir()
