"""Small cases of the kernels that read quantised weights, for their self-tests."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from ..runtime.kernel import normal
from ..weight import AnySegment, Part, QuantizedWeight

if TYPE_CHECKING:
    from .product import Call

# More than a threadgroup works on, and no multiple of that.
_ROWS = 11


def rows(
    segment: AnySegment, rows: mx.array | None, dtype: mx.Dtype
) -> tuple[AnySegment, mx.array | None, mx.Dtype]:
    """The first rows of the very weight, all or some of them."""
    taken = segment.take(slice(0, _ROWS))
    if rows is not None:
        # MLX binds fewer than 8 elements in another address space.
        rows = mx.arange(min(rows.size, 8), dtype=rows.dtype) % taken.rows
    return taken, rows, dtype


def product(call: Call[Any]) -> tuple[Call[Any]]:
    """The first rows of each part, random activations; the same parts, formats and epilogue."""
    rows: dict[int, list[slice]] = {}
    for part in call.weight.parts:
        taken = slice(part.first, part.first + min(part.rows, _ROWS))
        rows.setdefault(id(part.segment), []).append(taken)
    segments = {
        id(s): replace(
            s,
            arrays={
                n: mx.concatenate([a[..., r, :] for r in rows[id(s)]], axis=-2)
                for n, a in s.arrays.items()
            },
        )
        for s in call.weight.segments
    }
    parts, at = [], dict.fromkeys(segments, 0)
    for part in call.weight.parts:
        count = min(part.rows, _ROWS)
        parts.append(Part(segments[id(part.segment)], at[id(part.segment)], count))
        at[id(part.segment)] += count
    weight = QuantizedWeight(tuple(parts))
    draw = normal(call.x.dtype)
    x = draw(call.x.size // weight.columns, weight.columns)
    small = replace(call, x=x.reshape(call.x.shape), weight=weight)
    end, experts = call.epilogue, call.experts
    if experts is not None:
        ids = mx.arange(experts.ids.size, dtype=experts.ids.dtype).reshape(experts.ids.shape)
        experts = replace(experts, ids=ids * (weight.experts or 1) // ids.size)
    if end.bias is not None:
        shape = (*end.bias.shape[:-1], weight.rows)
        end = replace(end, bias=draw(*shape).astype(end.bias.dtype))
    if experts is not None and experts.scores is not None:
        scores = draw(*experts.scores.shape).astype(experts.scores.dtype)
        experts = replace(experts, scores=scores)
    if end.residual is not None:
        end = replace(end, residual=draw(call.rows, small.widths[0]))
    return (replace(small, epilogue=end, experts=experts),)
