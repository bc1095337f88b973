"""Rotary embedding of q and k with their norms, as one kernel where there is one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache

import mlx.core as mx
import mlx.nn as nn

from ..kernels import Backend, Prepared
from ..kernels.norm.norm_rope import RopeOptions, norm_rope, prepare
from .snapshot import Snapshot

# Tokens of a call up to which its launch is kept: prompts have lengths of every kind.
_KEPT = 32


class Rotation:
    """What an attention's norms and rotary embedding do with q and k.

    holds   whether the modules still have the arrays that they had; see `Snapshot`.
    values  whether it norms the values too.

    Args:
        parts: the modules that do it, by the names they have in ``parent``.
        options: what they do.
    """

    def __init__(
        self,
        parent: nn.Module,
        parts: Mapping[str, nn.Module],
        options: RopeOptions,
        *,
        values: bool = False,
    ) -> None:
        self.values = values
        held: list[tuple[Callable[[str], object], str]] = [(parent.get, name) for name in parts]
        for part in parts.values():
            held += [(part.get, n) for n, a in part.items() if isinstance(a, mx.array)]
        self.snapshot = Snapshot(held)
        self.holds = self.snapshot.holds
        self._options = options
        self._prepared: dict[tuple[object, ...], Prepared] = {}

    def __call__(
        self,
        queries: mx.array,
        keys: mx.array | None,
        offset: int | mx.array,
        on: Backend,
        values: mx.array | None = None,
    ) -> list[mx.array] | None:
        """[B, L, heads * D] each -> [B, heads, L, D]; None if the modules are to be called."""
        reason = None
        given = [array for array in (queries, keys, values) if array is not None]
        if on.prepares:
            place = position(offset) if isinstance(offset, int) else offset
            key = (queries.shape, place.ndim, *(x.dtype for x in given))
            prepared = self._prepared.get(key)
            if prepared is None:
                prepared = prepare(queries, keys, place, self._options, values)
                if prepared is not None and queries.shape[1] <= _KEPT:
                    self._prepared[key] = prepared
            if prepared is not None:
                found = prepared(*given, place.astype(mx.int32).reshape(-1), on=on)
                if found is not None:
                    return found
                reason = "it failed its self-test"
        if not on.takes("norm_rope", reason):
            return None
        return list(norm_rope(queries, keys, offset, self._options, values))


@lru_cache(maxsize=16)
def position(offset: int) -> mx.array:
    """The same array for every layer."""
    array = mx.array(offset, mx.int32)
    mx.eval(array)
    return array
