"""Lookup tables of the block formats: the IQ grids, signs, and 4- and 8-bit float codes.

The IQ grids are data of the format (``ggml-common.h``) and ship in gguf-py, which is imported at
the first use of an IQ type only: it costs tens of milliseconds.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray

from mlxfuse.errors import UnsupportedError

# Entries and weights per entry of each grid. IQ1_M shares IQ1_S's.
SHAPES = {
    "IQ2_XXS": (256, 8),
    "IQ2_XS": (512, 8),
    "IQ2_S": (1024, 8),
    "IQ3_XXS": (256, 4),
    "IQ3_S": (512, 4),
    "IQ1_S": (2048, 8),
}

# The non-linear 4-bit codebook of IQ4_NL and IQ4_XS.
IQ4 = np.array(
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], dtype=np.int8
)

# E2M1 (OCP Microscaling 1.0) times two, so that the codes are integers; -0 decodes to +0.
E2M1X2 = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], dtype=np.int8)


@cache
def grid(name: str) -> NDArray[np.int8]:
    """The codebook of IQ type ``name``: int8 ``(entries, weights per entry)``.

    Raises UnsupportedError when the installed gguf package does not hold it where gguf 0.19 does.
    """
    import gguf.quants

    try:
        source = getattr(gguf.quants, name)
        source.init_grid()
        table = np.asarray(source.grid).reshape(SHAPES[name]).astype(np.int8)
    except (AttributeError, TypeError, ValueError) as error:
        raise UnsupportedError(
            f"the codebook of {name} was not found in the installed gguf package ({error}); "
            "install gguf 0.19, where it is known to be"
        ) from error
    table.flags.writeable = False
    return table


@cache
def packed_grid(name: str) -> NDArray[np.uint64] | NDArray[np.uint32]:
    """`grid` with each entry as one unsigned integer, so that one gather fetches a whole entry.

    IQ1's grid holds -1, 0, 1 and is multiplied by 8 here: adding its delta of 1/8 is then +-1.
    """
    table = grid(name)
    if name == "IQ1_S":
        table = table * np.int8(8)
    return table.view(np.uint64)[:, 0] if table.shape[1] == 8 else table.view(np.uint32)[:, 0]


@cache
def staged(name: str) -> NDArray[np.uint32]:
    """The codebook that kernels copy to threadgroup memory, in 32-bit words, at most 8 KiB.

    ``IQ4`` is 16 floats. Of ``IQ1_S`` an entry is a word, which holds each value plus 1: that of
    weight b in bits 8 b and the next, that of weight 4 + b in bits 8 b + 4 and the next. Of the
    others the entries are bytes.
    """
    if name == "IQ4":
        return IQ4.astype(np.float32).view(np.uint32)
    table = grid(name)
    if name == "IQ1_S":
        nibbles = (table + np.int8(1)).view(np.uint8)
        table = nibbles[:, :4] | nibbles[:, 4:] << np.uint8(4)
    return np.ascontiguousarray(table).view(np.uint32).reshape(-1)


def _byte_bits() -> NDArray[np.uint8]:
    return np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")


# A byte's eight bits as eight bytes in one uint64: bit i becomes byte i, 0 or 1.
BITS: NDArray[np.uint64] = _byte_bits().view(np.uint64)[:, 0]

# The same, with a clear bit as int8 +1 and a set bit as -1.
SIGNS: NDArray[np.uint64] = (1 - 2 * _byte_bits().astype(np.int8)).view(np.uint64)[:, 0]

# IQ2 and IQ3 store seven signs; the eighth makes the number of minuses even.
EVEN_SIGNS: NDArray[np.uint64] = SIGNS[[i | (i.bit_count() & 1) << 7 for i in range(128)]]

# E8M0 to half its value (the codes are doubled): 2**(e - 128), the last two subnormal. e = 255 is
# 2**127 as in ggml, not the NaN of the OCP specification.
E8M0_HALF: NDArray[np.float32] = np.ldexp(np.float32(1), np.arange(256) - 128).astype(np.float32)


def _ue4m3_half() -> NDArray[np.float32]:
    code = np.arange(256)
    exponent, mantissa = code >> 3 & 15, code & 7
    subnormal = np.ldexp(mantissa / 8, -6)
    value = np.where(exponent == 0, subnormal, np.ldexp(1 + mantissa / 8, exponent - 7))
    value[0x7F] = 0  # NaN in E4M3; ggml reads it as zero, and ignores the sign bit
    return (value / 2).astype(np.float32)


# Unsigned E4M3 to half its value.
UE4M3_HALF: NDArray[np.float32] = _ue4m3_half()
