"""Which part of a model each of several machines holds; numpy only.

Every size of a model that can be split has a name (`Weight.shape`) and lies along an axis: the
key-value heads with the query heads that read them, the width of an MLP, of experts or of a shared
expert, the vocabulary. A machine, called a rank, has a range of each axis. Of a matrix whose rows
lie along an axis it holds whole rows; of one whose columns do, whole blocks of columns, and the
results of all ranks are added up: tensor parallelism (Shoeybi et al., arXiv 1909.08053). No weight
is rounded by it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

from ..errors import UnsupportedError
from .plan import Plan, WeightPlan
from .rows import Ranges, RowSource
from .table import Config

Sizes = Mapping[str, int]
_Axis = tuple[str, int]  # its name, and how many units it has in this layer

# Size -> the size that counts the units of the axis that it lies along.
_UNITS = {
    **dict.fromkeys(("q", "whole_q", "kv", "v", "o", "heads"), "kv_heads"),
    **{name: name for name in ("ff", "expert_ff", "shared_ff", "vocab")},
}
# Several sizes one after the other.
_TOGETHER = {
    "qkv": ("q", "kv", "kv"),
    "gate_up": ("ff", "ff"),
    "shared_rows": ("shared_ff", "shared_ff"),
}
_NAMES = {
    "kv_heads": "attention (key/value heads)",
    "ff": "the MLP (its width)",
    "vocab": "the vocabulary",
}
# Weights of a row that a kernel reads at a time, of every format.
_STEP = 32


@dataclass(frozen=True, slots=True)
class Share:
    """What one of several ranks holds of a model.

    rank, ranks  its number, and how many there are.
    plan         its rows and columns of each weight; a weight of which it has none is left out.
    sums         paths of the modules whose results are added up over the ranks.
    absent       path of each module of which it has nothing -> how many outputs a row has there.
    norms        path of each norm over what the ranks have parts of -> the width of the whole.
    vocabulary   how many rows of the vocabulary each rank has; empty if each has all.
    heads        path of each attention that is split -> (query heads, key-value heads) here.
    kv_heads     its key-value heads, and the model's; of the layer that has most of them.
    nbytes       bytes of the file that it holds.
    replicated   of them, bytes of what every rank holds whole.
    whole        bytes of the file that one machine alone would hold.
    notes        what is not split, and why.
    layers       the layers of which it has something: all of them, or the stage of a pipeline.
    stages       the layers with which the ranks' stages end, if it is a pipeline.
    """

    rank: int
    ranks: int
    plan: Plan
    sums: frozenset[str]
    absent: Mapping[str, int]
    norms: Mapping[str, int]
    vocabulary: tuple[int, ...]
    heads: Mapping[str, tuple[int, int]]
    kv_heads: tuple[int, int]
    nbytes: int
    replicated: int
    whole: int
    notes: tuple[str, ...]
    layers: range
    stages: tuple[int, ...] = ()

    def __str__(self) -> str:
        """A line of a report."""
        own, every = self.kv_heads
        part = f"{own} of {every} key/value heads and " if self.heads else ""
        if self.stages:
            part = f"layers {self.layers[0]} to {self.layers[-1]} and "
        return (
            f"{self.ranks} machines: this one, rank {self.rank}, has {part}"
            f"{100 * self.nbytes / self.whole:.0f} % of the bytes"
        )


def shares(weights: Plan, ranks: int) -> tuple[Share, ...]:
    """What each of so many ranks holds of a model.

    Raises:
        UnsupportedError: nothing but the vocabulary can be split in so many parts.
    """
    split = _Split(weights, ranks)
    return tuple(split.share(rank) for rank in range(ranks))


def stages(weights: Plan, ranks: int) -> tuple[Share, ...]:
    """What each of so many ranks holds of a pipeline: consecutive layers, about as many bytes each,
    and some rows of the vocabulary.

    Raises:
        UnsupportedError: there are fewer layers than ranks.
    """
    config = weights.config
    if config.layers < ranks:
        raise UnsupportedError(f"{config.layers} layers cannot be shared by {ranks} machines")
    ends = _ends([sum(map(_bytes, layer)) for layer in weights.layers], ranks)
    outer = _Split(replace(weights, layers=()), ranks, outer=True)
    whole = sum(_bytes(weight) for _, _, weight in _weights(weights))
    found = []
    for rank, end in enumerate(ends):
        layers = range(ends[rank - 1] if rank else 0, end)
        share = outer.share(rank)
        held = tuple(part if i in layers else () for i, part in enumerate(weights.layers))
        none = {"cache": 0, "state": 0}
        sizes = config.by_layer or ({},) * config.layers
        by_layer = tuple(own if i in layers else {**own, **none} for i, own in enumerate(sizes))
        plan = Plan(replace(config, by_layer=by_layer), share.plan.outer, held)
        found.append(
            replace(
                share,
                plan=plan,
                layers=layers,
                stages=tuple(end - 1 for end in ends),
                nbytes=share.nbytes + sum(_bytes(weight) for part in held for weight in part),
                whole=whole,
            )
        )
    return tuple(found)


def _ends(sizes: list[int], ranks: int) -> list[int]:
    """Behind which layer each rank's layers end."""
    sums = list(accumulate(sizes))
    ends: list[int] = []
    for rank in range(1, ranks):
        first = (ends[-1] if ends else 0) + 1
        choices = range(first, len(sizes) - (ranks - rank) + 1)
        ends.append(min(choices, key=lambda end: abs(sums[end - 1] - sums[-1] * rank / ranks)))
    return [*ends, len(sizes)]


class _Split:
    """How each axis is split: where the units of each rank begin, and the end of the last."""

    def __init__(self, weights: Plan, ranks: int, *, outer: bool = False) -> None:
        self.weights, self.ranks = weights, ranks
        self.bounds: dict[_Axis, list[int]] = {}
        self.notes: list[str] = []
        for axis, step in self._steps().items():
            name, units = axis
            pieces = -(-units // step)
            if pieces >= ranks or name in ("expert_ff", "shared_ff"):
                self.bounds[axis] = _bounds(units, step, ranks, first=name == "kv_heads")
            else:
                self.notes.append(
                    f"{_NAMES[name]} is whole on every machine: {units} in units of {step} cannot "
                    f"be shared by {ranks}"
                )
        if not outer and all(name == "vocab" for name, _ in self.bounds):
            raise UnsupportedError(
                f"the model cannot be shared by {ranks} machines: " + "; ".join(self.notes)
            )

    def _steps(self) -> dict[_Axis, int]:
        """How many units of each axis stay together, so that every rank has whole blocks."""
        steps: dict[_Axis, int] = {}
        for _, sizes, weight in _weights(self.weights):
            for name in weight.of.shape:
                for size in _TOGETHER.get(name, (name,)):
                    if size not in _UNITS or not sizes[size]:
                        continue
                    axis = _UNITS[size], sizes[_UNITS[size]]
                    each, block = sizes[size] // axis[1], 1
                    if _is_column(weight, name):
                        block = math.lcm(*(s.format.block_size for s in weight.weight))
                        block = block if axis[0] == "kv_heads" else math.lcm(block, _STEP)
                    step = block // math.gcd(block, each)
                    steps[axis] = math.lcm(steps.get(axis, 1), step)
        return steps

    def ranges(self, name: str, sizes: Sizes, rank: int) -> Ranges | None:
        """Which of a size's rows or columns a rank has; None for all of them."""
        found, at = [], 0
        for size in _TOGETHER.get(name, (name,)):
            axis = (_UNITS[size], sizes[_UNITS[size]]) if size in _UNITS else None
            if axis is None or axis not in self.bounds:
                return None
            first, end = self.bounds[axis][rank : rank + 2]
            each = sizes[size] // axis[1]
            found.append((at + first * each, at + end * each))
            at += sizes[size]
        return tuple(found)

    def share(self, rank: int) -> Share:
        """What a rank holds."""
        config = self.weights.config
        outer: list[WeightPlan] = []
        layers: list[list[WeightPlan]] = [[] for _ in self.weights.layers]
        sums, heads = set[str](), dict[str, tuple[int, int]]()
        absent, norms = dict[str, int](), dict[str, int]()
        nbytes = replicated = whole = 0
        for place, sizes, weight in _weights(self.weights):
            container = weight.module.rpartition(".")[0]
            mine = self._part(weight, sizes, rank)
            whole += _bytes(weight)
            columns = self.ranges(weight.of.shape[-1], sizes, rank)
            if columns is not None and _is_column(weight, weight.of.shape[-1]):
                sums.add(_block(self.weights, place, container) or weight.module)
                if _UNITS[weight.of.shape[-1]] == "kv_heads":
                    heads[container] = self._heads(sizes, rank)
            if mine is None:
                absent[container] = weight.shape[-2]  # in the end that of the last matrix
                continue
            if mine is not weight and len(weight.shape) == 1 and not weight.of.bare:
                norms[weight.module] = weight.shape[0]
            (outer if place is None else layers[place]).append(mine)
            nbytes += _bytes(mine)
            replicated += _bytes(mine) if mine is weight else 0
        vocabulary = self.bounds.get(("vocab", config.sizes["vocab"]), [])
        most = max((config.sizes_of(i)["kv_heads"] for i in range(config.layers)), default=0)
        return Share(
            rank=rank,
            ranks=self.ranks,
            plan=Plan(self._config(rank), tuple(outer), tuple(map(tuple, layers))),
            sums=frozenset(sums),
            absent=absent,
            norms=norms,
            vocabulary=tuple(b - a for a, b in pairwise(vocabulary)),
            heads=heads,
            kv_heads=(max((kv for _, kv in heads.values()), default=most), most),
            nbytes=nbytes,
            replicated=replicated,
            whole=whole,
            notes=tuple(self.notes),
            layers=range(config.layers),
        )

    def _heads(self, sizes: Sizes, rank: int) -> tuple[int, int]:
        first, end = self.bounds["kv_heads", sizes["kv_heads"]][rank : rank + 2]
        return (end - first) * sizes["heads"] // sizes["kv_heads"], end - first

    def _part(self, weight: WeightPlan, sizes: Sizes, rank: int) -> WeightPlan | None:
        """A rank's part of a weight; the weight itself if that is all, None if it is nothing."""
        names = weight.of.shape
        *_, rows = (None, *names[:-1]) if len(names) > 1 else (None, names[0])
        assert rows is not None
        last = names[-1] if len(names) > 1 else ""
        lead = self.ranges(names[0], sizes, rank) if len(names) == 3 else None
        kept, columns = self.ranges(rows, sizes, rank), self.ranges(last, sizes, rank)
        if lead is kept is columns is None:
            return weight
        if any(ranges is not None and not _length(ranges) for ranges in (lead, kept, columns)):
            return None
        found = [
            replace(source, columns=columns or (), matrices=lead or ())
            for source in _rows(weight.weight, kept)
        ]
        bias = list(weight.bias)
        if kept is not None and len(names) == 3:  # of each expert
            bias = [replace(source, columns=kept) for source in bias]
        elif kept is not None:
            bias = _rows(bias, kept)
        silent = columns is not None and any(
            _length(self.ranges(last, sizes, other) or ()) for other in range(rank)
        )
        return replace(weight, weight=tuple(found), bias=tuple(bias), silent=silent)

    def _config(self, rank: int) -> Config:
        """The configuration with the sizes of a rank's caches."""
        config = self.weights.config
        by_layer = []
        for i in range(config.layers):
            sizes = config.sizes_of(i)
            own = {} if not config.by_layer else dict(config.by_layer[i])
            if not config.architecture.latent and ("kv_heads", sizes["kv_heads"]) in self.bounds:
                own["cache"] = sizes["cache"] * self._heads(sizes, rank)[1] // sizes["kv_heads"]
            by_layer.append(own)
        return replace(config, by_layer=tuple(by_layer))


def _weights(weights: Plan) -> Iterator[tuple[int | None, Sizes, WeightPlan]]:
    """Each weight with its layer and the sizes there."""
    for weight in weights.outer:
        yield None, weights.config.sizes, weight
    for i, layer in enumerate(weights.layers):
        sizes = weights.config.sizes_of(i)
        for weight in layer:
            yield i, sizes, weight


def _is_column(weight: WeightPlan, name: str) -> bool:
    return len(weight.of.shape) > 1 and name == weight.of.shape[-1]


def _bounds(units: int, step: int, ranks: int, *, first: bool) -> list[int]:
    """Where the ranks' units begin, and the end.

    Args:
        first: the first ranks have more than the others, if it does not come out even; else the
            last ones.
    """
    base, extra = divmod(-(-units // step), ranks)
    counts = [base + (i < extra) for i in range(ranks)]
    ends = accumulate(counts if first else reversed(counts))
    return [0, *(min(end * step, units) for end in ends)]


def _block(weights: Plan, layer: int | None, container: str) -> str:
    """The block of experts that a module of a layer is in, or empty."""
    for weight in weights.layers[layer] if layer is not None else ():
        if weight.of.shape[0] == "experts" and len(weight.of.shape) == 3:
            block = weight.module.rsplit(".", 2)[0]
            if container.startswith(f"{block}."):
                return block
    return ""


def _rows(sources: tuple[RowSource, ...] | list[RowSource], kept: Ranges | None) -> list[RowSource]:
    """The rows that are kept, one after the other."""
    if kept is None:
        return list(sources)
    found, at = [], 0
    for source in sources:
        end = at + source.count
        own = tuple(
            (max(a, at) - at, min(b, end) - at) for a, b in kept if max(a, at) < min(b, end)
        )
        if own:
            found.append(replace(source, kept=own))
        at = end
    return found


def _length(ranges: Ranges) -> int:
    return sum(end - first for first, end in ranges)


def _bytes(weight: WeightPlan) -> int:
    bias = () if weight.silent else weight.bias
    return sum(source.nbytes for source in (*weight.weight, *bias))
