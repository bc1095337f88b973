"""What MLX-LM's own classes can be told in a checkpoint's ``config.json``; numpy only."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import UnsupportedError
from .families.gemma4 import proportional
from .table import Config

# Of our own classes only these compute what MLX-LM's do.
_SAME = {"gemma2_model": "gemma2", "gemma3_model": "gemma3_text"}


@dataclass(frozen=True, slots=True)
class _Told:
    """What one class of MLX-LM can be told of rotary embeddings.

    scalings  the types of ``rope_scaling`` that it knows.
    own       what it is told in place of ``rope_scaling``, from the configuration and the factors
              of the periods, even if nothing is scaled; empty where it cannot be told.
    partial   part of a head may be rotated, and ``original_max_position_embeddings`` is beside
              ``rope_scaling`` too.
    """

    scalings: tuple[str, ...] = ()
    own: Callable[[Config, NDArray[np.float64]], dict[str, Any]] | None = None
    partial: bool = False


_TOLD = {
    **dict.fromkeys(
        ("gemma3_text", "llama", "qwen2", "qwen3"), _Told(("linear", "yarn", "longrope"))
    ),
    "gemma4_text": _Told(("proportional",), own=proportional),
    "gpt_oss": _Told(("linear", "yarn")),
    "phi3": _Told(("linear", "longrope"), partial=True),
}


def stock_type(config: Config) -> str:
    """The ``model_type`` of the class of MLX-LM that computes what the architecture's does."""
    name = config.architecture.module.rpartition(".")[2]
    return _SAME.get(name, name)


def rope_args(config: Config, own: NDArray[np.float32] | None, path: Path) -> dict[str, Any]:
    """What MLX-LM's class makes the same rotation of, for ``config.json``.

    Args:
        own: the file's factors of the periods, if it has any.
        path: of the file, for the error.

    Raises:
        UnsupportedError: the class cannot be told this rotation.
    """
    name, rope = stock_type(config), config.rope
    told = _TOLD.get(name, _Told())
    args = {"partial_rotary_factor": rope.dims / config.args["head_dim"]} if told.partial else {}
    if rope.plain and told.own is None:
        return args
    factors = np.full(rope.dims // 2, float(rope.factor))
    factors *= 1.0 if own is None else own
    scaling = _scaling(config, factors) if told.own is None else told.own(config, factors)
    if scaling.get("type") not in told.scalings:
        raise UnsupportedError(
            f"{path}: MLX-LM's {name} cannot be told its rotary scaling (it knows "
            f"{', '.join(told.scalings) or 'none'}); `mlxfuse export` without --mlx keeps it"
        )
    if told.own is not None:
        return args | {"rope_parameters": scaling}
    beside = {k: v for k, v in scaling.items() if k.startswith("original") and told.partial}
    return {**args, "rope_scaling": scaling, **beside}


def _scaling(config: Config, factors: NDArray[np.float64]) -> dict[str, Any]:
    """``rope_scaling``; empty if MLX-LM has no name for it.

    Its ``longrope`` is any factors of the periods, and a magnitude that follows from how many
    times longer the context is than the original one.
    """
    rope, context = config.rope, config.args["max_position_embeddings"]
    if not rope.factors and rope.scale == 1.0 and not rope.yarn:
        return {"type": "linear", "factor": float(rope.factor), "long_factor": 1.0}
    if rope.yarn and rope.factor > 1:
        # MLX-LM's magnitude is 1 + mscale / 10 * log(factor).
        mscale = (rope.scale - 1) / (0.1 * math.log(rope.factor))
        scaling = {"type": "yarn", "factor": float(rope.factor), "mscale": mscale}
        return scaling | {"original_max_position_embeddings": rope.yarn}
    if rope.scale >= 1 and not rope.yarn:
        # MLX-LM's magnitude is the root of log(context) / log(original), a whole number.
        original = max(2, round(context ** (1 / rope.scale**2)))
        if math.isclose(math.sqrt(math.log(context, original)), rope.scale, rel_tol=1e-5):
            named = {"short_factor": factors.tolist(), "long_factor": factors.tolist()}
            return {"type": "longrope", **named, "original_max_position_embeddings": original}
    return {}
