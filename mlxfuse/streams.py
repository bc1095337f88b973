"""How kernels store a block: its fields, and the order of the bits in them.

The blocks of a format with a kernel are split into **streams**: for one kind of
field each, all blocks of a row side by side, so that neighbouring SIMD lanes load neighbouring
bytes. The bytes of a row's streams add up to the row's bytes in the file. In every code stream
a group of 32 consecutive weights is contiguous: with weight ``16 h + 4 j + b`` of a group
(h < 2, j < 4, b < 4),

* 4-bit plane, 16 bytes: byte ``4 j + b``, low nibble for h = 0, high nibble for h = 1;
* 2-bit plane, 8 bytes: word ``j % 2``, byte ``b``, bits ``4 h + 2 (j // 2)`` and the next;
* 1-bit plane, 4 bytes: byte ``b``, bit ``4 h + j`` in the formats of 256 weights, bit
  ``4 (j % 2) + 2 h + j // 2`` in those of 32;

so one shift and one mask of a word yield the bits of four weights, each in its own byte. ggml
keeps some planes in other orders; ``swaps`` says how to exchange the bits. The orders of the
1-bit planes are those that the fewest swaps lead to.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Swap:
    """An exchange of bits between the 32-bit words of a block, its own inverse.

    Bits ``mask << shift`` of word ``i`` change places with bits ``mask`` of word
    ``i + distance``, for every ``i`` that has the bit ``distance`` clear; within each word
    if ``distance`` is 0.
    """

    distance: int
    shift: int
    mask: int


@dataclass(frozen=True, slots=True)
class Stream:
    """One field of a format's blocks, stored for all blocks of a row side by side.

    name    ``codes`` (the main bit plane), ``high`` (the bits above it), ``signs``, ``scales``,
            ``supers``.
    dtype   element type the kernels bind, by numpy's name; never narrower than it must be,
            because MLX counts elements, not bytes, when it cuts command buffers.
    start   where the field begins in the file's block, in bytes.
    stop    where it ends.
    swaps   bit exchanges that follow the copy, in order.
    """

    name: str
    dtype: str
    start: int
    stop: int
    swaps: tuple[Swap, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of one block."""
        return self.stop - self.start


# ggml's Q4_K pairs group 2 l with group 2 l + 1 in one byte; after the exchange a byte pairs
# weight j of a group with weight j + 16 of the same group.
NIBBLES = (Swap(4, 4, 0x0F0F0F0F),)
# Q6_K pairs group s with group s + 2 of a 128-weight half.
FAR_NIBBLES = (Swap(8, 4, 0x0F0F0F0F), *NIBBLES)
# Word k, bits 2 s and 2 s + 1 (group s of a 128-weight half) -> words 2 s and 2 s + 1.
PAIRS = (*NIBBLES, Swap(2, 2, 0x33333333))
# Word k, bit g (group g of 256) -> word g, bit k: an 8 by 8 transposition.
BITS = (*PAIRS, Swap(1, 1, 0x55555555))
# Bit i of a 32-weight block -> the 1-bit plane's order: index bits 4 and 1, then 3 and 0.
ROTATE = (Swap(0, 14, 0x0000CCCC), Swap(0, 7, 0x00AA00AA))
# NVFP4 pairs weight j of 16 with weight j + 8; see `NIBBLES`.
EIGHTS = (Swap(2, 4, 0x0F0F0F0F),)
# Word h, byte j, bits 2 b and 2 b + 1 -> the 2-bit plane's place of weight 16 h + 4 j + b. Address
# bits, from the word's down to the lower one of the pair's, are h, j1, j0, b1, b0. Of word and
# lowest byte bit; higher byte and higher pair bit; lower ones; both pair bits change places.
SPREAD = (
    Swap(1, 8, 0x00FF00FF),
    Swap(0, 12, 0x0000F0F0),
    Swap(0, 6, 0x00CC00CC),
    Swap(0, 2, 0x0C0C0C0C),
)
