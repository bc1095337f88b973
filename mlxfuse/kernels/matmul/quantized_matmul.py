"""Multiplication by quantised weights where they lie: ``metal/quantized_matmul.metal``."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx

from ..runtime import kernel as _kernel
from ..runtime import tuning
from ..runtime.backend import backend
from ..runtime.kernel import Kernel, Launch, Prepared
from ..weight import AffineSegment, AnySegment, QuantizedWeight
from . import small
from .decode import decode
from .dequantize import dequantize
from .product import (
    NO_EPILOGUE,
    Call,
    Epilogue,
    Experts,
    batches,
    finish,
    launch,
    refuse,
    simd_groups,
)
from .shapes import Shape, shape, tensor_shape
from .tile_program import THREADGROUP_MEMORY, Tile

MOST_FOR_16 = 24
"""Rows of x of an expert, on average, up to which its tiles have 16 rows and not 32."""

# Rows of W that a SIMD-group computes in each of `tuning.VARIANTS`.
_SLOTS = {
    "vector": {"rows4": 4, "rows8": 8, "rows2": 2},
    "batch": {"rows2": 2, "rows1": 1},
    "summed": {"rows4": 4, "rows8": 8, "rows2": 2},
}


def quantized_matmul(
    x: mx.array,
    weight: QuantizedWeight,
    epilogue: Epilogue = NO_EPILOGUE,
    experts: Experts | None = None,
    *,
    split: bool = False,
    differentiable: bool = False,
) -> tuple[mx.array, ...]:
    """``activation(x @ weight.T + bias) + residual``.

    More than `MAX_ROWS_PER_EXPERT` rows for each expert are multiplied in tiles of the rows of one
    expert, for which they are sorted by expert; weights are rounded to ``x.dtype`` there.

    Products are summed in float32 and the epilogue is computed in float32 from the unrounded
    sums; the result is rounded once. More than `MAX_BATCH` rows are multiplied in tiles, which
    round weights to ``x.dtype`` by up to half a unit in the last place; `shapes.ROUTES` says from
    how many rows on MLX multiplies, which rounds the sums to that type too, as MLX-LM has them.

    Args:
        x: ``[..., K]``, float16, bfloat16 or float32.
        weight: ``[N, K]``, or ``[experts, N, K]``.
        experts: whose matrices are used, of a weight that has several.
        split: one result for each part of the weight, each contiguous, instead of one for all.
        differentiable: by MLX's own operations, which have gradients. The kernel has none: MLX
            raises ``[Primitive::vjp] Not implemented for CustomKernel`` under ``mx.grad``.

    Returns:
        ``[..., N]`` in ``x.dtype``, alone in a tuple; with ``split`` one for each part; with
        ``experts`` of shape ``[*ids.shape, N]``; with scores ``[*ids.shape[:-1], N]``.

    Raises:
        ValueError: arguments whose shapes do not fit together.
    """
    call = tuned(Call(x, weight, epilogue, experts, split))
    call.check()
    if differentiable:
        outputs = _dense(call)
    elif call.route == "dequantize":
        outputs = _dense(call, dequantized=True)
    elif experts is not None and call.kind == "grouped" and not experts.sorted:
        outputs = _sorted(call, experts)
    else:
        outputs = KERNEL(call)
    return tuple(y.reshape(*call.lead, y.shape[-1]) for y in outputs)


def prepare(
    x: mx.array,
    weight: QuantizedWeight,
    epilogue: Epilogue = NO_EPILOGUE,
    experts: Experts | None = None,
    *,
    split: bool = False,
) -> Prepared | None:
    """`quantized_matmul` of such arguments as one launch, to be called with x and, where there are
    any, residual, ids and scores, of the same shapes and types; None if it is no single launch.
    """
    call = tuned(Call(x, weight, epilogue, experts, split))
    call.check()
    residual = epilogue.residual
    alike = residual is None or residual.dtype == x.dtype
    if refuse(call) is not None or not alike or call.route in ("dequantize", "grouped"):
        return None
    added = "times" if epilogue.times else "residual"
    given = {added: residual, "experts": experts, "scores": call.scores}
    free = ("x", *(name for name, value in given.items() if value is not None))
    launched = _launch(call)
    backend().expect(KERNEL, (call,), launched)
    return Prepared(launched, free, [(*call.lead, n) for n in call.widths])


def _sorted(call: Call[mx.array], experts: Experts) -> list[mx.array]:
    """The call with its rows in the order of their experts' ids, and the results back in theirs."""
    x, ids = call.x.reshape(-1, call.x.shape[-1]), experts.ids.reshape(-1)
    order = mx.argsort(ids)
    end = call.epilogue
    if end.residual is not None:
        end = replace(end, residual=end.residual.reshape(ids.size, -1)[order])
    x = x[order // (ids.size // x.shape[0])]
    back = mx.argsort(order)
    ordered = replace(call, x=x, experts=Experts(ids[order], sorted=True), epilogue=end)
    return [y[back] for y in KERNEL(ordered)]


def tuned(call: Call[mx.array]) -> Call[mx.array]:
    """The call in the variant that `mlxfuse tune` has found to be the fastest, if it has run."""
    if not tuning.active():
        return call
    name = tuning.winner("quantized_matmul", call.case)
    return replace(call, variant=name) if name in call.variants else call


def run_call(call: Call[mx.array], *, emulated: bool = False) -> list[mx.array]:
    """Its outputs on Metal, in its variant and unconditionally; to be timed."""
    if call.route == "dequantize":
        return _dense(call, dequantized=True)
    return _kernel.run(_launch(call), emulated=emulated)


def tile_shape(call: Call[mx.array]) -> Shape:
    """The tiles of a prompt, or of rows of experts: with few rows of x where each has few."""
    size = call.x.dtype.size
    if call.variant == "tensor":
        return tensor_shape(32 if call.kind == "grouped" else call.rows)
    if call.kind == "grouped":
        few = call.rows / (call.weight.experts or 1) <= MOST_FOR_16
        return shape(16 if few else 32, 64, size)
    return shape(call.rows, 32 if (call.variant or call.usual) == "tiles32" else 64, size)


def ends(experts: mx.array, count: int, many: int) -> tuple[mx.array, mx.array]:
    """Where the rows, and the tiles of ``many`` rows, of each of ``count`` experts end.

    Args:
        experts: an id for each row.

    Returns:
        int32 ``[count]`` each: sums of the experts' rows, and of their tiles, so far.
    """
    rows = mx.zeros((count,), mx.int32).at[experts.reshape(-1)].add(1)
    return mx.cumsum(rows), mx.cumsum((rows + (many - 1)) // many)


def _cut(call: Call[mx.array]) -> Tile:
    """The tiles that `tile_shape` says, of a prompt or of rows sorted by expert."""
    op, kind = "quantized_matmul", "grouped" if call.kind == "grouped" else "matrix"
    cut = tile_shape(call)
    used = cut.nbytes(call.x.dtype.size)
    tensor = call.variant == "tensor"
    sections = [f"{op}.metal:{kind}"]
    if tensor:
        needs = ["tiles", "sorted"] if kind == "grouped" else ["tiles"]
        sections = [*(f"{op}.metal:{s}" for s in needs), f"tensor_tiles.h:{kind}"]
    return Tile(
        op=op,
        sections=tuple(sections),
        function="tensor_tile" if tensor else f"{kind}_tile",
        numbers=f", {cut.rows}, {cut.columns}, {cut.groups}",
        x="x",
        rows=cut.columns // (1 + call.gated),
        many=cut.rows,
        threads=cut.threads,
        scratch=f"threadgroup float4 scratch[{used // 16}];",
        staged=(THREADGROUP_MEMORY - used) // 4,
        sorted=kind == "grouped",
    )


def _tile(call: Call[mx.array]) -> Tile:
    kind, op = call.route, "quantized_matmul"
    if kind in ("tiles", "grouped", "tensor"):
        return _cut(call)
    slots = _SLOTS[kind].get(call.variant) or next(iter(_SLOTS[kind].values()))
    if kind == "summed":
        groups = min(call.x.shape[-2], 8)
        scratch = f"threadgroup float scratch[{groups * slots}];"
        numbers = f", {slots}, {groups}"
        sections = tuple(f"{op}.metal:{s}" for s in (call.part("vector"), kind))
        return Tile(op, sections, "summed_tile", numbers, "x", slots, 1, 32 * groups, scratch)
    many = batches(call.rows) if kind == "batch" else 1
    if call.gated and many > 2:
        slots = 1  # two of the gate and two of up would take more than 128 registers
    groups = simd_groups(call.weight)
    numbers = f", {slots}, {groups}" + f", {many}" * (kind == "batch")
    needs = [call.part(kind), f"{kind}_tile"]
    if kind == "vector" and call.experts is not None:
        needs, kind = [*needs, "gathered"], "gathered"
    sections = tuple(f"{op}.metal:{s}" for s in needs)
    return Tile(op, sections, f"{kind}_tile", numbers, "x", groups * slots, many, 32 * groups, "")


def _launch(call: Call[mx.array]) -> Launch:
    tile, x = _tile(call), {"x": call.x}
    if tile.sorted and call.experts is not None:
        found = ends(call.experts.ids, call.weight.experts or 1, tile.many)
        x["row_ends"], x["tile_ends"] = found
    return launch(call, tile, x)


def _dense(call: Call[mx.array], *, dequantized: bool = False) -> list[mx.array]:
    """The meaning of the kernel: decode, multiply, epilogue.

    ``dequantized`` is how large M runs, see `_product`; the reference multiplies in float32.
    """
    x = call.x.reshape(-1, call.x.shape[-1])
    columns = []
    for part in call.weight.parts:
        segment = part.segment
        rows = slice(part.first, part.first + part.rows)
        if call.experts is not None:
            ids = call.experts.ids.reshape(-1)
            rows_of_x = mx.repeat(x, ids.size // max(x.shape[0], 1), axis=0).astype(mx.float32)
            # The chosen experts, or all if that is less: a prompt chooses each many times.
            few = ids.size < (segment.experts or 1)
            w = decode(segment.take((ids if few else slice(None), rows)))
            of = mx.arange(ids.size) if few else ids
            y = mx.gather_mm(rows_of_x[:, None], w.swapaxes(-1, -2), rhs_indices=of)[:, 0]
        elif dequantized:
            y = _product(x, segment.take(rows)).astype(mx.float32)
        else:
            y = x.astype(mx.float32) @ decode(segment.take(rows)).T
        columns.append(y)
    return finish(call, columns)


def _product(x: mx.array, segment: AnySegment) -> mx.array:
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
    return x @ dequantize(segment, dtype=x.dtype).T


KERNEL = Kernel("quantized_matmul", _launch, refuse, _dense, small.product)
