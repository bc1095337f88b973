"""Dequantisation of every GGUF tensor type in numpy."""

from __future__ import annotations

import math
from concurrent.futures import Executor

import numpy as np
from numpy.typing import NDArray

from mlxfuse.errors import UnsupportedError
from mlxfuse.formats import Format
from mlxfuse.gguf.decoders import DECODERS, Bytes, Decoded

# Weights decoded at a time: under 2 MiB of scratch, near a core's caches, while numpy's cost
# per call no longer shows.
_CHUNK = 1 << 17
_CHUNKS_PER_JOB = 8


def dequantize(
    data: Bytes,
    format: Format,
    shape: tuple[int, ...],
    *,
    pool: Executor | None = None,
) -> NDArray[np.float32]:
    """Decode a tensor, or any whole rows of one.

    Quantised types, F16, BF16 and the small integers are exact in float32's arithmetic, equal to
    gguf-py's and llama.cpp's; I32, I64 and F64 are rounded to nearest.

    Args:
        data: uint8, C-contiguous, of any shape: the bytes as they lie in the file.
        format: the tensor's type.
        shape: row-major; the last axis is a multiple of ``format.block_size``.
        pool: threads to work with; the calling thread works alone without one.

    Returns:
        float32 of ``shape``.

    Raises:
        ValueError: a size, dtype or contiguity that does not agree.
        UnsupportedError: a type that holds no weights (Q8_1).
    """
    decode = DECODERS.get(format.name)
    if decode is None:
        raise UnsupportedError(
            f"{format.name} is a type of intermediate activations and holds no weights"
        )
    _check_data(data, format, shape)
    out = np.empty(shape, np.float32)
    blocks = data.reshape(-1, format.type_size)
    weights = out.reshape(-1, format.block_size)
    step = max(1, _CHUNK // format.block_size)
    share = step * _CHUNKS_PER_JOB

    def job(begin: int) -> None:
        # Infinite and NaN scales are decoded as they are; they are no reason to warn.
        with np.errstate(all="ignore"):
            for i in range(begin, min(begin + share, len(blocks)), step):
                part = slice(i, min(i + step, begin + share))
                _multiply_out(decode(blocks[part]), weights[part])

    begins = range(0, len(blocks), share)
    # Numpy releases the interpreter lock in the loops.
    for _ in map(job, begins) if pool is None or len(begins) < 2 else pool.map(job, begins):
        pass
    return out


def can_dequantize(format: Format) -> bool:
    """Whether `dequantize` decodes ``format``."""
    return format.name in DECODERS


def _check_data(data: Bytes, format: Format, shape: tuple[int, ...]) -> None:
    if data.dtype != np.uint8 or not data.flags.c_contiguous:
        raise ValueError(
            f"{format.name} data must be a C-contiguous uint8 array, not {data.dtype} with "
            f"strides {data.strides}"
        )
    if not shape or min(shape) < 0 or shape[-1] % format.block_size:
        raise ValueError(
            f"a {format.name} tensor needs rows of a multiple of {format.block_size} weights; "
            f"its shape is {shape}"
        )
    nbytes = math.prod(shape[:-1]) * format.row_bytes(shape[-1])
    if data.size != nbytes:
        raise ValueError(
            f"a {format.name} tensor of shape {shape} takes {nbytes} bytes; there are {data.size}"
        )


def _multiply_out(decoded: Decoded, out: NDArray[np.float32]) -> None:
    codes, scales, offsets = decoded
    np.copyto(out, codes, casting="unsafe")
    if scales is None:
        return
    groups = out.reshape(*scales.shape, -1)
    np.multiply(groups, scales[..., None], out=groups)
    if offsets is not None:
        np.add(groups, offsets[..., None], out=groups)
