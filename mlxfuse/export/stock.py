"""Whether mlx-lm's class, made of a checkpoint's ``config.json``, runs what a file says."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..errors import UnsupportedError
from ..nn.rope import FrequencyRoPE

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ..models.rope import Rope
    from ..models.table import Config

    Shapes = Mapping[str, tuple[int, ...]]

# Of a rotated vector of about 1: as far as float32 sines of a few hundred radians go apart.
_LIMIT = 1e-3


def check_stock(
    path: Path, config: Config, described: dict[str, Any], shapes: Shapes, factors: Any = None
) -> None:
    """Make the class as ``mlx_lm.load`` does, of arrays that are never computed.

    Args:
        described: what ``config.json`` will say.
        shapes: parameter -> shape of what will be written, unquantised.
        factors: values of the file's tensor of rotary factors, if it has one.

    Raises:
        UnsupportedError: the class has other parameters, or rotates by other angles.
    """
    name = described["model_type"]
    module = import_module(f"mlx_lm.models.{name}")
    model: Any = module.Model(module.ModelArgs.from_dict(described))
    # A few classes learn from the names of the weights whether they have a head of their own.
    given = {parameter: mx.zeros(shape) for parameter, shape in shapes.items()}
    given = model.sanitize(given) if hasattr(model, "sanitize") else given
    parameters: Any = tree_flatten(model.parameters())
    expected = {parameter: value.shape for parameter, value in parameters}
    found = {parameter: value.shape for parameter, value in given.items()}
    if wrong := sorted(found.items() ^ expected.items()):
        parameter, _ = wrong[0]
        raise _refused(
            path,
            config,
            f"{name} has {parameter} as {expected.get(parameter)}, the file {found.get(parameter)}",
        )
    for i, layer in enumerate(model.layers):
        attention = layer.get(config.architecture.attention_at, {})
        if not _same(attention.get("rope"), config.rope_of(i), factors):
            raise _refused(path, config, f"{name} rotates positions of layer {i} in another way")


def _refused(path: Path, config: Config, why: str) -> UnsupportedError:
    return UnsupportedError(
        f"{path}: MLX-LM has no class that runs {config.architecture.name} as this file has it: "
        f"its {why}; `mlxfuse export` without --mlx keeps it"
    )


def _same(stock: nn.Module | None, rope: Rope | None, factors: Any) -> bool:
    """Whether both rotate a vector alike, at a position far from the first."""
    if stock is None or rope is None:
        return stock is None and rope is None
    dims = rope.dims + 2  # of which the last two stay as they are
    x = mx.random.normal((1, 1, 2, dims), key=mx.random.key(0))
    used = factors[: rope.dims // 2] if rope.factors else None
    periods = mx.array(rope.periods(used))
    want = FrequencyRoPE(periods, rope.scale, pairs=rope.pairs)(x, offset=100)
    return float(mx.abs(stock(x, offset=100) - want).max()) < _LIMIT
