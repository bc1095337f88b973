"""Parts of a model's graph that are the same at every decoded token, built once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..kernels import disabled, fallbacks, launches
from .snapshot import Snapshot

_Key = tuple[Any, int, int, tuple[int, ...]]
_Graph = tuple[Callable[..., Any], Counter[str]]


class Piece:
    """``function(run, *arrays)`` as a graph that `mx.compile` keeps, one for each run and shape.

    To call a Metal kernel costs the host 4 us and more, its place in a kept graph 0.5; MLX's own
    variable ``MLX_DISABLE_COMPILE=1`` does without. What the function reads besides its arguments
    becomes a constant of the graph: callers see to it that the arrays of projections are still
    those, here that those of ``children`` are.

    Args:
        children: (parent, name) of the other modules that the function calls.
    """

    def __init__(
        self, function: Callable[..., Any], children: Iterable[tuple[nn.Module, str]]
    ) -> None:
        self._function = function
        held: list[tuple[Callable[[str], object], str]] = []
        for parent, name in children:
            held.append((parent.get, name))
            for module in parent[name].modules():
                held += [(module.get, n) for n, a in module.items() if isinstance(a, mx.array)]
        self._holds = Snapshot(held).holds
        self._graphs: dict[_Key, _Graph] = {}
        self._builds = 0

    def __call__(self, run: Any, *arrays: Any) -> Any:
        if not self._holds():
            return self._function(run, *arrays)
        # A self-test that fails later is to be heeded; other shapes may have other launches.
        key = run, len(disabled), len(arrays), arrays[0].shape
        graph, launched = self._graphs.get(key) or self._keep(key)
        builds = self._builds
        found = graph(*arrays)
        if self._builds == builds:
            for op, count in launched.items():
                launches[op] += count
        return found

    def _keep(self, key: _Key) -> _Graph:
        launched: Counter[str] = Counter()

        def build(*arrays: mx.array) -> Any:
            self._builds += 1
            before, fallen = launches.copy(), fallbacks.total()
            found = self._function(key[0], *arrays)
            launched.clear()
            launched.update(launches - before)
            if fallbacks.total() > fallen:  # each of them is to be counted
                self._graphs[key] = partial(self._function, key[0]), Counter()
            return found

        self._graphs[key] = mx.compile(build), launched
        return self._graphs[key]
