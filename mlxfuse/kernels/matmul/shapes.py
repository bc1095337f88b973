"""Which way a product takes, and in tiles of which shape: by its rows and by the GPU.

No figure in these tables has been measured on a Mac; what `mlxfuse tune` finds goes before them.
"""

from __future__ import annotations

import math
import platform
import re
from collections.abc import Mapping
from functools import cache
from typing import NamedTuple

import mlx.core as mx

MAX_BATCH = 8
"""Rows of x that one decoded unit of the weight is used for without tiles."""

ENOUGH = 128
"""Threadgroups that are enough for a GPU: three for each of 40 cores. With fewer, tiles have half
of the columns."""

# The last number of Apple's name for a generation's GPU -> most rows of x, and how they are
# multiplied. Tiles read the weight once for up to 192 rows and write nothing; ``dequantize``
# writes and reads 2 bytes for each weight and leaves the rest to `mx.matmul`. An M5 (17) has matrix
# units, which MLX's matmul uses and `simdgroup_matrix` does not.
ROUTES: Mapping[int, tuple[tuple[float, str], ...]] = {
    0: ((MAX_BATCH, "batch"), (256, "tiles"), (math.inf, "dequantize")),
    17: ((MAX_BATCH, "batch"), (32, "tiles"), (math.inf, "dequantize")),
}

BUCKETS = (16, 32, 64, 128, 192, 256, 512)
"""Rows of x up to which one choice of `mlxfuse tune` holds."""


_TALLEST = 192  # rows of a tile


class Shape(NamedTuple):
    """What a threadgroup of the tiled kernel multiplies.

    rows     of x.
    columns  of the results, or gated of gate and up together: rows of the weight.
    groups   SIMD-groups.
    """

    rows: int
    columns: int
    groups: int

    @property
    def threads(self) -> int:
        return 32 * self.groups

    def nbytes(self, itemsize: int) -> int:
        """Threadgroup memory for numbers of so many bytes; as in the Metal source."""
        depth = 32 if self.rows > 64 or itemsize == 4 else 64
        return (self.rows + self.columns) * (depth + 8) * itemsize


def shape(rows: int, columns: int, itemsize: int) -> Shape:
    """The tile for ``rows`` rows of x: as few tiles as there can be, and no larger than that.

    Sums of 192 rows and 64 columns would take more than 128 registers, and numbers of 4 bytes more
    memory than there is.
    """
    most = _TALLEST if columns == 32 and itemsize == 2 else 128
    tiles = -(-rows // most)
    each = -(-rows // tiles)
    height = next(n for n in (16, 32, 64, 128, _TALLEST) if n >= each)
    return Shape(height, columns, 4 if height <= 64 else 8)


def route(rows: int) -> str:
    """``batch``, ``tiles`` or ``dequantize``, on this machine."""
    table = ROUTES[max(n for n in ROUTES if n <= generation())]
    return next(name for most, name in table if rows <= most)


def columns(rows: int, outputs: int) -> int:
    """Of a tile, 32 or 64: 64 if there are enough tiles then, and if that makes no second row of
    them.

    Args:
        outputs: rows of the weight.
    """
    if 128 < rows <= _TALLEST:
        return 32
    return 64 if -(-rows // 128) * outputs >= 64 * ENOUGH else 32


def bucket(rows: int) -> str:
    """What `mlxfuse tune` calls so many rows of x."""
    most = next((n for n in BUCKETS if rows <= n), None)
    return "more rows" if most is None else f"{most} rows"


def tensor_shape(rows: int) -> Shape:
    """The same for the tensor operations, which multiply 16 rows by 32 columns at a time."""
    height = next((n for n in (32, 64) if n >= rows), 128)
    return Shape(height, 64, 4 if height <= 64 else 8)


@cache
def tensors() -> bool:
    """Whether Metal's tensor operations use matrix units here: an M5 (A20), macOS 26.2."""
    info = mx.device_info() if mx.metal.is_available() else {}
    phone = str(info.get("architecture", "")).endswith("p")
    system = tuple(map(int, re.findall(r"\d+", platform.mac_ver()[0])))
    return generation() >= (18 if phone else 17) and system >= (26, 2)


@cache
def generation() -> int:
    """13 for an M1 and so on to 17 for an M5; 0 where there is no such GPU."""
    info = mx.device_info() if mx.metal.is_available() else {}
    found = re.match(r"applegpu_g(\d+)", str(info.get("architecture", "")))
    return int(found[1]) if found else 0
