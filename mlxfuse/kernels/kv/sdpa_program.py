"""The programs of `compressed_sdpa`: what goes into their text, and who does what."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

from ..runtime.kernel import Program
from .scheme import KVScheme
from .sdpa_call import HELD
from .source import NAMES, plain_sides, sections, sides

MAX_ROWS = 32
"""Queries of all heads that share a KV head which one reading of the cache serves; half as many
for heads of more than 256 elements, so that all of them are in registers."""

_RUN = 8  # tokens that a SIMD-group scores at once, as in the Metal source
_TILE_BYTES = 8192  # of threadgroup memory for tokens, where a run of them fits
_TILE = 32  # most tokens in it


@dataclass(frozen=True, slots=True)
class Geometry:
    """How a threadgroup's SIMD-groups share its rows and tokens. Not measured on a Mac.

    rows    of each SIMD-group; a row is a query of one head.
    groups  SIMD-groups along the rows; several read the same tokens, which are staged in the
            threadgroup's memory then.
    slices  SIMD-groups along the tokens.
    """

    rows: int
    groups: int
    slices: int

    @property
    def threads(self) -> int:
        return 32 * self.groups * self.slices

    @property
    def staged(self) -> bool:
        return self.groups > 1


def geometry(rows: int, scheme: KVScheme) -> Geometry:
    most = 4 if max(scheme.k.dim, scheme.v.dim) <= 256 else 2  # as many as registers hold
    each = next(n for n in (1, 2, 4) if n >= min(rows, most))
    groups = next(n for n in (1, 2, 4, 8) if n * each >= min(rows, MAX_ROWS) or n == 8)
    return Geometry(each, groups, max(1, 4 // groups))


def _units(dim: int) -> int:
    """Units of 8 elements that the lanes of a SIMD-group have of a token, unused ones too."""
    lanes = next(n for n in (4, 8, 16, 32) if n >= min(dim // 8, 32))
    return -(-dim // 8 // lanes) * lanes


@dataclass(frozen=True, slots=True)
class _Source:
    """Tokens of one kind: how they are decoded and, in Metal, what they are and which they are.

    ``name`` is the section of the Metal source.
    """

    name: str
    types: tuple[str, str]
    words: int
    tokens: str
    span: str
    blocks: tuple[int, int]

    @property
    def tile(self) -> int:
        """Tokens that are copied to threadgroup memory at once."""
        fit = _TILE_BYTES // (4 * self.words) // _RUN * _RUN
        return max(_RUN, min(_TILE, fit))

    @property
    def scratch(self) -> int:
        """Elements of 16 bytes."""
        return self.tile * self.words // 4

    def attend(self, shape: Geometry, mask: str) -> str:
        """The call that looks at the tokens of ``span``."""
        numbers = [str(bool(mask)).lower(), shape.slices]
        given = ["state", "source", "span.x", "span.y", "row", mask or "q", "numbers[1]"]
        if shape.staged:
            numbers.append(self.tile)
            given += ["scratch", "me", str(shape.threads)]
        arguments = ", ".join(map(str, (*self.types, *numbers)))
        return f"attend<{arguments}>({', '.join((*given, 'slice', 'lane'))});"


def _packed(scheme: KVScheme, places: tuple[str, ...]) -> _Source:
    words = scheme.row_words
    array, at = places[0], "at.z"
    if len(places) > 1:  # one array for each sequence of the batch
        for i, place in enumerate(places[1:], 1):
            array = f"h.batch == {i} ? {place} : {array}"
        array, at = f"({array})", "h.head"
    return _Source(
        name="packed",
        types=sides(scheme),
        words=words,
        tokens=f"const Packed<{words}> source{{{array} + ulong({at}) * h.capacity * {words}, "
        "uint(h.sinks)};",
        span="span_of(size, h, at.x)",
        blocks=(scheme.k_block, scheme.v_block),
    )


def _quantized(scheme: KVScheme) -> _Source:
    """Keys and values as MLX quantises them: codes, scales and biases in arrays of their own."""
    types, widths, members, words = [], [], [], 0
    for side, names in ((scheme.k, HELD[6][:3]), (scheme.v, HELD[6][3:])):
        codes, groups = side.code_words(scheme.dtype), side.groups
        types.append(f"Apart<Codes<{side.bits}>, {side.group}, {math.gcd(codes, 4)}>")
        widths += [str(codes), str(groups)]
        each = zip(names, (codes, groups, groups), strict=True)
        pointers = (f"{name} + ulong(at.z) * h.capacity * {width}" for name, width in each)
        members.append(f"{{{', '.join(pointers)}}}")
        words += codes + 2 * groups * scheme.dtype.size // 4
    kind = f"Quantized<{', '.join(widths)}, {NAMES[scheme.dtype]}>"
    return _Source(
        name="apart",
        types=(types[0], types[1]),
        words=words,
        tokens=f"const {kind} source{{{{{', '.join(members)}}}}};",
        span="span_of(size, h, at.x)",
        blocks=(1, 1),
    )


def _held(scheme: KVScheme) -> _Source:
    """Plain keys and values of the length's tokens, in arrays of their own."""
    dk, dv = scheme.k.dim, scheme.v.dim
    none = "(const device uint*)q"
    arrays = (
        f"(const device uint*)({name} + ulong(at.z) * h.capacity * {dim})"
        for name, dim in (("keys", dk), ("values", dv))
    )
    kind = f"Plain<{NAMES[scheme.dtype]}, {dk}, {dv}, true>"
    return _Source(
        name="plain",
        types=plain_sides(scheme),
        words=(dk + dv) * scheme.dtype.size // 4,
        tokens=f"const {kind} source{{{none}, {none}, {', '.join(arrays)}, 0, 0, 0}};",
        span="span_of(size, h, at.x)",
        blocks=(1, 1),
    )


def _plain(scheme: KVScheme, given: tuple[str, ...]) -> _Source:
    dk, dv = scheme.k.dim, scheme.v.dim
    fresh = "k" in given

    def pointer(name: str, tokens: str, width: int) -> str:
        if name not in given:
            return "(const device uint*)q"
        return f"(const device uint*)({name} + ulong(at.z) * uint({tokens}) * {width})"

    members = (
        pointer("sink", "size[7]", dk + dv),
        pointer("tail", "size[6]", dk + dv),
        pointer("k", "size[0]", dk),
        pointer("v", "size[0]", dv),
        "uint(h.sinks)",
        "uint(h.tails)",
        "uint(h.packed)",
    )
    kind = f"Plain<{NAMES[scheme.dtype]}, {dk}, {dv}, {str(fresh).lower()}>"
    tokens = f"const {kind} source{{{', '.join(members)}}};"
    if fresh:
        tokens += (
            f"\nif (at.y == 0) source.put(h.queries, (device uint4*)(fresh + ulong(at.z) * "
            f"uint(size[0]) * {dk + dv}), me, THREADS);"
        )
    return _Source(
        name="plain",
        types=plain_sides(scheme),
        words=(dk + dv) * scheme.dtype.size // 4,
        tokens=tokens,
        span="uint2(0, uint(h.keys - h.packed))",
        blocks=(1, 1),
    )


@cache
def parts_program(
    scheme: KVScheme, given: tuple[str, ...], shape: Geometry, *, whole: bool = False
) -> Program:
    """Softmax and sums of each part of the keys.

    Args:
        given: which of ``rows tail sink k v mask`` there are, in this order; ``rows`` may be
            ``rows0 rows1 ...``, an array for each sequence, or the names in `HELD`.
        whole: there is one part, whose result is the call's.
    """
    dv = scheme.v.dim
    places = tuple(name for name in given if name.startswith("rows"))
    held = "keys" in given
    sources = [_packed(scheme, places)] if places else []
    if held:
        sources.append(_quantized(scheme) if HELD[6][1] in given else _held(scheme))
    if {"tail", "sink", "k"} & set(given):
        sources.append(_plain(scheme, given))
    more = int(len(sources) == 2 or not (places or held))
    fresh, mask = "k" in given, "mask" if "mask" in given else ""
    # `join` needs for the rows of a SIMD-group the sums of all lanes, a largest score and a total.
    room = shape.rows * (8 * _units(dv) + 2)
    joined = room * shape.groups // 4 + 1 if shape.slices > 1 else 0
    scratch = max(joined, *(s.scratch for s in sources)) if shape.staged else joined
    lines = _begun(scheme, shape, scratch, fresh)
    which = "if (at.x < uint(size[3])) {{\n{}\n}} else {{\n{}\n}}"
    blocks = [_looked_at(s, shape, mask) for s in sources]
    lines.append(which.format(*blocks) if len(blocks) == 2 else blocks[0])
    lines += [
        f"state.template join<{shape.slices}>((threadgroup float*)scratch + group * {room}, "
        "slice, lane);",
        "if (slice == 0) {",
    ]
    if places and scheme.v_block > 1:
        lines.append(
            f"if (at.x < uint(size[3])) {{\nstate.template turn<{scheme.v_block}>(lane);\n}}"
        )
    lines.append(
        f"const ulong part = ulong(at.z * (uint(size[3]) + {more}) + at.x) * h.rows + first;"
    )
    finish = f"state.finish(sums + part * {dv}, stats + part * 2, left, lane);"
    if whole:
        finish = f"state.finish_whole(out + part * {dv}, left, lane);"
    lines += [finish, "}"]
    return Program(
        op="compressed_sdpa",
        inputs=("q", *given, "counts", "size", "numbers"),
        outputs=("out",) if whole else ("sums", "stats", *(["fresh"] if fresh else [])),
        body="\n".join(lines) + "\n",
        parts=(
            *sections(scheme),
            "kv_rows.h:units",
            "online_softmax.h",
            f"compressed_sdpa.metal:{'staged' if shape.staged else 'direct'}",
            "compressed_sdpa.metal:heads",
            *(f"compressed_sdpa.metal:{s.name}" for s in sources),
        ),
    )


def _begun(scheme: KVScheme, shape: Geometry, scratch: int, fresh: bool) -> list[str]:
    """Statements that say which rows a SIMD-group has, and load its queries.

    Args:
        scratch: elements of threadgroup memory, of 16 bytes each.
    """
    dk, dv = scheme.k.dim, scheme.v.dim
    return [
        "const uint3 at = threadgroup_position_in_grid;",
        "const uint me = thread_index_in_threadgroup;",
        "const uint lane = thread_index_in_simdgroup;",
        f"const uint group = simdgroup_index_in_threadgroup % {shape.groups};",
        f"const uint slice = simdgroup_index_in_threadgroup / {shape.groups};",
        f"threadgroup uint4 scratch[{scratch}];",
        f"typedef Softmax<{dk}, {dv}, {shape.rows}> State;",
        f"const Head h = head_of(size, at.z, {str(fresh).lower()}, counts);",
        f"const uint first = (at.y * {shape.groups} + group) * {shape.rows};",
        "const Row row = row_of(size, h, first + State::row(lane));",
        "State state;",
        "const uint left = h.rows - metal::min(first, h.rows);",
        f"state.load(q + (ulong(at.z) * h.rows + first) * {dk}, left, numbers[0], lane);",
    ]


def _looked_at(source: _Source, shape: Geometry, mask: str) -> str:
    """Statements that bring the tokens of one kind into the softmax."""
    return "\n".join(
        (
            f"state.template prepare<{source.blocks[0]}>(lane);",
            "state.start();",
            source.tokens.replace("THREADS", str(shape.threads)),
            f"const uint2 span = {source.span};",
            source.attend(shape, mask),
        )
    )


@cache
def merge_program(dim: int, sinks: bool, threads: int) -> Program:
    """One softmax out of those of the parts; ``threads`` for each row."""
    return Program(
        op="compressed_sdpa",
        inputs=("sums", "stats", *(["sinks"] if sinks else []), "size"),
        outputs=("out",),
        body=(
            f"for (uint i = thread_position_in_grid.x; i < {dim}; i += {threads}) {{\n"
            f"merge_row<{dim}, {str(sinks).lower()}>(sums, stats, {'sinks' if sinks else 'size'}, "
            "size, thread_position_in_grid.y, i, out);\n}\n"
        ),
        parts=("compressed_sdpa.metal:merge",),
    )
