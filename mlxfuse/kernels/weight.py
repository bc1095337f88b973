"""Weights whose rows stay at their file's own bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import mlx.core as mx

from ..formats import Format

Index = mx.array | slice

STREAMS = ("codes", "high", "signs", "scales", "supers")
FACTORS = "factors"
"""Beside the streams: float32 ``[..., rows, 1]``, which each row's weights are multiplied by."""
FLOATS = (mx.float16, mx.bfloat16, mx.float32)

_DTYPES: dict[str, mx.Dtype] = {
    "uint8": mx.uint8,
    "uint16": mx.uint16,
    "uint32": mx.uint32,
    "float16": mx.float16,
}


def refuse_other_types(x: mx.array, others: Mapping[str, mx.array]) -> str | None:
    """Why a kernel of one type does not take ``others`` with ``x``; None if it does."""
    for name, other in others.items():
        if other.dtype != x.dtype:
            return f"x is {x.dtype}, its {name} {other.dtype}"
    return None


def type_name(dtype: mx.Dtype) -> str:
    """For example ``float16``."""
    return str(dtype).removeprefix("mlx.core.")


class _Rows:
    """What rows in named arrays, ``[rows, n]`` or ``[experts, rows, n]``, have in common."""

    __slots__ = ()
    arrays: Mapping[str, mx.array]

    @property
    def rows(self) -> int:
        return self.arrays["codes"].shape[-2]

    @property
    def experts(self) -> int | None:
        codes = self.arrays["codes"]
        return codes.shape[0] if codes.ndim == 3 else None

    @property
    def nbytes(self) -> int:
        return sum(a.nbytes for a in self.arrays.values())


@dataclass(frozen=True, slots=True)
class Segment(_Rows):
    """Rows of one format: the streams of `mlxfuse.formats` as MLX arrays.

    format   a format with streams.
    columns  weights of a row, K.
    arrays   stream name -> array ``[rows, n]``, or ``[experts, rows, n]``; `FACTORS`, if any.
    """

    format: Format
    columns: int
    arrays: Mapping[str, mx.array] = field(compare=False)

    def __post_init__(self) -> None:
        fmt = self.format
        if not fmt.streams or self.columns % fmt.block_size:
            raise ValueError(f"no streams of {fmt.name} with {self.columns} columns")
        blocks = self.columns // fmt.block_size
        lead = self.arrays["codes"].shape[:-1]
        for stream in fmt.streams:
            dtype = _DTYPES[stream.dtype]
            shape = (*lead, blocks * stream.nbytes // dtype.size)
            array = self.arrays[stream.name]
            if array.shape != shape or array.dtype != dtype:
                raise ValueError(
                    f"stream {stream.name} of {fmt.name}: expected {dtype} of shape {shape}, "
                    f"found {array.dtype} of shape {array.shape}"
                )
        factors = self.arrays.get(FACTORS)
        if factors is not None and (factors.shape != (*lead, 1) or factors.dtype != mx.float32):
            raise ValueError(
                f"factors of rows: expected float32 of shape {(*lead, 1)}, found {factors.dtype} "
                f"of shape {factors.shape}"
            )

    @property
    def name(self) -> str:
        return self.format.name

    @property
    def trait(self) -> str:
        """The decode trait of ``metal/formats.h``, in the section of its name."""
        assert self.format.traits is not None
        return self.format.traits.stored or self.format.name

    @property
    def unit(self) -> int:
        """Consecutive weights that one lane decodes: ``width`` of the trait."""
        assert self.format.traits is not None
        return self.format.traits.unit

    @property
    def grid(self) -> str:
        """The codebook that codes index, of `mlxfuse.codebooks.staged`; empty if they do not."""
        return self.format.traits.grid if self.format.traits else ""

    @property
    def biased(self) -> bool:
        """Whether weights have a bias beside their scale."""
        return self.format.traits is not None and self.format.traits.biased

    @property
    def integers(self) -> bool:
        """Whether the rows are multiplied by int8 activations: see `mlxfuse.formats.Traits`."""
        return self.format.traits is not None and self.format.traits.integers

    def take(self, rows: Index | tuple[Index, Index]) -> Segment:
        """Some of the rows; if there are experts some of those, or of those and their rows."""
        return replace(self, arrays={s: a[rows] for s, a in self.arrays.items()})


# Mode -> bits that have kernels, and weights of one scale, which are all that MLX has.
_KINDS = {
    "affine": ((2, 3, 4, 5, 6, 8), (32, 64, 128)),
    "mxfp4": ((4,), (32,)),
    "mxfp8": ((8,), (32,)),
    "nvfp4": ((4,), (16,)),
}


@dataclass(frozen=True, slots=True)
class AffineSegment(_Rows):
    """MLX's own quantised rows, as ``mx.quantize`` and MLX-LM models have them; not copied.

    bits        2, 3, 4, 5, 6 or 8; 4 or 8 of the other modes, as their names say.
    group_size  weights of one scale: 32, 64 or 128; 16 in mode nvfp4, 32 in the others.
    mode        ``affine``, ``mxfp4``, ``mxfp8`` or ``nvfp4``.
    columns     weights of a row, K.
    arrays      ``codes`` uint32, ``scales`` and, in mode affine, ``supers``: MLX's biases. Those
                are float16, bfloat16 or float32, the type of the model; bytes in other modes.
    """

    bits: int
    group_size: int
    mode: str
    columns: int
    arrays: Mapping[str, mx.array] = field(compare=False)

    def __post_init__(self) -> None:
        kind = (self.bits, self.group_size, self.mode)
        if self.mode not in _KINDS:
            raise ValueError(f"no kernel for MLX weights {kind}: modes are {', '.join(_KINDS)}")
        bits, groups_of = _KINDS[self.mode]
        if self.group_size not in groups_of:
            raise ValueError(f"MLX multiplies no weights {kind}: groups are of {groups_of}")
        if self.bits not in bits:
            raise ValueError(f"no kernel for MLX weights {kind}: bits are {bits}")
        if self.columns % max(self.group_size, 32):
            raise ValueError(f"no kernel for MLX weights {kind} in rows of {self.columns}")
        lead = self.arrays["codes"].shape[:-1]
        groups = (*lead, self.columns // self.group_size)
        expected = {"codes": (*lead, self.columns * self.bits // 32), "scales": groups}
        if self.mode == "affine":
            expected["supers"] = groups
        found = {s: a.shape for s, a in self.arrays.items()}
        if found != expected or self.arrays["codes"].dtype != mx.uint32:
            raise ValueError(f"MLX weights {kind}: expected {expected}, found {found}")
        dtypes = {a.dtype for s, a in self.arrays.items() if s != "codes"}
        allowed = FLOATS if self.mode == "affine" else (mx.uint8,)
        if len(dtypes) > 1 or not dtypes.issubset(allowed):
            raise ValueError(f"scales of MLX weights {kind}: expected {allowed}, found {dtypes}")

    @property
    def name(self) -> str:
        return self.mode if self.mode != "affine" else f"affine{self.bits}g{self.group_size}"

    @property
    def trait(self) -> str:
        if self.mode != "affine":
            return f"MLX{self.mode.upper()}"
        return f"Affine<{self.bits}, {self.group_size}>"

    @property
    def unit(self) -> int:
        return 16 if self.bits == 8 else 32

    @property
    def grid(self) -> str:
        return ""

    @property
    def biased(self) -> bool:
        return self.mode == "affine"

    @property
    def integers(self) -> bool:
        return self.mode == "affine"

    def take(self, rows: Index | tuple[Index, Index]) -> AffineSegment:
        """Some of the rows; if there are experts some of those, or of those and their rows."""
        return replace(self, arrays={s: a[rows] for s, a in self.arrays.items()})


AnySegment = Segment | AffineSegment


@dataclass(frozen=True, slots=True)
class Part:
    """Rows ``first`` to ``first + rows - 1`` of a segment: one of the joined matrices."""

    segment: AnySegment
    first: int
    rows: int


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """One matrix, or several that are multiplied by the same activations.

    parts  the matrices in order, for example q, k and v; those of one format usually share a
           segment, each of them lies in one.
    """

    parts: tuple[Part, ...]

    def __post_init__(self) -> None:
        if not self.parts:
            raise ValueError("a weight has at least one part")
        columns, experts = self.columns, self.experts
        for part in self.parts:
            segment = part.segment
            if segment.columns != columns or segment.experts != experts:
                raise ValueError(
                    f"parts multiply the same activations: expected {columns} columns and "
                    f"experts {experts}, found {segment.columns} and {segment.experts}"
                )
            if part.first < 0 or part.rows < 1 or part.first + part.rows > segment.rows:
                raise ValueError(
                    f"rows {part.first} to {part.first + part.rows} of a segment of {segment.rows}"
                )

    @classmethod
    def whole(cls, segment: AnySegment) -> QuantizedWeight:
        """All rows of one segment as one part."""
        return cls((Part(segment, 0, segment.rows),))

    @property
    def columns(self) -> int:
        return self.parts[0].segment.columns

    @property
    def experts(self) -> int | None:
        return self.parts[0].segment.experts

    @property
    def rows(self) -> int:
        """Rows of all parts together, N."""
        return sum(p.rows for p in self.parts)

    @property
    def segments(self) -> tuple[AnySegment, ...]:
        """The different segments, in the order of their first part."""
        return tuple({id(p.segment): p.segment for p in self.parts}.values())

    @property
    def nbytes(self) -> int:
        return sum(s.nbytes for s in self.segments)

    def split(self) -> tuple[QuantizedWeight, ...]:
        """Each part alone, over the same arrays."""
        return tuple(QuantizedWeight((part,)) for part in self.parts)
