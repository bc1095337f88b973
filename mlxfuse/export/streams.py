"""A model's streams as safetensors files, so that no load lays them out again."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from safetensors.numpy import save_file

from .. import __version__
from ..errors import MLXFuseError
from ..gguf.exported import CONFIG, LAYOUT, ExportedFile, header_bytes, open_model, stream_name
from ..gguf.relayout import allocate
from ..models.config import read_config
from ..models.plan import fill, first_rows, groups, plan

if TYPE_CHECKING:
    from ..gguf.reader import GGUFFile, Tensor
    from ..models.plan import Group, Plan

SHARD_BYTES = 2 << 30
"""Bytes of arrays after which a safetensors file is full; it is held in memory while written."""

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Unit:
    """Arrays that are made together.

    nbytes  of all of them.
    make    name -> array.
    """

    nbytes: int
    make: Callable[[], dict[str, np.ndarray]]


def export(
    path: Path, target: Path, *, force: bool = False, progress: Progress | None = None
) -> None:
    """Write the folder ``target``, which `mlxfuse.load` reads like the GGUF file ``path``.

    The weights are the file's bytes, in the order in which kernels read them.

    Args:
        force: replace a folder that is not empty.
        progress: called as (bytes done, bytes in all).

    Raises:
        MLXFuseError: the target is in use, or the disk too full.
        GGUFError, UnsupportedError, ModelRefError: as for `mlxfuse.load`.
        OSError: the folder cannot be written; it is left as it was.
    """
    with open_model(path) as file:
        if isinstance(file, ExportedFile):
            raise MLXFuseError(f"{path} is exported already; copy the folder")
        weights = plan(file, read_config(file))
        config = {
            "mlxfuse_version": __version__,
            "mlxfuse_layout": LAYOUT,
            "architecture": file.architecture,
            "source": file.path.name,
        }
        with new_folder(target, force=force, nbytes=file.size) as folder:
            for name, data in header_bytes(file):
                (folder / name).write_bytes(data)
            write_shards(folder, list(_units(file, weights)), {"format": "mlxfuse"}, progress)
            (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", "utf-8")


def _units(file: GGUFFile, weights: Plan) -> Iterator[Unit]:
    in_streams = set()
    for group in groups(weights):
        if group.has_kernel:
            in_streams |= {source.tensor.name for source in group.sources}
            yield Unit(sum(s.nbytes for s in group.sources), partial(_streams, file, group))
    for tensor in file.tensors.values():
        if tensor.name not in in_streams:
            yield Unit(tensor.nbytes, partial(_raw, file, tensor))


def _raw(file: GGUFFile, tensor: Tensor) -> dict[str, np.ndarray]:
    return {tensor.name: file.read(tensor).reshape(tensor.rows, tensor.row_bytes)}


def _streams(file: GGUFFile, group: Group) -> dict[str, np.ndarray]:
    sources = group.sources
    columns, experts = sources[0].shape[-1], sources[0].experts
    first, rows = first_rows(sources)
    made = {f: allocate(f, n * experts, columns) for f, n in rows.items()}
    for source, start in zip(sources, first, strict=True):
        fill(source, source.bytes(file, mapped=False), made[source.format], start)
    return {
        stream_name(group.key, format, name): array
        for format, arrays in made.items()
        for name, array in arrays.items()
    }


def write_shards(
    folder: Path, units: list[Unit], metadata: dict[str, str], progress: Progress | None = None
) -> None:
    """``model-00001-of-0000N.safetensors`` and so on, each of whole units."""
    shards: list[list[Unit]] = [[]]
    for unit in units:
        if shards[-1] and sum(u.nbytes for u in shards[-1]) + unit.nbytes > SHARD_BYTES:
            shards.append([])
        shards[-1].append(unit)
    done, total = 0, sum(unit.nbytes for unit in units)
    for index, shard in enumerate(shards):
        arrays: dict[str, np.ndarray] = {}
        for unit in shard:
            arrays |= unit.make()
            done += unit.nbytes
            if progress is not None:
                progress(done, total)
        name = f"model-{index + 1:05d}-of-{len(shards):05d}.safetensors"
        save_file(arrays, folder / name, metadata)


@contextmanager
def new_folder(target: Path, *, force: bool, nbytes: int) -> Iterator[Path]:
    """A folder beside ``target`` that takes its place once it is whole; else nothing is left.

    Args:
        nbytes: of what will be written.
    """
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise MLXFuseError(f"{target} is not a folder; give another name")
    if target.is_dir() and any(target.iterdir()) and not force:
        raise MLXFuseError(f"{target} is not empty; --force replaces it")
    target.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(target.parent).free
    if free < nbytes:
        raise MLXFuseError(
            f"{target.parent} has {free / 1e9:.2f} GB left; {nbytes / 1e9:.2f} GB are needed"
        )
    made = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.", suffix=".partial"))
    try:
        yield made
        made.chmod(0o755)
        for path in made.iterdir():
            path.chmod(0o644)
            with path.open("rb") as file:
                os.fsync(file.fileno())
        if target.exists():
            old = Path(
                tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.", suffix=".old")
            )
            os.replace(target, old)  # onto an empty folder
            os.replace(made, target)
            shutil.rmtree(old)
        else:
            os.replace(made, target)
    finally:
        shutil.rmtree(made, ignore_errors=True)
