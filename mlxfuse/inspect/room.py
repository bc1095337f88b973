"""Whether a model fits on the machine that is to load it, asked before anything is allocated."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .. import env, memory
from ..errors import DoesNotFitError
from ..memory import Machine
from .needs import PLAIN, KVBits, Needs, Use, needs_of

if TYPE_CHECKING:
    from ..gguf.reader import GGUFFile
    from ..models.plan import Plan

CONTEXT = 4096
"""Tokens that a model must have room for, unless the caller says how many."""

_COMPRESSED = KVBits(8, 4)


@dataclass(frozen=True, slots=True)
class Asked:
    """What a model is to be loaded for.

    context  tokens; None for as many as it was made for, at most `CONTEXT`.
    bits     how keys and values are kept.
    ignore   load it whether or not it fits.
    """

    context: int | None = None
    bits: KVBits = PLAIN
    ignore: bool = False


def machine(kernels: bool) -> Machine:
    """`memory.machine`, with what Metal recommends where it can be asked.

    Args:
        kernels: whether matrices stay as they are in the file.
    """
    import mlx.core as mx

    found = memory.machine()
    if env.get("MLXFUSE_MEMORY"):
        return found
    if not mx.metal.is_available():
        return Machine(kernels, found.budget, found.physical)
    info = mx.device_info()
    budget, physical = info["max_recommended_working_set_size"], info["memory_size"]
    return Machine(kernels, int(budget), int(physical))


def room_for(file: GGUFFile, weights: Plan, here: Machine, asked: Asked) -> int | None:
    """Bytes that are left on a machine for weights that become ordinary numbers; None where it
    has no kernels, for which `models.build.build` knows.

    Raises:
        DoesNotFitError: see `check_room`.
    """
    needs = needs_of(file, weights)
    tokens = asked.context or min(weights.config.args["max_position_embeddings"], CONTEXT)
    if not asked.ignore:
        check_room(file.path, needs, here, tokens, asked.bits)
    use = needs.on(here, tokens, asked.bits)
    return here.budget - needs.kept - use.cache - use.prompt if here.kernels else None


def check_room(path: Path, needs: Needs, here: Machine, tokens: int, bits: KVBits) -> None:
    """Nothing where the model fits with a context of ``tokens``.

    Raises:
        DoesNotFitError: it does not; what it needs, what there is, and what would fit.
    """
    use = needs.on(here, tokens, bits)
    if use.total <= here.budget:
        return
    lines = [
        f"{path}: the model does not fit: it needs {_gb(use.total)} ({_gb(use.weights)} of "
        f"weights, {_gb(use.cache)} for {tokens:,} tokens, {_gb(use.prompt)} to read a long "
        f"prompt), and this machine has {_gb(here.budget)} for it"
    ]
    if here.kernels and needs.apart:
        sizes = ", ".join(f"{_gb(size)} of {name}" for name, size in needs.apart.items())
        lines.append(f"{sizes} have no kernel and become 16-bit numbers")
    lines += _advice(needs, use, here, tokens, bits)
    lines.append("to load it all the same: ignore_memory=True, or --ignore-memory")
    raise DoesNotFitError("; ".join(lines))


def _advice(needs: Needs, use: Use, here: Machine, tokens: int, bits: KVBits) -> list[str]:
    found = []
    longest = min(needs.longest(here, bits), tokens)
    if longest:
        found.append(f"{longest:,} tokens fit (context_length)")
    compressed = needs.on(here, tokens, _COMPRESSED).total
    if bits.keys == bits.values == 16 and compressed <= here.budget:
        found.append("it fits with kv_bits=k8v4 (--kv-bits)")
    if not longest:
        other = ", or one whose types all have kernels" if here.kernels and needs.apart else ""
        found.append(f"take a smaller quantisation{other}")
    if here.kernels and use.total <= here.physical * 9 // 10:
        limit = math.ceil(use.total / (1 << 20))
        found.append(f"sudo sysctl iogpu.wired_limit_mb={limit} lets Metal use more")
    return found


def _gb(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 10**8 else f"{count / 1e6:.1f} MB"
