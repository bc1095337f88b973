"""What the ranks must agree on, told through MLX's group."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import env
from ..errors import RanksError

if TYPE_CHECKING:
    import mlx.core as mx

_PACKAGES = ("mlxfuse", "mlx", "mlx-lm")
_VARIABLES = ("MLXFUSE_KERNELS", "MLXFUSE_DISABLE", "MLXFUSE_CPU_BLAS")
_SHARDS = re.compile(r"(.+)-\d{5}-of-(\d{5}\.gguf)")
# Of each file of a model: as many pieces of so many bytes are read, spread over it.
_PIECES, _PIECE = 64, 1 << 16


@cache
def group() -> mx.distributed.Group | None:
    """MLX's group of the processes that ``mlx.launch`` started; None if this is the only one.

    The first call connects the ranks, and waits until all of them have called it.

    Raises:
        RanksError: MLX cannot connect them.
    """
    if env.launched_rank() is None or env.launched_alone():
        return None
    import mlx.core as mx

    try:
        found = mx.distributed.init()
    except (RuntimeError, ValueError) as error:
        raise RanksError(f"MLX cannot connect the ranks: {error}") from None
    return found if found.size() > 1 else None


def all_values(value: Any, of: mx.distributed.Group) -> list[Any]:
    """The ``value`` of every rank, which goes through JSON. All ranks must call it.

    Raises:
        RanksError: what came is no value: a rank has ended meanwhile.
    """
    import mlx.core as mx
    import numpy as np

    data = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = mx.distributed.all_gather(mx.array([data.size], mx.uint32), group=of, stream=mx.cpu)
    found: list[int] = [int(n) for n in np.array(sizes)]
    room = np.zeros((1, max(found)), np.uint8)
    room[0, : data.size] = data
    rows = np.array(mx.distributed.all_gather(mx.array(room), group=of, stream=mx.cpu))
    try:
        return [json.loads(row[:n].tobytes()) for row, n in zip(rows, found, strict=True)]
    except ValueError:  # MLX gives zeros where it has lost a rank
        raise RanksError("what another rank sent is incomplete: it has probably ended") from None


def agreed(
    sampler: Callable[[mx.array], mx.array], of: mx.distributed.Group
) -> Callable[[mx.array], mx.array]:
    """A sampler that gives every rank the token that rank 0 chose.

    Other seeds, or GPUs that round otherwise, would let the ranks go on with different texts.

    Args:
        sampler: from log-probabilities [B, V] to token ids [B]; only rank 0 calls it.
    """
    import mlx.core as mx

    def choose(logprobs: mx.array) -> mx.array:
        if of.rank() == 0:
            token = sampler(logprobs).astype(mx.uint32)
        else:
            token = mx.zeros(logprobs.shape[:-1], mx.uint32)
        return mx.distributed.all_sum(token, group=of)

    return choose


def expect_same(facts: Mapping[str, str], of: mx.distributed.Group) -> None:
    """Compare facts that must be the same on every rank. All ranks must call it.

    Raises:
        RanksError: on every rank, where they differ.
    """
    everyone = all_values(dict(facts), of)
    for name in sorted({name for one in everyone for name in one}):
        values = [one.get(name, "nothing") for one in everyone]
        if len(set(values)) > 1:
            told = ", ".join(f"rank {rank} has {value}" for rank, value in enumerate(values))
            raise RanksError(f"the ranks differ in {name}: {told}; make it the same on all of them")


def same_run(files: Mapping[str, Path], arguments: str) -> dict[str, str]:
    """For `expect_same`: what the run of a model depends on.

    Args:
        files: what is read -> where it is.
        arguments: those of ``load``.
    """
    import mlx.core as mx

    facts = {f"the version of {name}": _version(name) for name in _PACKAGES}
    facts |= {name: env.get(name) or "nothing" for name in _VARIABLES}
    facts["MLX's default device"] = "the GPU" if mx.default_device() == mx.gpu else "the CPU"
    facts["the arguments of load"] = arguments
    return facts | {name: f"{path.name} ({_fingerprint(path)})" for name, path in files.items()}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


def _fingerprint(path: Path) -> str:
    """The size of a model's files, and a digest of pieces of them.

    A whole file of tens of gigabytes would take minutes. Files of other tensors or types differ in
    their header, which is in the first piece, or in their size.
    """
    total, digest = 0, hashlib.blake2b(digest_size=8)
    for file in _files(path):
        size = file.stat().st_size
        total += size
        digest.update(f"{file.name} {size}\n".encode())
        last = max(0, size - _PIECE)
        with file.open("rb") as opened:
            for start in sorted({last * i // (_PIECES - 1) for i in range(_PIECES)}):
                opened.seek(start)
                digest.update(opened.read(_PIECE))
    return f"{total:,} bytes, digest {digest.hexdigest()}"


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        return sorted(p for p in path.iterdir() if p.is_file() and not p.name.startswith("."))
    shard = _SHARDS.fullmatch(path.name)
    if shard is None:
        return [path]
    pattern = re.compile(re.escape(shard[1]) + r"-\d{5}-of-" + re.escape(shard[2]))
    return sorted(p for p in path.parent.iterdir() if pattern.fullmatch(p.name))
