"""Random quantised weights for kernel tests, beside what gguf-py makes of the same bytes."""

from __future__ import annotations

import gguf
import mlx.core as mx
import numpy as np

from mlxfuse.formats import FORMATS, Format
from mlxfuse.gguf import blocks
from mlxfuse.gguf.relayout import allocate, relayout
from mlxfuse.kernels.weight import Segment

WITH_KERNEL = [f for f in FORMATS.values() if f.traits]

EDGES = np.array([0, -0.0, 2**-24, -(2**-24), 2**-14, 65504, -65504, 1, -1, 0.1], np.float16)


def random_blocks(
    format: Format, rows: int, columns: int, seed: int = 0, *, edges: bool = False
) -> np.ndarray:
    """Bytes ``[rows, row_bytes]`` of random codes and scales; ``edges``: extreme scales too."""
    rng = np.random.default_rng([seed, format.id])
    if format.name in ("F32", "BF16"):
        values = rng.standard_normal((rows, columns)).astype(np.float32)
        return (
            values.view(np.uint8)
            .reshape(rows, columns, 4)[..., -format.type_size :]
            .reshape(rows, -1)
        )
    data = rng.integers(0, 256, (rows, format.row_bytes(columns)), dtype=np.uint8)
    blocks = data.reshape(-1, format.type_size)
    for at in format.float16:
        scales = rng.uniform(-0.1, 0.1, len(blocks)).astype(np.float16)
        if edges:
            scales[::2] = rng.choice(EDGES, len(scales[::2]))
        blocks[:, at : at + 2] = scales.view(np.uint8).reshape(-1, 2)
    for at in format.exponents:
        low, high = (0, 252) if edges else (120, 130)
        blocks[:, at] = rng.integers(low, high, len(blocks))
    for at in format.small:
        blocks[:, at] = blocks[:, at] & 0x8F | 0x20
    return data


def expected(data: np.ndarray, format: Format) -> np.ndarray:
    """float32 ``[rows, columns]`` by gguf-py; of what it does not have, by our own reader."""
    if format.name in ("Q1_0", "Q2_0"):
        columns = data.shape[1] // format.type_size * format.block_size
        return blocks.dequantize(data, format, (len(data), columns))
    return gguf.quants.dequantize(data, gguf.GGMLQuantizationType[format.name])


def segment(data: np.ndarray, format: Format, experts: int | None = None) -> Segment:
    """The streams of ``data``; with ``experts``, the rows divided among them."""
    rows, row_bytes = data.shape
    columns = row_bytes // format.type_size * format.block_size
    streams = allocate(format, rows, columns)
    relayout(data, format, streams)
    lead = (rows,) if experts is None else (experts, rows // experts)
    arrays = {n: mx.array(a).reshape(*lead, -1) for n, a in streams.items()}
    return Segment(format, columns, arrays)


def to_float64(a: mx.array) -> np.ndarray:
    return np.array(a.astype(mx.float32)).astype(np.float64)
