"""Which rows of the file make up which weight of the model; numpy only.

``plan`` pairs every tensor of a file with a weight of the model and checks shapes before a byte of
a weight is read.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ..errors import GGUFError, UnsupportedError
from ..gguf.blocks import can_dequantize
from ..gguf.exported import Stored
from ..gguf.relayout import relayout
from .rows import RowSource
from .table import Config, Weight, Weights

if TYPE_CHECKING:
    from concurrent.futures import Executor

    from ..formats import Format
    from ..gguf.reader import GGUFFile, Tensor

LAYER_NAME = re.compile(r"blk\.(\d{1,9})\.(.+)")
QKV = ("attn_q", "attn_k", "attn_v")
FUSED_QKV = "attn_qkv"
# llama.cpp's one tensor for several: their rows one after the other, of experts in each of them.
FUSED = {FUSED_QKV: QKV, "ffn_gate_up_exps": ("ffn_gate_exps", "ffn_up_exps")}
# Several tensors for what is one of mlx-lm's.
TOGETHER = {FUSED_QKV: QKV, "ffn_gate_up_shexp": ("ffn_gate_shexp", "ffn_up_shexp")}
# One tensor for several whose rows take turns, so many for each key head.
TURNS = {"ssm_ba": ("ssm_beta", "ssm_alpha")}


@dataclass(frozen=True, slots=True)
class WeightPlan:
    """One module of the model and the rows that fill it.

    module  full path, for example ``model.layers.0.self_attn.q_proj``.
    weight  its rows, from one or several tensors, one after the other.
    bias    likewise, or empty.
    group   path of the fused group it belongs to, for example ``model.layers.0.qkv``, or empty.
    of      its row of the architecture's table.
    silent  its bias is added by another of the machines that share the model.
    """

    module: str
    weight: tuple[RowSource, ...]
    bias: tuple[RowSource, ...]
    group: str
    of: Weight
    silent: bool = False

    @property
    def parameter(self) -> str:
        """The name of the weight among the model's parameters."""
        return self.module if self.of.bare else f"{self.module}.weight"

    @property
    def dense(self) -> bool:
        """Whether it is never dequantised anew at every call, whatever memory there is."""
        of = self.of
        return len(self.shape) == 1 or of.bare or of.dense or of.headed

    @property
    def shape(self) -> tuple[int, ...]:
        first = self.weight[0].shape
        return (*first[:-2], sum(s.count for s in self.weight), *first[1:][-1:])


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that is read from a file: the weights outside the layers, then layer by layer."""

    config: Config
    outer: tuple[WeightPlan, ...]
    layers: tuple[tuple[WeightPlan, ...], ...]


@dataclass(frozen=True, slots=True)
class Group:
    """Weights that share one set of streams, or one weight alone."""

    weights: tuple[WeightPlan, ...]

    @property
    def key(self) -> str:
        """What an exported folder calls the streams."""
        return self.weights[0].group or self.weights[0].module

    @property
    def sources(self) -> list[RowSource]:
        """The rows of all, one after the other."""
        return [source for weight in self.weights for source in weight.weight]

    @property
    def readable(self) -> bool:
        """Whether all rows are of formats that kernels read."""
        matrices = all(len(w.shape) > 1 and not (w.of.bare or w.of.dense) for w in self.weights)
        return matrices and all(source.format.traits for source in self.sources)

    @property
    def has_kernel(self) -> bool:
        """Whether kernels read all rows, and some are of types that MLX does not multiply."""
        return self.readable and any(source.format.kernel for source in self.sources)


def groups(weights: Plan) -> Iterator[Group]:
    """The weights that share one set of streams; alone where that cannot be."""
    for layer in (weights.outer, *weights.layers):
        found: dict[str, list[WeightPlan]] = {}
        for weight in layer:
            found.setdefault(weight.group or weight.module, []).append(weight)
        for members in found.values():
            together = Group(tuple(w for w in members if Group((w,)).readable))
            shared = together.weights if together.has_kernel else ()
            if shared:
                yield together
            yield from (Group((w,)) for w in members if not any(w is s for s in shared))


def first_rows(sources: Sequence[RowSource]) -> tuple[list[int], dict[Format, int]]:
    """Where each source begins in the streams of its format, and the rows of each format.

    Both are those of every expert, if there are any.
    """
    rows: dict[Format, int] = {}
    first = []
    for source in sources:
        first.append(rows.get(source.format, 0))
        rows[source.format] = first[-1] + source.count
    return first, rows


def fill(
    source: RowSource,
    data: NDArray[np.uint8],
    streams: Mapping[str, NDArray[np.generic]],
    first: int,
    pool: Executor | None = None,
) -> None:
    """Lay the rows of a source out in the streams of its format.

    Args:
        data: as ``source.bytes`` gives them.
        streams: ``[experts * rows, n]`` each.
        first: the row of each expert where they begin.
    """
    order, count = source.order(), source.count
    data = data if order is None else data[order]
    total = len(streams["codes"]) // source.experts

    def lay(expert: int, experts: int = 1, pool: Executor | None = None) -> None:
        out = slice(expert * total + first, expert * total + first + experts * count)
        relayout(
            data[expert * count : (expert + experts) * count],
            source.format,
            {name: array[out] for name, array in streams.items()},
            pool,
        )

    if source.experts == 1 or count == total:
        lay(0, source.experts, pool)
    else:  # others' rows lie between those of two experts
        list((pool.map if pool else map)(lay, range(source.experts)))


def stored_rows(weights: Plan) -> dict[str, list[Stored]]:
    """Which rows of which tensors an exported folder holds in streams, and where."""
    found: dict[str, list[Stored]] = {}
    for group in groups(weights):
        if not group.has_kernel:
            continue
        first, rows = first_rows(group.sources)
        for source, at in zip(group.sources, first, strict=True):
            height = rows[source.format]
            found.setdefault(source.tensor.name, []).extend(
                Stored(
                    span.start,
                    span.stop,
                    group.key,
                    expert * height + at,
                    source.order(),
                    source.experts * height,
                )
                for expert, span in enumerate(source.spans())
            )
    return found


class _Finder:
    """Looks tensors up, checks their shapes and remembers which were used."""

    def __init__(self, file: GGUFFile, config: Config) -> None:
        self.file = file
        self.sizes = config.sizes
        self.paired = config.architecture.rope_layout == "paired"
        # A longrope file has two sets of factors, of which one is used.
        both = {f"rope_factors_{length}.weight" for length in ("long", "short")}
        self.used = {config.rope.factors, *both, *config.unread}

    def rows(self, prefix: str, name: str, weight: Weight, suffix: str) -> tuple[RowSource, ...]:
        """The rows of ``PREFIX NAME SUFFIX``, also out of a tensor of `FUSED`, or put together
        into ``attn_qkv``.
        """
        bias = suffix != weight.suffix
        shape = tuple(
            self.sizes[s] for s in (weight.shape[:-1] or weight.shape if bias else weight.shape)
        )
        height = shape[-2:][0]

        def there(name: str) -> bool:
            return f"{prefix}{name}{suffix}" in self.file.tensors

        def take(name: str, rows: int, first: int, count: int) -> RowSource:
            whole = (*shape[:-2], rows, *shape[1:][-1:])
            tensor = self._checked(f"{prefix}{name}{suffix}", whole)
            return self._source(tensor, first, first + count, weight)

        if there(name):
            return (take(name, height, 0, height),)
        for whole, members in FUSED.items():
            if name in members and there(whole) and (not bias or whole == FUSED_QKV):
                rows = [self._part_rows(part) for part in members]
                return (take(whole, sum(rows), sum(rows[: members.index(name)]), height),)
        for whole, members in TURNS.items():
            if name in members and there(whole):
                turns, each = len(members), height // self.sizes["key_heads"]
                firsts = range(members.index(name) * each, turns * height, turns * each)
                return tuple(take(whole, turns * height, first, each) for first in firsts)
        parts = TOGETHER.get(name, ())
        if parts and not weight.tiled and all(map(there, parts)):
            heights = [self._part_rows(part) for part in parts]
            return tuple(take(*pair, 0, pair[1]) for pair in zip(parts, heights, strict=True))
        return ()

    def _part_rows(self, part: str) -> int:
        of = {"attn_q": "q", "attn_k": "kv", "attn_v": "v"}
        of |= dict.fromkeys(TOGETHER["ffn_gate_up_shexp"], "shared_ff")
        return self.sizes[of.get(part, "expert_ff")]

    def _checked(self, name: str, shape: tuple[int, ...]) -> Tensor:
        tensor = self.file.tensors[name]
        if tensor.shape != shape and _same(tensor, shape):
            tensor = replace(tensor, shape=shape)
        if tensor.shape != shape:
            raise GGUFError(
                self.file.path, f"{name} has the shape {tensor.shape}; expected {shape}"
            )
        if len(shape) == 1 and tensor.format.quantized:
            raise UnsupportedError(f"{name} is a vector of type {tensor.format.name}")
        if not can_dequantize(tensor.format):
            raise UnsupportedError(f"{name} is of type {tensor.format.name}, which is no weight's")
        self.used.add(name)
        return tensor

    def _source(self, tensor: Tensor, start: int, stop: int, weight: Weight) -> RowSource:
        swap: tuple[int, ...] = ()
        if self.paired and weight.heads:  # rotary pairs (2i, 2i + 1) -> halves (i, i + d/2)
            heads = self.sizes[weight.heads]
            swap = (heads, (stop - start) // heads // 2, 2, 1)
        elif weight.tiled:
            keys, values = self.sizes["key_heads"], self.sizes["value_heads"]
            swap = (1, values // keys, keys, self.sizes[weight.tiled])
        return RowSource(tensor, start, stop, swap)

    def _scaled(self, source: RowSource, own: set[str]) -> RowSource:
        """The rows with the scale that stands beside a tensor, as NVFP4's do.

        Args:
            own: names of the tensors that the architecture itself has.
        """
        stem = source.tensor.name.removesuffix(".weight")
        name = f"{stem}.scale"
        if len(source.tensor.shape) == 1 or name in own or stem == source.tensor.name:
            return source
        # That of the activations is for those who quantise them.
        self.used.add(f"{stem}.input_scale")
        if name not in self.file.tensors:
            return source
        return replace(source, factor=self._checked(name, (source.experts,)))

    def weights(
        self, prefix: str, at: str, table: Weights, group_of: Mapping[str, str]
    ) -> tuple[WeightPlan, ...]:
        """What a table's tensors, named PREFIX NAME, fill below the module ``at``."""
        found = []
        for name, weight in table.items():
            if not all(self.sizes[size] for size in weight.shape):
                continue
            rows = self.rows(prefix, name, weight, weight.suffix)
            if not rows:
                if weight.optional or weight.zero:
                    continue
                raise GGUFError(self.file.path, f"{prefix}{name}{weight.suffix} is missing")
            own = {f"{prefix}{n}{w.suffix}" for n, w in table.items()}
            rows = tuple(self._scaled(source, own) for source in rows)
            bias: tuple[RowSource, ...] = ()
            if weight.bias != "no":
                bias = self.rows(prefix, name, weight, ".bias")
                if weight.bias == "required" and not bias:
                    raise GGUFError(self.file.path, f"{prefix}{name}.bias is missing")
            group = f"{at}{group_of[name]}" if name in group_of else ""
            found.append(WeightPlan(f"{at}{weight.module}", rows, bias, group, weight))
        return tuple(found)


def _same(tensor: Tensor, shape: tuple[int, ...]) -> bool:
    """Whether a tensor has the shape but for axes of 1, or is a vector that is split into parts.

    Converters squeeze matrices of one row, and llama.cpp takes tensors with more axes of 1.
    """
    if tensor.format.quantized:
        return tensor.shape[-1:] == shape[-1:] and lean(tensor.shape) == lean(shape)
    flat = len(shape) == 1 and math.prod(tensor.shape) == shape[0]
    return flat or lean(tensor.shape) == lean(shape)


def lean(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape without axes of length 1."""
    return tuple(size for size in shape if size != 1)


def plan(file: GGUFFile, config: Config) -> Plan:
    """Pair a file's tensors with the model's weights.

    Raises:
        GGUFError: a tensor is missing or its shape does not follow from the metadata.
        UnsupportedError: the file has a tensor that this architecture does not use.
    """
    arch = config.architecture
    _check_layers(file, config.layers + config.ignored)
    find = _Finder(file, config)
    outer = {n: w for n, w in arch.outer.items() if not (config.tied and n == "output")}
    above = find.weights("", "", outer, {})
    group_of = {name: group for group, names in arch.groups.items() for name in names}
    layers = []
    for i in range(config.layers):
        find.sizes = config.sizes_of(i)
        at = f"{arch.layers_at}.{i}."
        layers.append(find.weights(f"blk.{i}.", at, config.weights_of(i), group_of))
    ahead = tuple(f"blk.{config.layers + i}." for i in range(config.ignored))
    unused = [n for n in file.tensors if n not in find.used and not n.startswith(ahead)]
    if unused:
        raise UnsupportedError(
            f"{len(unused)} of the file's tensors have no place in {arch.name}: "
            + ", ".join(unused[:4])
            + (", ..." if len(unused) > 4 else "")
        )
    return Plan(config, above, tuple(layers))


def _check_layers(file: GGUFFile, layers: int) -> None:
    """The file has exactly the layers it says."""
    found = {int(m[1]) for m in map(LAYER_NAME.fullmatch, file.tensors) if m}
    if len(found) != layers or max(found) != layers - 1:
        last = max(found, default=-1)
        raise GGUFError(
            file.path,
            f"block_count is {layers}, but tensors of {len(found)} layers are there, "
            f"the last of them {last}",
        )
