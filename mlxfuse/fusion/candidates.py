"""What may be fused, and the choice among it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from ..errors import NotFusible


@dataclass(frozen=True)
class Candidate:
    """One place that can be fused.

    name      of the kind of fusion.
    score     higher is chosen first.
    path      of the module it belongs to.
    claims    paths of modules that it replaces, or whose own results are no more computed; no other
              candidate may claim them, nor what is below or above them.
    emit      makes the fused form; once it is made, does nothing.
    undo      takes it off again, likewise.
    explain   what it does, for a report.
    formats   types or formats of the weights, in order.
    """

    name: str
    score: float
    path: str
    claims: frozenset[str]
    emit: Callable[[], None]
    undo: Callable[[], None]
    explain: str
    formats: tuple[str, ...] = ()

    def __reduce__(self) -> tuple[object, ...]:
        """A copy, or a pickle, does nothing: it does not reach the model."""
        return Candidate, tuple(
            _nothing if f.name in ("emit", "undo") else getattr(self, f.name) for f in fields(self)
        )


def _nothing() -> None:
    """Stands for `Candidate.emit` and `undo` where there is no model."""


class Skip(NamedTuple):
    """One place that is not fused, and why."""

    name: str
    path: str
    reason: str


@dataclass(frozen=True)
class Tree:
    """A model as detectors see it.

    model    the whole.
    modules  (path, module) in the order of the layers, once for each path.
    """

    model: nn.Module
    modules: tuple[tuple[str, nn.Module], ...] = field(repr=False)
    _uses: Mapping[int, int] = field(repr=False)
    _holders: Mapping[int, int] = field(repr=False)

    @classmethod
    def of(cls, model: nn.Module) -> Tree:
        modules = tuple(sorted(_modules(model), key=lambda item: natural(item[0])))
        uses = Counter(id(module) for _, module in modules)
        once = {id(module): module for _, module in modules}
        holders = Counter(
            id(a) for m in once.values() for a in m.values() if isinstance(a, mx.array)
        )
        return cls(model, modules, uses, holders)

    def check_alone(
        self, parent: nn.Module, names: Iterable[str] = (), *, arrays: bool = True
    ) -> None:
        """Raise unless the parent and its children can be changed without changing another module.

        Args:
            arrays: nor may an array of a child be used elsewhere.

        Raises:
            NotFusible: they cannot.
        """
        if self._uses[id(parent)] > 1:
            raise NotFusible("it is used in several places")
        for name in names:
            if self._uses[id(parent[name])] > 1:
                raise NotFusible(f"{name} is used in several places")
            held = [a for a in parent[name].values() if isinstance(a, mx.array)]
            if arrays and any(self._holders[id(a)] > 1 for a in held):
                raise NotFusible(f"{name} shares its weight with another module")

    def after(self, path: str) -> nn.Module | None:
        """The next module of the list that a path is in, if there is one."""
        parent, _, place = path.rpartition(".")
        wanted = f"{parent}.{int(place) + 1}" if place.isdigit() else None
        return next((module for other, module in self.modules if other == wanted), None)

    def holders(self, module: nn.Module) -> int:
        """How many modules have the weight that this one has."""
        return max(self._holders[id(a)] for a in module.values() if isinstance(a, mx.array))


def site(candidate: Candidate, modules: Mapping[str, nn.Module]) -> str:
    """What places that are alike have in common: the fusion, the class, and its weights.

    Args:
        modules: of the model by path.
    """
    sizes = []
    for path in sorted(candidate.claims, key=natural):
        weight = getattr(modules.get(path), "weight", None)
        if weight is not None:
            shape = weight.shape if isinstance(weight, mx.array) else (weight.rows, weight.columns)
            sizes.append("x".join(map(str, shape)))
    module = modules[candidate.path]
    cls = getattr(vars(module).get("_fused"), "original", type(module))  # patched or not
    parts = (candidate.name, cls.__name__, "+".join(candidate.formats), "+".join(sizes))
    return " ".join(part for part in parts if part)


Detector = Callable[[Tree], Iterable[Candidate | Skip]]

DETECTORS: dict[str, Detector] = {}
"""Kind of fusion -> what finds its places, in the order of the report."""


def register_detector(name: str) -> Callable[[Detector], Detector]:
    """Decorator: add a detector for a kind of fusion, for every later `patch_model`.

    A detector gets a `Tree` and yields a `Candidate` for each place that can be fused and a
    `Skip` for each that looks like one and cannot. It must not change the model.
    """

    def register(detector: Detector) -> Detector:
        DETECTORS[name] = detector
        return detector

    return register


def natural(path: str) -> tuple[tuple[int, str], ...]:
    """Order of paths in which layer 10 follows layer 9."""
    return tuple((int(p), "") if p.isdigit() else (-1, p) for p in path.split("."))


def _modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module with its path, once for each path."""
    stack: list[tuple[str, Any]] = [("", model)]
    while stack:
        path, node = stack.pop()
        if isinstance(node, nn.Module):
            yield path, node
            node = node.children()
        items = node.items() if isinstance(node, dict) else enumerate(node)
        for key, value in items:
            if isinstance(value, (dict, list)):
                stack.append((f"{path}.{key}" if path else str(key), value))
