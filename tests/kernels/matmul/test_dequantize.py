"""Every format is decoded bit for bit as gguf-py decodes it, by the kernel and the reference."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlxfuse.formats import BY_NAME, Format
from mlxfuse.kernels.matmul.dequantize import KERNEL, dequantize
from mlxfuse.kernels.runtime import kernel as _kernel
from tests import msl

from ..matmul_cases import FEWER
from ..weights import WITH_KERNEL, expected, random_blocks, segment

by_format = pytest.mark.parametrize("format", WITH_KERNEL, ids=lambda f: f.name)
DTYPES = (mx.float32, mx.float16, mx.bfloat16)
SHAPES = [(16, 2560), (3, 256), (1, None)]
EVERY = [
    pytest.param(f, *shape, id=f"{f.name}-{shape[0]}-{shape[1]}")
    for f in WITH_KERNEL
    for shape in (SHAPES[:1] if f.name in FEWER else SHAPES)
]


def bits(a: mx.array | np.ndarray) -> np.ndarray:
    return np.array(a).view(np.uint32)


@pytest.mark.parametrize(("format", "rows", "columns"), EVERY)
def test_all_rows(format: Format, rows: int, columns: int | None, kernels: str) -> None:
    data = random_blocks(format, rows, columns or format.block_size, edges=True)
    weight = segment(data, format)
    want = expected(data, format)
    rare = format.name in FEWER
    if rows == 16:  # all the codes of 4-bit and all bytes of 8-bit formats occur
        assert len(np.unique(data)) == 256
    np.testing.assert_array_equal(bits(KERNEL.reference(weight, None, mx.float32)[0]), bits(want))
    # The lint follows paths, which are the same in all types; other tests have it.
    with msl.using(lint=False):
        exact, *rounded = (dequantize(weight, dtype=t) for t in DTYPES[: 2 if rare else 3])
    np.testing.assert_array_equal(bits(exact), bits(want))
    for dtype, got in zip(DTYPES[1:], rounded, strict=False):
        assert got.dtype == dtype
        assert mx.array_equal(got.view(mx.uint16), mx.array(want).astype(dtype).view(mx.uint16))


@pytest.mark.parametrize("format", WITH_KERNEL[::5], ids=lambda f: f.name)
def test_whole_pieces_are_stored(format: Format) -> None:
    """Also of 5 rows, of which the last threads have none."""
    columns = max(256, format.block_size)
    weight = segment(random_blocks(format, 5, columns), format)
    for dtype in (mx.float16, mx.float32):
        launch = KERNEL.launch(weight, None, dtype)
        with msl.installed(lint=False), msl.counting() as found:
            _kernel.run(launch)
        stored = found[0].buffers["out"]
        assert stored.times_written == 1.0
        assert stored.store_segments == stored.store_ideal == 5 * columns * dtype.size // 32


@by_format
def test_gathered_rows(format: Format, kernels: str) -> None:
    data = random_blocks(format, 9, 512)
    weight = segment(data, format)
    rows = mx.array([[8, 0, 3], [3, 3, 7]])
    got = dequantize(weight, rows)
    assert got.shape == (2, 3, 512)
    np.testing.assert_array_equal(bits(got), bits(expected(data, format)[np.array(rows)]))


@by_format
def test_experts(format: Format, kernels: str) -> None:
    data = random_blocks(format, 9, 256)
    got = dequantize(segment(data, format, experts=3))
    assert got.shape == (3, 3, 256)
    np.testing.assert_array_equal(bits(got).reshape(9, 256), bits(expected(data, format)))


def test_rows_of_experts_are_refused() -> None:
    weight = segment(random_blocks(BY_NAME["Q4_0"], 8, 64), BY_NAME["Q4_0"], experts=2)
    with pytest.raises(ValueError, match=r"expected a segment \[N, K\], found one of 2 experts"):
        dequantize(weight, mx.array([1, 0]))
    got = dequantize(weight.take(mx.array([1])).take(slice(0, 1)))
    assert got.shape == (1, 4, 64)


@by_format
def test_no_rows(format: Format) -> None:
    weight = segment(random_blocks(format, 2, 256), format)
    (none,) = KERNEL.reference(weight, mx.zeros((0, 3), mx.int32), mx.float16)
    assert (none.shape, none.dtype) == ((0, 3, 256), mx.float16)


def test_a_row_past_the_end_reads_the_last(kernels: str) -> None:
    data = random_blocks(BY_NAME["Q4_0"], 9, 64)
    weight = segment(data, BY_NAME["Q4_0"])
    got = dequantize(weight, mx.array([9, -1, 2**31 - 1]))
    np.testing.assert_array_equal(bits(got), bits(expected(data, BY_NAME["Q4_0"])[[8, 8, 8]]))


@pytest.mark.parametrize("bit", [0, 3, 4, 7])
def test_a_flipped_code_bit_is_seen(bit: int, kernels: str) -> None:
    format = BY_NAME["Q4_K"]
    data = random_blocks(format, 2, 256)
    want = expected(data, format)
    data[1, 100] ^= 1 << bit
    got = np.array(dequantize(segment(data, format)))
    assert (got != want).sum() == 1


def test_what_no_kernel_does_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = segment(random_blocks(BY_NAME["Q8_0"], 4, 64), BY_NAME["Q8_0"])
    assert KERNEL.refuse(weight, None, mx.float32) is None
    refused = KERNEL.refuse(weight, None, mx.int32)
    assert refused == "results are float16, bfloat16 or float32, not mlx.core.int32"
    assert KERNEL.refuse(weight, mx.zeros((0,), mx.int32), mx.float32) == "there are no rows"
    monkeypatch.setenv("MLXFUSE_KERNELS", "emulated")
    assert dequantize(weight, mx.zeros((0, 2), mx.int32)).shape == (0, 2, 64)
