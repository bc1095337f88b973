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
from collections.abc import Iterator
from dataclasses import replace
from itertools import accumulate, pairwise

from ..errors import UnsupportedError
from .axes import TOGETHER, UNITS, WHOLE, Sizes, counts, per_unit, tiles, together
from .plan import Plan, WeightPlan
from .rows import Ranges, RowSource
from .share import Kept, Share, Wide
from .table import Config

_Axis = tuple[str, int]  # its name, and how many units it has in this layer

# Weights of a row that a kernel reads at a time, of every format.
_STEP = 32
# What a layer's state that does not grow is split by.
_RECURRENT = ("key_heads", "ssm_heads", "ssm_channels", "channels")


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
    """How each axis is split.

    Where it does not come out even the ranks take turns, layer by layer, to have more: of the whole
    model all have about as much.

    steps  of each axis that is split, how many units stay together.
    turns  whether layers may be split differently: not if some read what others keep.
    """

    def __init__(self, weights: Plan, ranks: int, *, outer: bool = False) -> None:
        self.weights, self.ranks = weights, ranks
        self.steps: dict[_Axis, int] = {}
        self.notes: list[str] = []
        config = weights.config
        self.turns = all(config.sizes_of(i)["kv"] for i in range(config.layers))
        for axis, step in self._all_steps().items():
            name, units = axis
            if name == "ssm_heads":
                step = together(units, config.sizes["ssm_groups"], step, ranks)
            pieces = -(-units // step)
            if pieces >= ranks or name in ("expert_ff", "shared_ff"):
                self.steps[axis] = step
            else:
                self.notes.append(
                    f"{WHOLE[name]} is whole on every machine: {units} in units of {step} cannot "
                    f"be shared by {ranks}"
                )
        if not outer and all(name == "vocab" for name, _ in self.steps):
            raise UnsupportedError(
                f"the model cannot be shared by {ranks} machines: "
                + "; ".join(dict.fromkeys(self.notes))
            )

    def _all_steps(self) -> dict[_Axis, int]:
        """How many units of each axis stay together, so that every rank has whole blocks."""
        steps: dict[_Axis, int] = {}
        for _, sizes, weight in _weights(self.weights):
            for name in weight.of.shape:
                for size in TOGETHER.get(name, (name,)):
                    axis = _axis(size, sizes)
                    if axis is None:
                        if size in UNITS and sizes.get(size):
                            self.notes.append(f"{WHOLE[UNITS[size]]} is whole on every machine")
                        continue
                    block = 1
                    if _is_column(weight, name):
                        block = math.lcm(*(s.format.block_size for s in weight.weight))
                        block = math.lcm(block, _STEP) if axis[1] == sizes[size] else block
                    each = sizes[size] // axis[1] // tiles(size, sizes)
                    step = block // math.gcd(block, each)
                    if tiles(size, sizes) > 1 and each * axis[1] % block:
                        step = axis[1]  # runs begin within a block
                    steps[axis] = math.lcm(steps.get(axis, 1), step)
        return steps

    def bounds(self, axis: _Axis, sizes: Sizes) -> list[int]:
        """Where the units of each rank begin in a layer, and the end of the last."""
        name, units = axis
        step, ranks = self.steps[axis], self.ranks
        base, extra = divmod(-(-units // step), ranks)
        # Attention and what follows it have more on different ranks.
        first = (sizes["layer"] if self.turns else 0) + (name != "kv_heads")
        counts = [base + ((rank - first) % ranks < extra) for rank in range(ranks)]
        return [min(end * step, units) for end in accumulate(counts, initial=0)]

    def ranges(self, name: str, sizes: Sizes, rank: int) -> Ranges | None:
        """Which of a size's rows or columns a rank has; None for all of them."""
        found, at = [], 0
        for size in TOGETHER.get(name, (name,)):
            axis = _axis(size, sizes)
            if axis is None or axis not in self.steps:
                return None
            first, end = self.bounds(axis, sizes)[rank : rank + 2]
            first, end, run = per_unit(size, sizes, first, end)
            found += [(start + first, start + end) for start in range(at, at + sizes[size], run)]
            at += sizes[size]
        return tuple(found)

    def share(self, rank: int) -> Share:
        """What a rank holds."""
        config = self.weights.config
        outer: list[WeightPlan] = []
        layers: list[list[WeightPlan]] = [[] for _ in self.weights.layers]
        sums, numbers = dict[str, int](), dict[str, dict[str, int]]()
        absent, norms, kept = dict[str, int](), dict[str, Wide](), dict[str, Kept]()
        nbytes = replicated = whole = 0
        for place, sizes, weight in _weights(self.weights):
            container = weight.module.rpartition(".")[0]
            mine = self._part(weight, sizes, rank)
            whole += _bytes(weight)
            columns = self.ranges(weight.of.shape[-1], sizes, rank)
            if columns is not None and _is_column(weight, weight.of.shape[-1]):
                sums[_block(self.weights, place, container) or weight.module] = weight.shape[-2]
                axis = UNITS[weight.of.shape[-1]]
                if found := counts(axis, sizes, self._units(axis, sizes, rank)):
                    numbers[container] = found
            if mine is None:
                absent[container] = weight.shape[-2]  # in the end that of the last matrix
                continue
            if mine is not weight and (wide := self._norm(weight, sizes, rank)) is not None:
                norms[weight.module] = wide
            if mine is not weight:
                kept[weight.module] = self._kept(weight, sizes, rank)
            (outer if place is None else layers[place]).append(mine)
            nbytes += _bytes(mine)
            replicated += _bytes(mine) if mine is weight else self._doubled(mine, sizes, rank)
        tokens = "vocab", config.sizes["vocab"]
        vocabulary = self.bounds(tokens, {"layer": 0}) if tokens in self.steps else []
        every = [_sizes(config, i) for i in range(config.layers)]
        attend = [sizes for sizes in every if sizes["cache"]]
        most = max((sizes["kv_heads"] for sizes in attend), default=0)
        kv = [self._units("kv_heads", sizes, rank) for sizes in attend]
        return Share(
            rank=rank,
            ranks=self.ranks,
            plan=Plan(self._config(rank), tuple(outer), tuple(map(tuple, layers))),
            sums=sums,
            absent=absent,
            norms=norms,
            kept=kept,
            vocabulary=tuple(b - a for a, b in pairwise(vocabulary)),
            counts=numbers,
            kv_heads=(max(kv, default=most), most),
            fewest=min(kv, default=most),
            nbytes=nbytes,
            replicated=replicated,
            whole=whole,
            notes=tuple(dict.fromkeys(self.notes)),
            layers=range(config.layers),
        )

    def _units(self, axis: str, sizes: Sizes, rank: int) -> int:
        """How many of an axis's units a rank has."""
        if (axis, sizes[axis]) not in self.steps:
            return sizes[axis]
        first, end = self.bounds((axis, sizes[axis]), sizes)[rank : rank + 2]
        return end - first

    def _norm(self, weight: WeightPlan, sizes: Sizes, rank: int) -> Wide | None:
        """A norm over heads of which this rank has some; None if it has all that it needs."""
        width = weight.shape[0]
        if weight.of.shape in (("q",), ("kv",), ("ssm_width",)):
            return Wide(width)
        if weight.of.shape != ("ssm_inner",) or sizes["ssm_groups"] >= self.ranks:
            return None
        heads, groups = sizes["ssm_heads"], sizes["ssm_groups"]
        first = self.bounds(("ssm_heads", heads), sizes)[rank]
        return Wide(width // groups, groups, first * groups // heads)

    def _doubled(self, mine: WeightPlan, sizes: Sizes, rank: int) -> int:
        """Bytes of a rank's rows of ``B`` and ``C`` of groups of heads that ranks share."""
        doubled = [name for name in TOGETHER.get(mine.of.shape[0], ()) if name == "ssm_bc"]
        if not doubled or sizes["ssm_groups"] >= self.ranks:
            return 0
        rows = len(doubled) * _length(self.ranges("ssm_bc", sizes, rank) or ())
        return rows * sum(sources[0].row_bytes for sources in (mine.weight, mine.bias) if sources)

    def _kept(self, weight: WeightPlan, sizes: Sizes, rank: int) -> Kept:
        """Which matrices of a stack, rows and columns of a weight a rank has."""
        names = weight.of.shape
        if len(names) == 1:
            return None, self.ranges(names[0], sizes, rank), None
        lead = self.ranges(names[0], sizes, rank) if len(names) == 3 else None
        return lead, self.ranges(names[-2], sizes, rank), self.ranges(names[-1], sizes, rank)

    def _part(self, weight: WeightPlan, sizes: Sizes, rank: int) -> WeightPlan | None:
        """A rank's part of a weight; the weight itself if that is all, None if it is nothing."""
        names, last = weight.of.shape, weight.of.shape[-1]
        lead, kept, columns = self._kept(weight, sizes, rank)
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
            sizes = _sizes(config, i)
            own = {} if not config.by_layer else dict(config.by_layer[i])
            kept = {"cache": "kv_heads"} if not config.architecture.latent else {}
            kept["state"] = next((a for a in _RECURRENT if a in sizes), "")
            for size, axis in kept.items():
                if axis:
                    units = self._units(axis, sizes, rank)
                    own[size] = sizes[size] * units // sizes[axis]
            by_layer.append(own)
        return replace(config, by_layer=tuple(by_layer))


def _weights(weights: Plan) -> Iterator[tuple[int | None, Sizes, WeightPlan]]:
    """Each weight with its layer and the sizes there."""
    for weight in weights.outer:
        yield None, {**weights.config.sizes, "layer": 0}, weight
    for i, layer in enumerate(weights.layers):
        sizes = _sizes(weights.config, i)
        for weight in layer:
            yield i, sizes, weight


def _sizes(config: Config, layer: int) -> Sizes:
    """Those of a layer, with its number."""
    return {**config.sizes_of(layer), "layer": layer}


def _axis(size: str, sizes: Sizes) -> _Axis | None:
    """The axis of a size in a layer, if the layer has it and what counts its units."""
    units = UNITS.get(size, "")
    return (units, sizes[units]) if units in sizes and sizes.get(size) else None


def _is_column(weight: WeightPlan, name: str) -> bool:
    return len(weight.of.shape) > 1 and name == weight.of.shape[-1]


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
