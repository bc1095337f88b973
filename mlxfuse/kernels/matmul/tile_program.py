"""The Metal programs of the products: what goes into their text."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from ..runtime.kernel import Program
from .dequantize import Bound, section

GATED = {
    "swiglu": "Gated<Silu>",
    "geglu": "Gated<Gelu>",
    "geglu_tanh": "Gated<GeluTanh>",
    "swiglu_clipped": "ClippedSwiglu",
}
PLAIN = {"silu": "Silu", "gelu": "Gelu", "gelu_tanh": "GeluTanh", "relu2": "Relu2"}
ACTIVATIONS = (*PLAIN, *GATED)

THREADGROUP_MEMORY = 32 << 10
"""Bytes that a threadgroup may have."""


@dataclass(frozen=True, slots=True)
class Tile:
    """What a threadgroup computes, and the Metal function that does it.

    op        stem of the function's source.
    sections  what it needs of ``metal/``.
    function  its name.
    numbers   its template arguments after the formats of the weight.
    x         the expression for x.
    rows      rows of a part.
    many      rows of x.
    threads   threads of the threadgroup.
    scratch   declares the threadgroup memory ``scratch``, if there is any.
    sorted    whether rows of x are sorted by expert, of which each has tiles of its own.
    staged    words of codebooks that are copied to threadgroup memory first; one that does not fit
              is read where it is.
    """

    op: str
    sections: tuple[str, ...]
    function: str
    numbers: str
    x: str
    rows: int
    many: int
    threads: int
    scratch: str
    staged: int = 4096
    sorted: bool = False


@cache
def tile_program(
    tile: Tile,
    bounds: tuple[Bound, ...],
    of_part: tuple[int, ...],
    activation: str | None,
    inputs: tuple[str, ...],
    outputs: int,
) -> Program:
    gated = activation in GATED
    act = {**PLAIN, **GATED}.get(activation or "", "None")
    lines = [
        "const uint3 tile = threadgroup_position_in_grid;",
        "const device Part* parts = (const device Part*)(size + 3);",
    ]
    if tile.scratch:
        lines += [tile.scratch]
    # The segments of a call: one of them for the parts that it holds, or gate's and up's.
    calls = [of_part] if gated else [(s, s) for s in range(len(bounds))]
    if words := max(sum(_grids(bounds, call, tile).values()) for call in calls):
        lines += [f"threadgroup uint grid[{words}];"]
    if not gated:
        later = (f" + uint(tile.x >= parts[{j}].tile)" for j in range(1, len(of_part)))
        lines += [f"const uint j = 0{''.join(later)};"]
    for f, g in calls:
        block = _tile_call(tile, bounds, (f, g), act, inputs, outputs, gated)
        if len(calls) > 1:
            here = " || ".join(f"j == {j}" for j, of in enumerate(of_part) if of == f)
            block = [f"if ({here}) {{", *block, "}"]
        lines += block
    sections = [] if act == "None" else re.findall(r"\w+", act)
    return Program(
        op=tile.op,
        inputs=inputs,
        outputs=tuple(f"out{i}" for i in range(outputs)),
        body="\n".join(lines) + "\n",
        parts=(
            *dict.fromkeys(section(b.trait) for b in bounds),
            *tile.sections,
            *(f"quantized_matmul.metal:{s}" for s in sections),
        ),
    )


def _tile_call(
    tile: Tile,
    bounds: Sequence[Bound],
    call: tuple[int, int],
    act: str,
    inputs: tuple[str, ...],
    outputs: int,
    gated: bool,
) -> list[str]:
    """Statements that compute a tile of one or two segments: the codebooks, then the function."""
    f, g = call
    staged, p, q = _staged(bounds, call, tile)
    bias = "bias" if "bias" in inputs else "x"
    residual = next((name for name in ("residual", "times") if name in inputs), "x")
    flags = f"{str(bias == 'bias').lower()}, {('x', 'residual', 'times').index(residual)}"
    out = "out0"
    for j in range(1, outputs):
        out = f"j == {j} ? out{j} : {out}" if j == 1 else f"j == {j} ? out{j} : ({out})"
    place = "tile, simdgroup_index_in_threadgroup, thread_index_in_simdgroup"
    if tile.scratch:
        place = "tile, simdgroup_index_in_threadgroup, thread_index_in_threadgroup, scratch"
    return [
        *staged,
        f"Part a = parts[{'0' if gated else 'j'}], b = {'parts[1]' if gated else 'a'};",
        f"{tile.function}<{bounds[f].trait}, {bounds[g].trait}{tile.numbers}>("
        f"{p}, {q}, {_x_of(tile, call, inputs)}, (const device Size*)size, "
        f"output<{act}, {flags}>"
        f"(a, b, factors({bounds[f].factors}), factors({bounds[g].factors}), "
        f"{bias}, {residual}, {out}), {place});",
    ]


def _x_of(tile: Tile, call: tuple[int, int], inputs: tuple[str, ...]) -> str:
    """The expression for x: as it is, or the rows of chosen or of sorted experts."""
    if "experts" not in inputs and not tile.sorted:
        return tile.x
    # All parts of one segment lie in each expert's matrix.
    steps = [f"uint(codes{i}_shape[1])" for i in call]
    steps += ["uint(bias_shape[1])" if "bias" in inputs else "0"]
    scores = "scores" if "scores" in inputs else "x"
    of = f"chosen({tile.x}, experts, {scores}"
    if tile.sorted:
        of = f"sorted({tile.x}, row_ends, tile_ends, uint(codes{call[0]}_shape[0])"
    return f"{of}, {', '.join(steps)})"


def _grids(bounds: Sequence[Bound], call: Sequence[int], tile: Tile) -> dict[str, int]:
    """The codebooks of a call's segments that are staged, and the words of each."""
    grids: dict[str, int] = {}
    for bound in sorted((bounds[i] for i in call), key=lambda b: b.words):
        if bound.grid and sum({**grids, bound.grid: bound.words}.values()) <= tile.staged:
            grids[bound.grid] = bound.words
    return grids


def _staged(
    bounds: Sequence[Bound], call: tuple[int, int], tile: Tile
) -> tuple[list[str], str, str]:
    """Statements that copy the codebooks of a call, and the expressions of its two segments."""
    at: dict[str, str] = {}
    lines: list[str] = []
    words = 0
    grids = _grids(bounds, call, tile)
    for bound in {i: bounds[i] for i in call}.values():
        if bound.grid in grids and bound.grid not in at:
            at[bound.grid] = f"grid + {words}"
            lines.append(bound.stage(at[bound.grid], tile.threads))
            words += bound.words
    p, q = (bounds[i].at(at.get(bounds[i].grid, bounds[i].grid)) for i in call)
    return lines, p, q
