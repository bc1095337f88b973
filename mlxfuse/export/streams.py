"""A model's streams as safetensors files, so that no load lays them out again."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .. import __version__
from ..errors import MLXFuseError
from ..gguf.exported import (
    CONFIG,
    LAYOUT,
    SAFETENSORS,
    ExportedFile,
    header_bytes,
    open_model,
    stream_name,
)
from ..gguf.relayout import allocate
from ..models.config import read_config
from ..models.mapped import ALIGNMENT
from ..models.plan import fill, first_rows, groups, plan
from .folder import new_folder

if TYPE_CHECKING:
    from ..gguf.reader import GGUFFile, Tensor
    from ..models.plan import Group, Plan

SHARD_BYTES = 2 << 30
"""Bytes of arrays after which a safetensors file is full; it is held in memory while written."""

PAGE = 1 << 14
"""Bytes of a page of memory of Apple's processors; a multiple of others'."""

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
        force: replace an earlier export.
        progress: called as (bytes done, bytes in all).

    Raises:
        MLXFuseError: see `new_folder`.
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
        with new_folder(target, force=force, nbytes=file.size, sources=file.paths) as folder:
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


def save_file(arrays: Mapping[str, np.ndarray], path: Path, metadata: dict[str, str]) -> None:
    """A safetensors file that can be mapped: what the library writes is aligned to 8 bytes only.

    Arrays of whole multiples of `ALIGNMENT` begin at such, and the file ends where a page ends,
    or less than `ALIGNMENT` bytes before: memory that lacks no part of a page is what Metal takes.
    """
    in_order = sorted(arrays.items(), key=lambda item: item[1].nbytes % ALIGNMENT > 0)
    header: dict[str, object] = {"__metadata__": metadata}
    at = 0
    for name, array in in_order:
        ends = [at, at + array.nbytes]
        dtype = SAFETENSORS[array.dtype.name]
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": ends}
        at = ends[1]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text) + at + -at % ALIGNMENT) % PAGE)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, array in in_order:
            file.write(np.ascontiguousarray(array).data)
