"""Activations times quantised weights, cut into tiles: what both products have in common."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Generic, TypeVar

import mlx.core as mx

from ..activations import Int8Activations
from ..runtime import tuning
from ..runtime.kernel import Launch
from ..weight import FLOATS, AffineSegment, Part, QuantizedWeight, type_name
from .dequantize import bind
from .shapes import MAX_BATCH, bucket, columns, route, tensors
from .tile_program import ACTIVATIONS, GATED, Tile, tile_program

X = TypeVar("X", mx.array, Int8Activations)

MAX_BATCHED_ROWS = 32
"""Rows of x up to which a weight may be read again for every `MAX_BATCH` of them."""

MAX_ROWS_PER_EXPERT = 4
"""Rows of x, for each expert that there is, up to which an expert's matrix is read again for
every row that uses it. Above, rows are sorted by expert and a tile of up to 32 reads it once, but
takes the time to multiply 32. Not measured on a Mac."""


@dataclass(frozen=True, slots=True)
class Epilogue:
    """What becomes of a product's sums: ``activation(sums + bias) + residual``, in float32.

    bias        ``[N]``, or ``[experts, N]``, in the order of the weight's parts.
    residual    of the result's shape; not where each part has a result of its own.
    times       the residual multiplies the result instead.
    activation  one of `ACTIVATIONS`. The gated ones, ``swiglu``, ``geglu``, ``geglu_tanh`` and
                ``swiglu_clipped``, need a weight of two parts of equal rows, gate and up, and give
                ``act(gate) * up`` with half of the columns. ``swiglu_clipped`` is gpt-oss's:
                ``(u + 1) * g * sigmoid(1.702 * g)`` with ``g = min(gate, 7)`` and ``u`` the value
                of up between -7 and 7.
    """

    bias: mx.array | None = None
    residual: mx.array | None = None
    activation: str | None = None
    times: bool = False


NO_EPILOGUE = Epilogue()


@dataclass(frozen=True, slots=True)
class Experts:
    """Whose matrices the rows of x are multiplied by.

    ids     integers ``[..., k]``: the expert of each result row. x has one row for each id, or one
            for each group of ``k``.
    scores  ``[..., k]``, of any floating type: each group's results are multiplied by them and
            added up, in float32 and rounded once. x has a row for each id then, and the weight one
            part. MLX-LM rounds every expert's result, its product with the score and their sum to
            ``x.dtype``.
    sorted  the ids are in ascending order.
    """

    ids: mx.array
    scores: mx.array | None = None
    sorted: bool = False


@dataclass(frozen=True, slots=True)
class Call(Generic[X]):
    """The arguments of one `quantized_matmul` or `int8_matmul`."""

    x: X
    weight: QuantizedWeight
    epilogue: Epilogue = NO_EPILOGUE
    experts: Experts | None = None
    split: bool = False
    variant: str = ""  # of `variants`, or `usual`
    floor: bool = False  # the loads without the arithmetic, to be timed; the result is wrong

    @property
    def scores(self) -> mx.array | None:
        """Of the experts, over which results are summed."""
        return None if self.experts is None else self.experts.scores

    @property
    def kind(self) -> str:
        """``vector``, ``batch`` or ``prompt``; of experts ``vector``, ``grouped`` or ``summed``.

        `tuning.VARIANTS` names the variants of each that has several.
        """
        if self.scores is not None:
            return "summed"
        if self.experts is not None:
            few = self.rows <= MAX_ROWS_PER_EXPERT * (self.weight.experts or 1)
            return "vector" if few else "grouped"
        if self.rows == 1:
            return "vector"
        return "batch" if self.rows <= MAX_BATCH else "prompt"

    def part(self, name: str) -> str:
        """The section of the Metal source: ``name``'s, or that of its floor."""
        return f"{name}_floor" if self.floor else name

    @property
    def usual(self) -> str:
        """The variant that runs where nothing has been measured; empty where there is one."""
        names = tuning.VARIANTS["quantized_matmul"].get(self.kind, ("",))
        if self.kind != "prompt":
            return names[0]
        if all(isinstance(s, AffineSegment) for s in self.weight.segments):
            return "dequantize"  # MLX multiplies by its own weights
        found = route(self.rows)
        if found != "tiles":
            return found
        return f"tiles{columns(self.rows, self.weight.rows)}"

    @property
    def variants(self) -> tuple[str, ...]:
        """What may be measured for such a call, `usual` first."""
        names = tuning.VARIANTS["quantized_matmul"].get(self.kind, ())
        if self.kind == "prompt" and self.rows > MAX_BATCHED_ROWS:
            names = tuple(n for n in names if n != "batch")
        if not tensors() or self.x.dtype == mx.float32:
            names = tuple(n for n in names if n != "tensor")
        if self.gated:  # eight rows of the gate and eight of up take more than 128 registers
            names = tuple(n for n in names if n != "rows8")
        return tuple(sorted(names, key=lambda n: n != self.usual))

    @property
    def route(self) -> str:
        """``vector``, ``batch``, ``tiles``, ``tensor``, ``dequantize``, ``grouped``, ``summed``."""
        if self.kind != "prompt":
            return self.kind
        return (self.variant or self.usual).rstrip("0123456789")

    @property
    def case(self) -> str:
        """What a variant is chosen by."""
        parts = "+".join(f"{p.segment.name}:{p.rows}" for p in self.weight.parts)
        found = f"{self.kind} {parts} x{self.weight.columns} {type_name(self.x.dtype)}"
        return f"{found} {bucket(self.rows)}" if self.kind == "prompt" else found

    @property
    def rows(self) -> int:
        """Rows of each output."""
        return math.prod(self.lead)

    @property
    def gated(self) -> bool:
        return self.epilogue.activation in GATED

    @property
    def lead(self) -> tuple[int, ...]:
        """Shape of an output, without its columns."""
        if self.experts is None:
            return self.x.shape[:-1]
        ids = self.experts.ids.shape
        return ids if self.scores is None else ids[:-1]

    @property
    def widths(self) -> tuple[int, ...]:
        """Columns of each output."""
        parts = self.weight.parts[:1] if self.gated else self.weight.parts
        rows = tuple(p.rows for p in parts)
        return rows if self.split else (sum(rows),)

    def check(self) -> None:
        """ValueError: arguments whose shapes do not fit together."""
        x, weight = self.x, self.weight
        if x.ndim < 1 or x.shape[-1] != weight.columns:
            raise ValueError(f"x: expected [..., {weight.columns}], found {x.shape}")
        self._check_epilogue()
        if (weight.experts is None) != (self.experts is None):
            ids = None if self.experts is None else self.experts.ids
            raise ValueError(f"a weight of {weight.experts} experts, expert ids {ids}")
        if self.experts is not None:
            self._check_experts(self.experts)
        residual = self.epilogue.residual
        if residual is not None:
            expected = (*self.lead, self.widths[0])
            if self.split or residual.shape != expected:
                raise ValueError(f"residual: expected {expected}, found {residual.shape}")

    def _check_epilogue(self) -> None:
        weight, end = self.weight, self.epilogue
        if end.activation not in (None, *ACTIVATIONS):
            raise ValueError(f"activation: expected {ACTIVATIONS}, found {end.activation!r}")
        if self.gated and [p.rows for p in weight.parts] != [weight.rows // 2] * 2:
            found = [p.rows for p in weight.parts]
            raise ValueError(f"{end.activation} needs gate and up of equal rows, found {found}")
        count = weight.experts
        biases = (weight.rows,) if count is None else (count, weight.rows)
        if end.bias is not None and end.bias.shape != biases:
            raise ValueError(f"bias: expected {biases}, found {end.bias.shape}")

    def _check_experts(self, experts: Experts) -> None:
        x, weight = self.x, self.weight
        ids: mx.array = experts.ids
        scores: mx.array | None = experts.scores
        if x.size // x.shape[-1] not in (ids.size, ids[..., 0].size):
            raise ValueError(f"x: {x.shape} does not fit expert ids {ids.shape}")
        if scores is None:
            return
        if scores.shape != ids.shape or (*ids.shape, weight.columns) != x.shape:
            raise ValueError(f"scores {scores.shape} of expert ids {ids.shape}, x {x.shape}")
        if len(weight.parts) > 1 or self.epilogue.activation is not None:
            raise ValueError("scores: expected one part and no activation")


def refuse(call: Call[X]) -> str | None:
    """Why the call cannot be launched, whatever x is made of."""
    if call.x.dtype not in FLOATS:
        return f"x is float16, bfloat16 or float32, not {call.x.dtype}"
    if call.rows == 0:
        return "x has no rows"
    return None


def simd_groups(weight: QuantizedWeight) -> int:
    """SIMD-groups of a threadgroup: more where they share a codebook in threadgroup memory."""
    return 4 if any(s.grid for s in weight.segments) else 2


def batches(rows: int) -> int:
    """Rows of x at a time: 1, 2, 4 or `MAX_BATCH`, so that a weight has few programs for all."""
    return next(n for n in (1, 2, 4, MAX_BATCH) if n >= min(rows, MAX_BATCH))


def launch(call: Call[X], tile: Tile, x: dict[str, mx.array]) -> Launch:
    """The dispatch of such tiles; ``x`` names the arrays that make up x."""
    weight = call.weight
    dtype: mx.Dtype = call.x.dtype
    segments = weight.segments
    places = {id(segment): i for i, segment in enumerate(segments)}
    parts = weight.parts[:1] if call.gated else weight.parts
    widths = call.widths
    size, tiles = _size(call, parts, widths[0], tile.rows)
    held: dict[str, mx.array] = {}
    bounds = []
    for i, segment in enumerate(segments):
        bound, arrays = bind(segment, str(i))
        held |= arrays
        bounds.append(bound)
    end, ids = call.epilogue, None if call.experts is None else call.experts.ids
    added = "times" if end.times else "residual"
    optional = {"bias": end.bias, added: end.residual, "scores": call.scores}
    optional["experts"] = None if tile.sorted else ids
    given: dict[str, mx.array] = {n: a for n, a in optional.items() if a is not None}
    down = -(-call.rows // tile.many)
    if tile.sorted:  # at most one tile of each expert is not full
        down = call.rows // tile.many + min(weight.experts or 1, call.rows)
    program = tile_program(
        tile,
        tuple(bounds),
        tuple(places[id(p.segment)] for p in weight.parts),
        end.activation,
        (*held, *given, *x, "size"),
        len(widths),
    )
    return Launch(
        program=program,
        arrays=(*held.values(), *(_as(n, a, dtype) for n, a in given.items()), *x.values(), size),
        grid=(tiles * tile.threads, down, 1),
        threadgroup=(tile.threads, 1, 1),
        template=(("T", dtype),),
        shapes=tuple((call.rows, n) for n in widths),
        dtypes=(dtype,) * len(widths),
    )


def _as(name: str, array: mx.array, dtype: mx.Dtype) -> mx.array:
    return array.astype(dtype) if name in ("bias", "residual", "times") else array


def _size(
    call: Call[X], parts: tuple[Part, ...], joined: int, per_group: int
) -> tuple[mx.array, int]:
    """The `size` input of the kernel, and the threadgroups along the weight's rows."""
    weight = call.weight
    given = call.x.size // call.x.shape[-1]
    numbers = [weight.columns, call.rows, max(call.rows // given, given // call.rows)]
    tile = column = 0
    for part in weight.parts:
        width = part.rows if call.split else joined
        at = 0 if call.split else column
        numbers += [part.first, part.rows, tile, at, width, column]
        column += part.rows
        tile += -(-part.rows // per_group)
    tiles = sum(-(-p.rows // per_group) for p in parts)
    return _numbers(tuple(numbers)), tiles


@lru_cache(maxsize=1024)
def _numbers(values: tuple[int, ...]) -> mx.array:
    array = mx.array(values, mx.uint32)
    mx.eval(array)
    return array


def _sigmoid_gelu_tanh(v: mx.array) -> mx.array:
    return v * mx.sigmoid(2 * 0.7978845608028654 * (v + 0.044715 * v * v * v))


def _clipped_swiglu(gate: mx.array, up: mx.array) -> mx.array:
    gate = mx.minimum(gate, 7.0)
    return (mx.clip(up, -7.0, 7.0) + 1) * gate * mx.sigmoid(1.702 * gate)


_REFERENCE: dict[str, Callable[[mx.array], mx.array]] = {
    "silu": lambda v: v * mx.sigmoid(v),
    "gelu": lambda v: 0.5 * v * (1 + mx.erf(v * 0.7071067811865476)),
    "gelu_tanh": _sigmoid_gelu_tanh,
    "relu2": lambda v: mx.square(mx.maximum(v, 0)),
}
_GATED_REFERENCE: dict[str, Callable[[mx.array, mx.array], mx.array]] = {
    "swiglu": lambda gate, up: _REFERENCE["silu"](gate) * up,
    "geglu": lambda gate, up: _REFERENCE["gelu"](gate) * up,
    "geglu_tanh": lambda gate, up: _REFERENCE["gelu_tanh"](gate) * up,
    "swiglu_clipped": _clipped_swiglu,
}


def finish(call: Call[X], columns: list[mx.array]) -> list[mx.array]:
    """The outputs, from the unrounded float32 products of each part."""
    end = call.epilogue
    if end.bias is not None:
        at = 0
        bias = end.bias if call.experts is None else end.bias[call.experts.ids.reshape(-1)]
        for i, part in enumerate(call.weight.parts):
            columns[i] = columns[i] + bias[..., at : at + part.rows].astype(mx.float32)
            at += part.rows
    if end.activation in _GATED_REFERENCE:
        columns = [_GATED_REFERENCE[end.activation](*columns)]
    elif end.activation is not None:
        columns = [_REFERENCE[end.activation](y) for y in columns]
    if call.scores is not None:
        scores = call.scores.astype(mx.float32)[..., None]
        columns = [(y.reshape(*call.scores.shape, -1) * scores).sum(axis=-2) for y in columns]
    if not call.split and len(columns) > 1:
        columns = [mx.concatenate(columns, axis=-1)]
    if end.residual is not None:
        residual = end.residual.reshape(columns[0].shape).astype(mx.float32)
        columns[0] = columns[0] * residual if end.times else columns[0] + residual
    return [y.astype(call.x.dtype) for y in columns]
