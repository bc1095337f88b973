"""The rotary embedding a file describes; numpy only."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from ..errors import GGUFError, UnsupportedError
from .keys import Keys

if TYPE_CHECKING:
    from ..gguf.reader import GGUFFile
    from .table import Architecture


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary embedding of one kind of layer.

    dims      leading components of a head that are rotated.
    base      frequency base.
    factor    positions are divided by this (1: as they are).
    scale     q and k are multiplied by this.
    factors   tensor that divides the frequencies, [dims/2], or empty.
    yarn      original context in tokens if the scaling is YaRN, else 0.
    turns     with YaRN, the turns over the original context that the pairs at the ends of its ramp
              make: those that turn more often keep their frequency.
    pairs     components 2i and 2i+1 belong together, else i and i + dims/2.
    """

    dims: int
    base: float
    factor: float = 1.0
    scale: float = 1.0
    factors: str = ""
    yarn: int = 0
    turns: tuple[float, float] = (32.0, 1.0)
    pairs: bool = False

    @property
    def plain(self) -> bool:
        return self.factor == 1.0 and self.scale == 1.0 and not self.factors and not self.yarn

    def periods(self, factors: np.ndarray | None = None) -> np.ndarray:
        """Radians^-1 a position of each pair, float32 [dims/2]: what ``mx.fast.rope`` calls freqs.

        ``base^(2i/dims)``, times ``factors``; YaRN blends the interpolated and the extrapolated
        frequency by a ramp over i (arXiv 2309.00071, section 3.2) whose ends are the pairs that
        make ``turns`` over the original context.
        """
        extrapolated = self.base ** (np.arange(0, self.dims, 2, dtype=np.float64) / self.dims)
        if factors is not None:
            extrapolated = extrapolated * factors
        interpolated = extrapolated * self.factor
        if not self.yarn:
            return interpolated.astype(np.float32)

        def pair(turns: float) -> float:
            """The pair that makes ``turns`` turns over the original context."""
            period = self.yarn / (turns * 2 * math.pi)
            return self.dims * math.log(period) / (2 * math.log(self.base))

        low = max(0, math.floor(pair(self.turns[0])))
        high = min(self.dims - 1, math.ceil(pair(self.turns[1])))
        ramp = np.clip((np.arange(self.dims // 2) - low) / max(0.001, high - low), 0, 1)
        return (1 / (ramp / interpolated + (1 - ramp) / extrapolated)).astype(np.float32)


def read_rope(key: Keys, arch: Architecture, head: int, trained: int, used: int) -> Rope:
    """The rotary embedding of the layers that see the whole context.

    Args:
        arch: its ``rope_types``, ``partial_rope``, ``rope_layout`` and ``yarn_log`` say what the
            architecture has.
        head: components of a head.
        trained, used: tokens of the file's context and of the one it is opened for.

    Raises:
        UnsupportedError: a scaling that the architecture does not have.
        GGUFError: a value makes no sense, or the tensor of factors is missing.
    """
    dims = _rotated(key, head, arch.partial_rope)
    base = key.positive("rope.freq_base", 10000.0)
    original = key.tokens("rope.scaling.original_context_length", trained)
    kind, factor = _scaling(key)
    kind, factors = _factors(key, kind, used > original)
    if kind not in ("none", *arch.rope_types):
        raise UnsupportedError(
            f"rotary scaling {kind!r} is not supported for {key.name}; "
            f"supported are {', '.join(arch.rope_types)}"
        )
    if factors:
        _check_factors(key.file, factors, dims // 2)
    scale = key("rope.scaling.attn_factor", float, 1.0)
    rope = Rope(dims, base, factor, scale, factors, pairs=arch.rope_layout == "interleaved")
    return _with_yarn(key, rope, original, arch.yarn_log) if kind == "yarn" else rope


def _rotated(key: Keys, head: int, partial: bool) -> int:
    """How many components of a head are rotated."""
    dims = key.count("rope.dimension_count", head)
    if dims % 2 or dims > head:
        raise GGUFError(key.file.path, f"{dims} rotary dimensions of a head of {head}")
    if dims != head and not partial:
        raise UnsupportedError(f"{key.name} with rotary embedding on {dims} of {head} dimensions")
    return dims


def _scaling(key: Keys) -> tuple[str, float]:
    """The kind of scaling that the metadata names, and its factor."""
    # llama.cpp's default type is linear, which a missing factor turns into none.
    kind = key("rope.scaling.type", str, "linear")
    factor = key("rope.scaling.factor", float, key("rope.scale_linear", float, 0.0)) or 1.0
    if factor <= 0:
        raise GGUFError(key.file.path, f"rope.scaling.factor is {factor}; expected more than 0")
    if kind == "none" or (kind == "linear" and factor == 1.0):
        return "none", 1.0
    return kind, factor


def _factors(key: Keys, kind: str, long: bool) -> tuple[str, str]:
    """The kind of scaling, for which the tensors of factors count too, and the tensor's name."""
    tensors = key.file.tensors
    if "rope_freqs.weight" in tensors:
        named = "llama3" if kind == "none" else f"{kind} with rope_freqs.weight"
        return named, "rope_freqs.weight"
    if "rope_factors_long.weight" in tensors or "rope_factors_short.weight" in tensors:
        named = "longrope" if kind == "none" else kind
        return named, f"rope_factors_{'long' if long else 'short'}.weight"
    if kind == "longrope":
        raise GGUFError(key.file.path, "rope_factors_long.weight is missing for longrope scaling")
    return kind, ""


def _check_factors(file: GGUFFile, name: str, count: int) -> None:
    tensor = file.tensors.get(name)
    if tensor is None:
        raise GGUFError(file.path, f"{name} is missing")
    if tensor.shape != (count,):
        raise GGUFError(file.path, f"{name} is {tensor.shape}; expected {(count,)}")


def _with_yarn(key: Keys, rope: Rope, original: int, yarn_log: float) -> Rope:
    """``rope`` with YaRN's ramp and the scale that YaRN gives to queries and keys."""
    if rope.base <= 1:
        raise GGUFError(
            key.file.path, f"rope.freq_base is {rope.base}; expected more than 1 for YaRN"
        )
    scale, turns = rope.scale, rope.turns
    growth = math.log(rope.factor) if rope.factor > 1 else 0.0
    scale *= 1 + 0.1 * growth
    if yarn_log:
        # What the scale of scores already has (``mscale_all_dim`` in the models' own files).
        log = key("rope.scaling.yarn_log_multiplier", float, 0.0) * yarn_log
        scale /= 1 + 0.1 * log * growth
        fast = key("rope.scaling.yarn_beta_fast", float, turns[0])
        slow = key("rope.scaling.yarn_beta_slow", float, turns[1])
        turns = (fast, slow)
    return replace(rope, scale=scale, yarn=original, turns=turns)
