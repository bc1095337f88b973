"""Projections of linears that have low-rank adapters (LoRA), added in float behind them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.tuner.lora import LoRALinear

from ..errors import NotFusible
from ..kernels import Backend
from .activations import GATED, PLAIN
from .projection import Projection
from .snapshot import Snapshot


def base(linear: nn.Module) -> nn.Module:
    """The linear itself, or the one below mlx-lm's adapter."""
    found: nn.Module = linear.linear if type(linear) is LoRALinear else linear
    return found


def bases(parent: nn.Module, names: Sequence[str]) -> nn.Module:
    """A module outside the model that has the linears of ``parent`` without their adapters."""
    made = nn.Module()
    for name in names:
        made[name] = base(parent[name])
    return made


def check_unadapted(parent: nn.Module, names: Sequence[str]) -> None:
    """Raise unless an activation can be computed together with the product before it.

    Raises:
        NotFusible: what an adapter adds comes between them.
    """
    adapted = [name for name in names if type(parent[name]) is LoRALinear]
    if adapted:
        verb = "have adapters" if len(adapted) > 1 else "has an adapter"
        raise NotFusible(f"{' and '.join(adapted)} {verb}, added before the activation")


class AdaptedProjection(Projection):
    """The projection ``inner`` of linears below adapters, and the adapters' products.

    Each is computed and rounded as `LoRALinear` does it: ``(scale * ((x @ a) @ b))`` in the widest
    type, then in that of x.

    Args:
        rows: of the results, where the only linear gives several.
    """

    def __init__(
        self,
        parent: nn.Module,
        names: Sequence[str],
        inner: Projection,
        rows: Sequence[int] = (),
    ) -> None:
        self.formats = inner.formats
        self._inner, self._ends = inner, tuple(accumulate(rows))[:-1]
        self._adapters = [x if type(x) is LoRALinear else None for x in map(parent.get, names)]
        held: list[tuple[Callable[[str], object], str]] = [(parent.get, name) for name in names]
        for adapter in filter(None, self._adapters):
            held += [(adapter.get, name) for name in ("linear", "lora_a", "lora_b")]
            held.append((vars(adapter).get, "scale"))
        self.snapshot = Snapshot.joined((Snapshot(held), inner.snapshot))
        self.holds = self.snapshot.holds

    def _products(self, x: mx.array) -> list[mx.array | None]:
        found: list[mx.array | None] = []
        for adapter in self._adapters:
            if adapter is None:
                found.append(None)
                continue
            product = (adapter.scale * ((x @ adapter.lora_a) @ adapter.lora_b)).astype(x.dtype)
            found += mx.split(product, self._ends, axis=-1)
        return found

    def split(self, x: mx.array, on: Backend) -> Sequence[mx.array] | None:
        results = self._inner.split(x, on)
        if results is None:
            return None
        pairs = zip(results, self._products(x), strict=True)
        return [y if product is None else y + product for y, product in pairs]

    def activated(self, x: mx.array, activation: str, on: Backend) -> mx.array | None:
        results = self.split(x, on)
        if results is None:
            return None
        act = PLAIN if activation in PLAIN else GATED
        return act[activation](*results)

    def added(self, x: mx.array, residual: mx.array, on: Backend) -> mx.array | None:
        sums, (product,) = self._inner.added(x, residual, on), self._products(x)
        return sums if sums is None or product is None else sums + product
