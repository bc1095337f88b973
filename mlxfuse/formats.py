"""The one table of GGUF tensor types: data only, shared by ``gguf`` and ``kernels``.

Sources: ``ggml/include/ggml.h`` (ids), ``ggml/src/ggml-common.h`` (block layouts).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Format:
    """One tensor type.

    name        ggml's name, for example ``Q4_K``.
    id          ggml's type id as stored in the file.
    block_size  weights in one block.
    type_size   bytes of one block.
    kernel      True where a fused Metal kernel multiplies this type where it lies.
    """

    name: str
    id: int
    block_size: int
    type_size: int
    kernel: bool = False

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.type_size / self.block_size

    @property
    def quantized(self) -> bool:
        return self.block_size > 1

    def row_bytes(self, columns: int) -> int:
        """Bytes of a row of ``columns`` weights; ``columns`` is a multiple of the block."""
        return columns // self.block_size * self.type_size


FORMATS: dict[int, Format] = {
    f.id: f
    for f in (
        Format("F32", 0, 1, 4),
        Format("F16", 1, 1, 2),
        Format("Q4_0", 2, 32, 18),
        Format("Q4_1", 3, 32, 20),
        Format("Q5_0", 6, 32, 22),
        Format("Q5_1", 7, 32, 24),
        Format("Q8_0", 8, 32, 34),
        Format("Q8_1", 9, 32, 36),
        Format("Q2_K", 10, 256, 84),
        Format("Q3_K", 11, 256, 110),
        Format("Q4_K", 12, 256, 144),
        Format("Q5_K", 13, 256, 176),
        Format("Q6_K", 14, 256, 210),
        Format("Q8_K", 15, 256, 292),
        Format("IQ2_XXS", 16, 256, 66),
        Format("IQ2_XS", 17, 256, 74),
        Format("IQ3_XXS", 18, 256, 98),
        Format("IQ1_S", 19, 256, 50),
        Format("IQ4_NL", 20, 32, 18),
        Format("IQ3_S", 21, 256, 110),
        Format("IQ2_S", 22, 256, 82),
        Format("IQ4_XS", 23, 256, 136),
        Format("I8", 24, 1, 1),
        Format("I16", 25, 1, 2),
        Format("I32", 26, 1, 4),
        Format("I64", 27, 1, 8),
        Format("F64", 28, 1, 8),
        Format("IQ1_M", 29, 256, 56),
        Format("BF16", 30, 1, 2),
        Format("TQ1_0", 34, 256, 54),
        Format("TQ2_0", 35, 256, 66),
        Format("MXFP4", 39, 32, 17),
        Format("NVFP4", 40, 64, 36),
        Format("Q1_0", 41, 128, 18),
        Format("Q2_0", 42, 64, 18),
    )
}

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
