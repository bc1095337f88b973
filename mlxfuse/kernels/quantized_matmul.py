"""Multiplication by quantised weights where they lie: ``metal/quantized_matmul.metal``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, lru_cache

import mlx.core as mx

from . import _kernel, tuning
from ._decode import decode
from ._kernel import Kernel, Launch, Prepared, Program
from .dequantize import bindings, dequantize, section
from .weight import FLOATS, AffineSegment, AnySegment, Part, QuantizedWeight

MAX_BATCH = 8
"""Rows of x that one decoded unit of the weight is used for."""

MAX_VECTOR_ROWS = 32
"""Rows of x up to which the weight is read again for every `MAX_BATCH` of them. Above, it is
dequantised once and multiplied by `mx.matmul`: at 4.5 bits a weight that moves 8 times the
weight's bytes, as much as 8 readings. Not measured on a Mac."""

LARGE = "dequantize"
"""What runs above `MAX_VECTOR_ROWS` unless `mlxfuse tune` has chosen: ``dequantize``, or ``tiles``,
the kernel that decodes tile by tile, which stays off until a Mac has measured it faster."""

# Rows of W that a SIMD-group computes in each of the variants of `tuning.VARIANTS`; the first is
# the one that runs where nothing has been measured, as on every Mac so far.
_SLOTS = {"vector": {"rows4": 4, "rows8": 8, "rows2": 2}, "batch": {"rows2": 2, "rows4": 4}}

_GATED = {"swiglu": "Silu", "geglu": "Gelu", "geglu_tanh": "GeluTanh"}
_PLAIN = {"silu": "Silu", "gelu": "Gelu", "gelu_tanh": "GeluTanh", "relu2": "Relu2"}
ACTIVATIONS = (*_PLAIN, *_GATED)


def quantized_matmul(
    x: mx.array,
    weight: QuantizedWeight,
    *,
    bias: mx.array | None = None,
    residual: mx.array | None = None,
    activation: str | None = None,
    split: bool = False,
    experts: mx.array | None = None,
    differentiable: bool = False,
) -> tuple[mx.array, ...]:
    """``activation(x @ weight.T + bias) + residual``.

    Products are summed in float32 and the epilogue is computed in float32 from the unrounded
    sums; the result is rounded once. More than `MAX_VECTOR_ROWS` rows in float16 or bfloat16 are
    multiplied by MLX, which rounds weights and sums to that type too, by up to half a unit in the
    last place each. Before an activation, which makes more of an error, bfloat16 products are
    float32 there; not those of MLX's own weights, which are as MLX-LM has them.

    Args:
        x: ``[..., K]``, float16, bfloat16 or float32.
        weight: ``[N, K]``, or ``[experts, N, K]``.
        bias: ``[N]``, in the order of the weight's parts.
        residual: of the result's shape; not with ``split``.
        activation: one of `ACTIVATIONS`. The gated ones, ``swiglu``, ``geglu`` and
            ``geglu_tanh``, need a weight of two parts of equal rows, gate and up, and give
            ``act(gate) * up`` with half of the columns.
        split: one result for each part of the weight, each contiguous, instead of one for all.
        experts: integer ids ``[..., k]`` of the expert to use for each result row. ``x`` has
            one row for each id, or one for each group of ``k``.
        differentiable: by MLX's own operations, which have gradients. The kernel has none: MLX
            raises ``[Primitive::vjp] Not implemented for CustomKernel`` under ``mx.grad``.

    Returns:
        ``[..., N]`` in ``x.dtype``, alone in a tuple; with ``split`` one for each part; with
        ``experts`` of shape ``[*experts.shape, N]``.

    Raises:
        ValueError: arguments whose shapes do not fit together.
    """
    call = tuned(_Call(x, weight, bias, residual, activation, split, experts, LARGE))
    call.check()
    if differentiable:
        outputs = _dense(call)
    elif call.route == "dequantize":
        outputs = _dense(call, dequantized=True)
    else:
        outputs = KERNEL(call)
    lead = x.shape[:-1] if experts is None else experts.shape
    return tuple(y.reshape(*lead, y.shape[-1]) for y in outputs)


def prepare(
    x: mx.array,
    weight: QuantizedWeight,
    *,
    bias: mx.array | None = None,
    residual: mx.array | None = None,
    activation: str | None = None,
    split: bool = False,
    experts: mx.array | None = None,
) -> Prepared | None:
    """`quantized_matmul` of such arguments as one launch, to be called with x and, where there are
    any, the residual and the experts, of the same shapes and types; None if it is no single launch.
    """
    call = tuned(_Call(x, weight, bias, residual, activation, split, experts, LARGE))
    call.check()
    alike = residual is None or residual.dtype == x.dtype
    if _refuse(call) is not None or not alike or call.route == "dequantize":
        return None
    given = {"residual": residual, "experts": experts}
    free = ("x", *(name for name, array in given.items() if array is not None))
    lead = x.shape[:-1] if experts is None else experts.shape
    return Prepared("quantized_matmul", _launch(call), free, [(*lead, n) for n in call.widths])


@dataclass(frozen=True, slots=True)
class _Call:
    """The arguments of one `quantized_matmul`."""

    x: mx.array
    weight: QuantizedWeight
    bias: mx.array | None
    residual: mx.array | None
    activation: str | None
    split: bool
    experts: mx.array | None
    large: str = "dequantize"
    variant: str = ""
    """Of `tuning.VARIANTS`, by default the first."""
    floor: bool = False
    """The loads without the arithmetic, for measuring; the result means nothing."""

    @property
    def kind(self) -> str:
        """``vector``, ``batch`` or ``large``, of which `tuning.VARIANTS` names the variants."""
        if self.rows == 1 or self.experts is not None:
            return "vector"
        return "batch" if self.rows <= MAX_VECTOR_ROWS else "large"

    @property
    def route(self) -> str:
        """How the rows of x are multiplied: ``vector``, ``batch``, ``dequantize`` or ``tiles``."""
        return (self.variant or self.large) if self.kind == "large" else self.kind

    @property
    def case(self) -> str:
        """What variants are chosen by."""
        parts = "+".join(f"{p.segment.name}:{p.rows}" for p in self.weight.parts)
        dtype = str(self.x.dtype).removeprefix("mlx.core.")
        return f"{self.kind} {parts} x{self.weight.columns} {dtype}"

    @property
    def rows(self) -> int:
        """Rows of each output."""
        x = self.x
        return x.size // x.shape[-1] if self.experts is None else self.experts.size

    @property
    def gated(self) -> bool:
        return self.activation in _GATED

    @property
    def widths(self) -> tuple[int, ...]:
        """Columns of each output."""
        parts = self.weight.parts[:1] if self.gated else self.weight.parts
        rows = tuple(p.rows for p in parts)
        return rows if self.split else (sum(rows),)

    def check(self) -> None:
        x, weight = self.x, self.weight
        if x.ndim < 1 or x.shape[-1] != weight.columns:
            raise ValueError(f"x: expected [..., {weight.columns}], found {x.shape}")
        if self.activation not in (None, *ACTIVATIONS):
            raise ValueError(f"activation: expected {ACTIVATIONS}, found {self.activation!r}")
        if self.gated and [p.rows for p in weight.parts] != [weight.rows // 2] * 2:
            found = [p.rows for p in weight.parts]
            raise ValueError(f"{self.activation} needs gate and up of equal rows, found {found}")
        if self.bias is not None and self.bias.shape != (weight.rows,):
            raise ValueError(f"bias: expected ({weight.rows},), found {self.bias.shape}")
        if (weight.experts is None) != (self.experts is None):
            raise ValueError(f"a weight of {weight.experts} experts, expert ids {self.experts}")
        if self.experts is not None:
            given = x.size // x.shape[-1]
            if given == 0 or given not in (self.experts.size, self.experts[..., 0].size):
                raise ValueError(f"x: {x.shape} does not fit expert ids {self.experts.shape}")
        if self.residual is not None:
            lead = x.shape[:-1] if self.experts is None else self.experts.shape
            expected = (*lead, self.widths[0])
            if self.split or self.residual.shape != expected:
                raise ValueError(f"residual: expected {expected}, found {self.residual.shape}")


def tuned(call: _Call) -> _Call:
    """The call in the variant that `mlxfuse tune` has found to be the fastest, if it has run."""
    if not tuning.active():
        return call
    return replace(call, variant=tuning.winner("quantized_matmul", call.case))


def run_call(call: _Call, *, emulated: bool = False) -> list[mx.array]:
    """Its outputs on Metal, in its variant and unconditionally; for measuring."""
    if call.route == "dequantize":
        return _dense(call, dequantized=True)
    return _kernel.run(_launch(call), emulated=emulated)


def _refuse(call: _Call) -> str | None:
    if call.x.dtype not in FLOATS:
        return f"x is float16, bfloat16 or float32, not {call.x.dtype}"
    if call.rows == 0:
        return "x has no rows"
    return None


def _launch(call: _Call) -> Launch:
    x, weight = call.x, call.weight
    kind = call.route
    many = 1
    if kind == "batch":
        many = -(-call.rows // -(-call.rows // MAX_BATCH))
    elif kind == "tiles":
        many = 32
    # Rows of a part and threads of a threadgroup: 2 SIMD-groups, or 4.
    slots = 0
    per_group, threads = (32 if call.gated else 64), 128
    if kind in _SLOTS:
        slots = _SLOTS[kind][call.variant or next(iter(_SLOTS[kind]))]
        per_group, threads = 2 * slots, 64
    segments = weight.segments
    parts = weight.parts[:1] if call.gated else weight.parts
    size, tiles = _size(call, parts, per_group)
    held: list[str] = []
    arrays: list[mx.array] = []
    expressions = []
    for i, segment in enumerate(segments):
        names, expression = bindings(segment, str(i))
        held += names
        arrays += [segment.arrays[n[: -len(str(i))]] for n in names]
        expressions.append(expression)
    places = [id(s) for s in segments]  # other arrays of the same format compare as equal
    optional = {"bias": call.bias, "residual": call.residual, "experts": call.experts}
    given = {n: a for n, a in optional.items() if a is not None}
    program = _program(
        kind,
        tuple(s.trait for s in segments),
        tuple(expressions),
        tuple(places.index(id(p.segment)) for p in weight.parts),
        call.activation,
        (*held, *given),
        len(call.widths),
        many,
        slots,
        4 if call.floor else 1,
    )
    return Launch(
        program=program,
        arrays=(*arrays, *(_as(n, a, x.dtype) for n, a in given.items()), x, size),
        grid=(tiles * threads, -(-call.rows // many), 1),
        threadgroup=(threads, 1, 1),
        template=(("T", x.dtype),),
        shapes=tuple((call.rows, n) for n in call.widths),
        dtypes=(x.dtype,) * len(call.widths),
    )


def _as(name: str, array: mx.array, dtype: mx.Dtype) -> mx.array:
    return array if name == "experts" else array.astype(dtype)


def _size(call: _Call, parts: tuple[Part, ...], per_group: int) -> tuple[mx.array, int]:
    """The `size` input of the kernel, and the threadgroups along the weight's rows."""
    weight = call.weight
    given = call.x.size // call.x.shape[-1]
    numbers = [weight.columns, call.rows, call.rows // given]
    tile = column = 0
    for part in weight.parts:
        width = part.rows if call.split else call.widths[0]
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


_TILE = {"vector": "vector_tile", "batch": "batch_tile", "tiles": "matrix_tile"}


@cache
def _program(
    kind: str,
    traits: tuple[str, ...],
    expressions: tuple[str, ...],
    of_part: tuple[int, ...],
    activation: str | None,
    inputs: tuple[str, ...],
    outputs: int,
    many: int,
    slots: int,
    step: int,
) -> Program:
    gated = activation in _GATED
    act = {**_PLAIN, **_GATED}.get(activation or "", "None")
    bias = "bias" if "bias" in inputs else "x"
    residual = "residual" if "residual" in inputs else "x"
    flags = f"{str(bias == 'bias').lower()}, {str(residual == 'residual').lower()}"
    epilogue = f"output<{f'Gated<{act}>' if gated else act}, {flags}>"
    lines = [
        "const uint3 tile = threadgroup_position_in_grid;",
        "const device Part* parts = (const device Part*)(size + 3);",
    ]
    place = "tile, simdgroup_index_in_threadgroup, thread_index_in_simdgroup"
    if kind == "tiles":
        lines += ["threadgroup float scratch[96 * tile_pitch * sizeof(T) / 4];"]
        place = "tile, simdgroup_index_in_threadgroup, thread_index_in_threadgroup, scratch"
    if not gated:
        later = (f" + uint(tile.x >= parts[{j}].tile)" for j in range(1, len(of_part)))
        lines += [f"const uint j = 0{''.join(later)};"]
    out = "out0"
    for j in range(1, outputs):
        out = f"j == {j} ? out{j} : {out}" if j == 1 else f"j == {j} ? out{j} : ({out})"
    sizes = {"vector": f", {slots}, {step}", "batch": f", {slots}, {step}, {many}", "tiles": ""}
    # The segments of a call: one of them for the parts that it holds, or gate's and up's.
    calls = [of_part] if gated else [(s, s) for s in range(len(traits))]
    for f, g in calls:
        block = [f"Part a = parts[{'0' if gated else 'j'}], b = {'parts[1]' if gated else 'a'};"]
        if "experts" in inputs:
            # All parts of one segment lie in each expert's matrix.
            block += [
                f"{part}.first += uint(experts[tile.y]) * uint(codes{s}_shape[1]);"
                for part, s in (("a", f), ("b", g))
            ]
        block += [
            f"{_TILE[kind]}<{traits[f]}, {traits[g]}{sizes[kind]}>("
            f"{expressions[f]}, {expressions[g]}, x, (const device Size*)size, "
            f"{epilogue}(a, b, {bias}, {residual}, {out}), {place});",
        ]
        if len(calls) > 1:
            here = " || ".join(f"j == {j}" for j, of in enumerate(of_part) if of == f)
            block = [f"if ({here}) {{", *block, "}"]
        lines += block
    sections = [kind, *([] if act == "None" else [act]), *(["Gated"] if gated else [])]
    return Program(
        op="quantized_matmul",
        inputs=(*inputs, "x", "size"),
        outputs=tuple(f"out{i}" for i in range(outputs)),
        body="\n".join(lines) + "\n",
        parts=(
            *dict.fromkeys(section(t) for t in traits),
            *(f"quantized_matmul.metal:{s}" for s in sections),
        ),
    )


def _sigmoid_gelu_tanh(v: mx.array) -> mx.array:
    return v * mx.sigmoid(2 * 0.7978845608028654 * (v + 0.044715 * v * v * v))


_REFERENCE: dict[str, Callable[[mx.array], mx.array]] = {
    "Silu": lambda v: v * mx.sigmoid(v),
    "Gelu": lambda v: 0.5 * v * (1 + mx.erf(v * 0.7071067811865476)),
    "GeluTanh": _sigmoid_gelu_tanh,
    "Relu2": lambda v: mx.square(mx.maximum(v, 0)),
}


def _dense(call: _Call, *, dequantized: bool = False) -> list[mx.array]:
    """The meaning of the kernel: decode, multiply, epilogue.

    ``dequantized`` is how large M runs, see `_product`; the reference multiplies in float32.
    """
    x = call.x.reshape(-1, call.x.shape[-1])
    columns = []
    for part in call.weight.parts:
        segment = part.segment
        rows = slice(part.first, part.first + part.rows)
        if call.experts is not None:
            ids = call.experts.reshape(-1)
            w = decode(segment.take(ids))[:, rows]
            rows_of_x = mx.repeat(x, ids.size // x.shape[0], axis=0)
            y = (w @ rows_of_x[..., None].astype(mx.float32))[..., 0]
        elif dequantized:
            y = _product(x, segment.take(rows), call.activation is not None).astype(mx.float32)
        else:
            y = x.astype(mx.float32) @ decode(segment.take(rows)).T
        columns.append(y)
    if call.bias is not None:
        at = 0
        for i, part in enumerate(call.weight.parts):
            columns[i] = columns[i] + call.bias[at : at + part.rows].astype(mx.float32)
            at += part.rows
    if call.gated:
        gate, up = columns
        columns = [_REFERENCE[_GATED[call.activation or ""]](gate) * up]
    elif call.activation is not None:
        columns = [_REFERENCE[_PLAIN[call.activation]](y) for y in columns]
    if not call.split and len(columns) > 1:
        columns = [mx.concatenate(columns, axis=-1)]
    if call.residual is not None:
        columns[0] = columns[0] + call.residual.reshape(columns[0].shape).astype(mx.float32)
    return [y.astype(call.x.dtype) for y in columns]


def _product(x: mx.array, segment: AnySegment, activated: bool) -> mx.array:
    if isinstance(segment, AffineSegment):
        return mx.quantized_matmul(
            x,
            segment.arrays["codes"],
            segment.arrays["scales"],
            segment.arrays.get("supers"),
            transpose=True,
            group_size=segment.group_size,
            bits=segment.bits,
            mode=segment.mode,
        )
    if activated and x.dtype == mx.bfloat16:
        x = x.astype(mx.float32)
    return x @ dequantize(segment, dtype=x.dtype).T


KERNEL = Kernel("quantized_matmul", _launch, _refuse, _dense)
