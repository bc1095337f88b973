"""Split GGUF blocks into streams and put them together again, byte for byte.

``mlxfuse.formats`` describes the streams; this is the copy. Both directions work on pieces of
about half a megabyte, which stay in a core's cache between the copy and the bit exchanges, and
numpy releases the interpreter lock for both, so a thread pool scales.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from ..formats import BY_NAME, Format
from ..streams import Swap

Bytes = npt.NDArray[np.uint8]
Words = npt.NDArray[np.unsignedinteger]

_CHUNK = 1 << 19  # bytes
_CHUNKS_PER_JOB = 4


def stream_shapes(format: Format, rows: int, columns: int) -> dict[str, tuple[int, int]]:
    """Shape of each stream, in elements of its own dtype, for ``rows`` rows of ``columns``.

    Raises:
        ValueError: the format has no streams, or ``columns`` is no multiple of its block.
    """
    if not format.streams:
        raise ValueError(f"{format.name} has no stream layout")
    if columns % format.block_size:
        raise ValueError(
            f"{format.name} rows hold a multiple of {format.block_size} weights, found {columns}"
        )
    blocks = columns // format.block_size
    return {s.name: (rows, blocks * s.nbytes // np.dtype(s.dtype).itemsize) for s in format.streams}


def allocate(format: Format, rows: int, columns: int) -> dict[str, npt.NDArray[np.generic]]:
    """Uninitialised arrays of the shapes and types that `relayout` fills."""
    shapes = stream_shapes(format, rows, columns)
    return {s.name: np.empty(shapes[s.name], s.dtype) for s in format.streams}


def relayout(
    data: Bytes,
    format: Format,
    out: Mapping[str, npt.NDArray[np.generic]],
    pool: Executor | None = None,
) -> None:
    """Write the rows of ``data`` into streams.

    Args:
        data: uint8 ``[rows, row_bytes]``, each row contiguous: blocks as the file has them.
        format: their type.
        out: one contiguous array ``[rows, ...]`` for each stream, as `allocate` makes them;
            slices along rows are fine, so several tensors can share one set of streams.
        pool: threads to work with; the calling thread works alone without one.
    """
    blocks, streams = _checked(data, format, out)
    _run(_split, blocks, streams, format, pool)


def restore(
    streams: Mapping[str, npt.NDArray[np.generic]],
    format: Format,
    out: Bytes,
    pool: Executor | None = None,
) -> None:
    """The inverse of `relayout`: write the file's bytes into ``out``, ``[rows, row_bytes]``."""
    blocks, flat = _checked(out, format, streams)
    _run(_join, blocks, flat, format, pool)


def _checked(
    data: Bytes, format: Format, streams: Mapping[str, npt.NDArray[np.generic]]
) -> tuple[Bytes, list[Bytes]]:
    """``data`` as ``[blocks, type_size]`` and each stream as bytes ``[blocks, bytes]``."""
    rows, row_bytes = data.shape
    columns, rest = divmod(row_bytes, format.type_size)
    if rest or not data.flags.c_contiguous:
        raise ValueError(
            f"expected contiguous rows of {format.name} blocks of {format.type_size} bytes, "
            f"found rows of {row_bytes} bytes with strides {data.strides}"
        )
    shapes = stream_shapes(format, rows, columns * format.block_size)
    flat = []
    for s in format.streams:
        array = streams[s.name]
        if array.shape != shapes[s.name] or array.dtype != s.dtype or not array.flags.c_contiguous:
            raise ValueError(
                f"stream {s.name} of {format.name}: expected a contiguous {s.dtype} array of "
                f"shape {shapes[s.name]}, found {array.dtype} of shape {array.shape}"
            )
        flat.append(array.view(np.uint8).reshape(rows * columns, s.nbytes))
    return data.reshape(rows * columns, format.type_size), flat


def _run(
    work: Callable[[Bytes, list[Bytes], Format, Bytes], None],
    blocks: Bytes,
    streams: list[Bytes],
    format: Format,
    pool: Executor | None,
) -> None:
    """Call ``work`` on chunks of blocks, one scratch buffer a thread."""
    # TQ1_0 takes more room in its streams than in the file.
    nbytes = max(format.type_size, sum(s.nbytes for s in format.streams))
    step = max(1, _CHUNK // nbytes)

    def many(begin: int, end: int) -> None:
        scratch = np.empty(step * nbytes // 8 * 8 + 8, np.uint8)
        for at in range(begin, end, step):
            part = slice(at, min(at + step, end))
            work(blocks[part], [s[part] for s in streams], format, scratch)

    share = step * _CHUNKS_PER_JOB
    jobs = [(at, min(at + share, len(blocks))) for at in range(0, len(blocks), share)]
    if pool is None:
        for job in jobs:
            many(*job)
    else:
        for done in [pool.submit(many, *job) for job in jobs]:
            done.result()


def _split(blocks: Bytes, streams: list[Bytes], format: Format, scratch: Bytes) -> None:
    if format.name == "TQ1_0":
        blocks = _two_bits(blocks)
    for s, stored in zip(format.streams, streams, strict=True):
        np.copyto(_items(stored, 0, s.nbytes), _items(blocks, s.start, s.nbytes))
        for swap in s.swaps:
            _exchange(stored, swap, scratch)


def _join(blocks: Bytes, streams: list[Bytes], format: Format, scratch: Bytes) -> None:
    if format.name == "TQ1_0":
        stored = np.empty((len(blocks), BY_NAME["TQ2_0"].type_size), np.uint8)
        _join(stored, streams, BY_NAME["TQ2_0"], scratch)
        _fifths(stored, blocks)
        return
    for s, stored in zip(format.streams, streams, strict=True):
        if s.swaps:
            stored = stored.copy()
        for swap in reversed(s.swaps):
            _exchange(stored, swap, scratch)
        np.copyto(_items(blocks, s.start, s.nbytes), _items(stored, 0, s.nbytes))


# Of TQ1_0: bytes of a block, and the weights that each holds; weight k of all comes before k + 1.
_TRITS = ((0, 32, 5), (32, 48, 5), (48, 52, 4))


def _two_bits(blocks: Bytes) -> Bytes:
    """Blocks of TQ1_0 as TQ2_0's: 2 bits for a weight instead of 1.6, the same scale."""
    # A byte holds a base-3 fraction: times 3**k (mod 256), its top digit is byte * 3 >> 8.
    parts = []
    for start, stop, count in _TRITS:
        powers = np.array([1, 3, 9, 27, 81][:count], np.uint8)[:, None]
        fractions = blocks[:, None, start:stop] * powers
        parts.append((fractions.astype(np.uint16) * 3 >> 8).reshape(len(blocks), -1))
    codes = np.concatenate(parts, axis=1).astype(np.uint8).reshape(-1, 2, 4, 32)
    packed = codes[:, :, 0] | codes[:, :, 1] << 2 | codes[:, :, 2] << 4 | codes[:, :, 3] << 6
    return np.concatenate([packed.reshape(-1, 64), blocks[:, 52:]], axis=1)


def _fifths(stored: Bytes, blocks: Bytes) -> None:
    """The inverse, as ggml packs: of the bytes that mean the same weights the lowest."""
    lanes = stored[:, :64].reshape(-1, 2, 1, 32) >> np.array([0, 2, 4, 6], np.uint8)[:, None]
    codes = (lanes & np.uint8(3)).reshape(len(stored), 256)
    at = 0
    for start, stop, count in _TRITS:
        digits = codes[:, at : at + count * (stop - start)].reshape(-1, count, stop - start)
        values = np.zeros((len(stored), stop - start), np.uint16)
        for k in range(5):
            values = values * 3 + (digits[:, k] if k < count else 0)
        blocks[:, start:stop] = (values * 256 + 242) // 243
        at += count * (stop - start)
    blocks[:, 52:] = stored[:, 64:]


def _items(rows: Bytes, at: int, size: int) -> npt.NDArray[np.generic]:
    """Bytes ``at`` to ``at + size`` of each row as one item, which numpy copies fastest."""
    item = np.dtype(f"u{size}" if size in (1, 2, 4, 8) else f"V{size}")
    return np.ndarray(len(rows), item, rows, at, (rows.strides[0],))


def _exchange(stored: Bytes, swap: Swap, scratch: Bytes) -> None:
    """Apply one `Swap` to every block, in place; ``scratch`` is at least as large.

    Written for long contiguous operands, twice the arithmetic and twice as fast as working
    on every other run of words: where the distance bit is set, the mask is 0.
    """
    flat = stored.reshape(-1)
    shift = swap.shift
    low: Words
    high: Words
    if swap.distance < 2:
        # One word, or the two halves of one 64-bit word, exchange bits among themselves.
        low = flat.view(np.uint64) if swap.distance else flat.view(np.uint32)
        high = low
        masks: Words | int = swap.mask << shift if swap.distance else swap.mask
        shift = 32 - shift if swap.distance else shift
    else:
        words = flat.view(np.uint64)
        half = swap.distance // 2
        low, high = words[:-half], words[half:]
        masks = _masks(half, swap.mask, _CHUNK // 8)[: len(low)]
    bits = scratch[: low.nbytes].view(low.dtype)
    np.right_shift(low, shift, out=bits)
    bits ^= high
    bits &= masks
    high ^= bits
    bits <<= shift
    low ^= bits


@lru_cache(maxsize=8)
def _masks(half: int, mask: int, length: int) -> Words:
    """``half`` words of ``mask`` and ``half`` words of 0, in turn, ``length`` at least."""
    turn = np.repeat(np.array([mask << 32 | mask, 0], np.uint64), half)
    return np.tile(turn, length // len(turn) + 1)
