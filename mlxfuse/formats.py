"""The one table of GGUF tensor types: data only, shared by ``gguf`` and ``kernels``.

Sources: ``ggml/include/ggml.h`` (ids), ``ggml/src/ggml-common.h`` (block layouts).
"""

from __future__ import annotations

from dataclasses import dataclass

from .streams import BITS, EIGHTS, FAR_NIBBLES, NIBBLES, PAIRS, ROTATE, SPREAD, Stream


@dataclass(frozen=True, slots=True)
class Traits:
    """How the kernels read a type: what the trait of its name in ``metal/formats.h`` is made of.

    streams   the fields of a block.
    unit      consecutive weights that one lane decodes; rows are a multiple of it, whatever the
              block.
    halves    whether each 16 weights have a scale of their own.
    biased    whether weights have a bias.
    offset    what is subtracted from every code.
    grid      of codes that index a codebook, its name in `mlxfuse.codebooks.staged`; else empty.
    stored    the type whose blocks have the same weights, which are made of this type's when it is
              read, and whose streams and trait are used; else empty.
    integers  whether the type is multiplied by int8 activations: 32 weights are then signed
              8-bit integers times one scale or, with ``halves``, times an integer for each 16.
    """

    streams: tuple[Stream, ...]
    unit: int = 32
    halves: bool = False
    biased: bool = False
    offset: int = 0
    grid: str = ""
    stored: str = ""
    integers: bool = True


_SIXTEEN = (Stream("codes", "uint16", 0, 2),)
_TERNARY = Stream("codes", "uint32", 0, 64, PAIRS), Stream("scales", "float16", 64, 66)
_FOURS = Stream("codes", "uint32", 2, 18), Stream("scales", "float16", 0, 2)


@dataclass(frozen=True, slots=True)
class Format:
    """One tensor type.

    name        ggml's name, for example ``Q4_K``.
    id          ggml's type id as stored in the file.
    block_size  weights in one block.
    type_size   bytes of one block.
    traits      how kernels read it; None where there is no kernel for it.
    float16     where in a block its float16 scales are.
    exponents   where in a block a byte is the exponent of a scale, 127 for 1.
    small       where else in a block the upper bits of a scale are, such that it is small where
                bits 6 and 5 of the byte are clear.
    """

    name: str
    id: int
    block_size: int
    type_size: int
    traits: Traits | None = None
    float16: tuple[int, ...] = ()
    exponents: tuple[int, ...] = ()
    small: tuple[int, ...] = ()

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.type_size / self.block_size

    @property
    def streams(self) -> tuple[Stream, ...]:
        """How the kernels store this type; empty where there is no kernel for it."""
        return self.traits.streams if self.traits else ()

    @property
    def kernel(self) -> bool:
        """True where a fused Metal kernel multiplies this type where it lies.

        A dense type, which MLX multiplies as well, is only read by the kernels where a matrix of
        a quantised type is multiplied by the same activations.
        """
        return self.traits is not None and self.quantized

    @property
    def quantized(self) -> bool:
        return self.block_size > 1

    def row_bytes(self, columns: int) -> int:
        """Bytes of a row of ``columns`` weights; ``columns`` is a multiple of the block."""
        return columns // self.block_size * self.type_size


_TYPES = (
    Format("F32", 0, 1, 4, Traits((Stream("codes", "uint32", 0, 4),), unit=4, integers=False)),
    Format("F16", 1, 1, 2, Traits(_SIXTEEN, unit=8, integers=False), (0,)),
    Format("Q4_0", 2, 32, 18, Traits(_FOURS, offset=8), (0,)),
    Format(
        *("Q4_1", 3, 32, 20),
        Traits(
            (Stream("codes", "uint32", 4, 20), Stream("scales", "float16", 0, 4)),
            biased=True,
        ),
        (0, 2),
    ),
    Format(
        *("Q5_0", 6, 32, 22),
        Traits(
            (
                Stream("codes", "uint32", 6, 22),
                Stream("high", "uint32", 2, 6, ROTATE),
                Stream("scales", "float16", 0, 2),
            ),
            offset=16,
        ),
        (0,),
    ),
    Format(
        *("Q5_1", 7, 32, 24),
        Traits(
            (
                Stream("codes", "uint32", 8, 24),
                Stream("high", "uint32", 4, 8, ROTATE),
                Stream("scales", "float16", 0, 4),
            ),
            biased=True,
        ),
        (0, 2),
    ),
    Format(
        *("Q8_0", 8, 32, 34),
        Traits((Stream("codes", "uint32", 2, 34), Stream("scales", "float16", 0, 2)), unit=16),
        (0,),
    ),
    Format("Q8_1", 9, 32, 36),
    Format(
        *("Q2_K", 10, 256, 84),
        Traits(
            (
                Stream("codes", "uint32", 16, 80, PAIRS),
                Stream("scales", "uint32", 0, 16),
                Stream("supers", "float16", 80, 84),
            ),
            halves=True,
            biased=True,
            integers=False,
        ),
        (80, 82),
    ),
    Format(
        *("Q3_K", 11, 256, 110),
        Traits(
            (
                Stream("codes", "uint32", 32, 96, PAIRS),
                Stream("high", "uint32", 0, 32, BITS),
                Stream("scales", "uint32", 96, 108),
                Stream("supers", "float16", 108, 110),
            ),
            halves=True,
            offset=4,
        ),
        (108,),
    ),
    Format(
        *("Q4_K", 12, 256, 144),
        Traits(
            (Stream("codes", "uint32", 16, 144, NIBBLES), Stream("scales", "uint32", 0, 16)),
            biased=True,
        ),
        (0, 2),
    ),
    Format(
        *("Q5_K", 13, 256, 176),
        Traits(
            (
                Stream("codes", "uint32", 48, 176, NIBBLES),
                Stream("high", "uint32", 16, 48, BITS),
                Stream("scales", "uint32", 0, 16),
            ),
            biased=True,
        ),
        (0, 2),
    ),
    Format(
        *("Q6_K", 14, 256, 210),
        Traits(
            (
                Stream("codes", "uint32", 0, 128, FAR_NIBBLES),
                Stream("high", "uint32", 128, 192, PAIRS),
                Stream("scales", "uint32", 192, 208),
                Stream("supers", "float16", 208, 210),
            ),
            halves=True,
            offset=32,
        ),
        (208,),
    ),
    Format("Q8_K", 15, 256, 292),
    Format(
        *("IQ2_XXS", 16, 256, 66),
        Traits(
            (Stream("codes", "uint32", 2, 66), Stream("supers", "float16", 0, 2)),
            grid="IQ2_XXS",
        ),
        (0,),
    ),
    Format(
        *("IQ2_XS", 17, 256, 74),
        Traits(
            (
                Stream("codes", "uint32", 2, 66),
                Stream("scales", "uint32", 66, 74),
                Stream("supers", "float16", 0, 2),
            ),
            halves=True,
            grid="IQ2_XS",
        ),
        (0,),
    ),
    Format(
        *("IQ3_XXS", 18, 256, 98),
        Traits(
            (
                Stream("codes", "uint32", 2, 66),
                Stream("signs", "uint32", 66, 98),
                Stream("supers", "float16", 0, 2),
            ),
            grid="IQ3_XXS",
        ),
        (0,),
    ),
    Format(
        *("IQ1_S", 19, 256, 50),
        Traits(
            (
                Stream("codes", "uint32", 2, 34),
                Stream("high", "uint32", 34, 50),
                Stream("supers", "float16", 0, 2),
            ),
            offset=9,
            grid="IQ1_S",
        ),
        (0,),
    ),
    Format("IQ4_NL", 20, 32, 18, Traits(_FOURS, grid="IQ4"), (0,)),
    Format(
        *("IQ3_S", 21, 256, 110),
        Traits(
            (
                Stream("codes", "uint32", 2, 66),
                Stream("high", "uint32", 66, 74),
                Stream("signs", "uint32", 74, 106, ROTATE),
                Stream("scales", "uint32", 106, 110),
                Stream("supers", "float16", 0, 2),
            ),
            grid="IQ3_S",
        ),
        (0,),
    ),
    Format(
        *("IQ2_S", 22, 256, 82),
        Traits(
            (
                Stream("codes", "uint32", 2, 34),
                Stream("high", "uint32", 66, 74),
                Stream("signs", "uint32", 34, 66, ROTATE),
                Stream("scales", "uint32", 74, 82),
                Stream("supers", "float16", 0, 2),
            ),
            halves=True,
            grid="IQ2_S",
        ),
        (0,),
    ),
    Format(
        *("IQ4_XS", 23, 256, 136),
        Traits((Stream("codes", "uint32", 8, 136), Stream("scales", "uint32", 0, 8)), grid="IQ4"),
        (0,),
    ),
    Format("I8", 24, 1, 1),
    Format("I16", 25, 1, 2),
    Format("I32", 26, 1, 4),
    Format("I64", 27, 1, 8),
    Format("F64", 28, 1, 8),
    Format(
        *("IQ1_M", 29, 256, 56),
        Traits(
            (
                Stream("codes", "uint32", 0, 32),
                Stream("high", "uint32", 32, 48),
                Stream("scales", "uint32", 48, 56),
            ),
            halves=True,
            offset=9,
            grid="IQ1_S",
        ),
        small=(55,),
    ),
    Format("BF16", 30, 1, 2, Traits(_SIXTEEN, unit=8, integers=False)),
    # Five weights in a byte have no order in which lanes could read them side by side.
    Format("TQ1_0", 34, 256, 54, Traits(_TERNARY, offset=1, stored="TQ2_0"), (52,)),
    Format("TQ2_0", 35, 256, 66, Traits(_TERNARY, offset=1), (64,)),
    Format(
        *("MXFP4", 39, 32, 17),
        Traits((Stream("codes", "uint32", 1, 17), Stream("scales", "uint8", 0, 1))),
        exponents=(0,),
    ),
    Format(
        *("NVFP4", 40, 64, 36),
        Traits(
            (Stream("codes", "uint32", 4, 36, EIGHTS), Stream("scales", "uint32", 0, 4)),
            halves=True,
            integers=False,
        ),
        small=(0, 1, 2, 3),
    ),
    Format(
        *("Q1_0", 41, 128, 18),
        Traits(
            (Stream("codes", "uint32", 2, 18, ROTATE), Stream("scales", "float16", 0, 2)),
            offset=1,
        ),
        (0,),
    ),
    Format(
        *("Q2_0", 42, 64, 18),
        Traits(
            (Stream("codes", "uint32", 2, 18, SPREAD), Stream("scales", "float16", 0, 2)),
            offset=1,
        ),
        (0,),
    ),
)

FORMATS: dict[int, Format] = {f.id: f for f in _TYPES}

BY_NAME: dict[str, Format] = {f.name: f for f in FORMATS.values()}

# Ids that ggml used once and has taken back; a file that has one is refused by name.
REMOVED: dict[int, str] = {
    4: "Q4_2",
    5: "Q4_3",
    31: "Q4_0_4_4",
    32: "Q4_0_4_8",
    33: "Q4_0_8_8",
    36: "IQ4_NL_4_4",
    37: "IQ4_NL_4_8",
    38: "IQ4_NL_8_8",
}

# Type -> bits and zero point of MLX's affine weights, groups of 32, that are the same numbers:
# ``scale * code + bias`` with the block's scale and, of types without a minimum, ``-zero * scale``.
AFFINE = {"Q4_0": (4, 8), "Q4_1": (4, 0), "Q5_0": (5, 16), "Q5_1": (5, 0), "Q8_0": (8, 128)}
