"""What attention over compressed keys and values moves: the cache once, in whole pieces."""

from __future__ import annotations

from collections.abc import Iterator

import mlx.core as mx
import pytest

from mlxfuse.kernels.kv.compressed_sdpa import _splits, compressed_sdpa
from mlxfuse.kernels.kv.scheme import KVScheme, KVSide, pack
from mlxfuse.kernels.kv.sdpa_call import Scores
from mlxfuse.kernels.runtime import kernel as _kernel
from mlxfuse.kernels.runtime import self_test
from tests import msl

K8V4 = KVScheme(KVSide(128, 8, 64, "affine", True), KVSide(128, 4, 64, "affine", True), mx.float16)
K4V16 = KVScheme(KVSide(80, 4, 0, "symmetric"), KVSide(80, 16), mx.bfloat16)


def counted(
    scheme: KVScheme, length: int, heads: int, queries: int = 1, capacity: int = 4096
) -> list[msl.Counts]:
    """Of the two dispatches, one KV head."""
    dims = scheme.k.dim, scheme.v.dim
    k, v = (mx.random.normal((1, 1, 64, d), key=mx.random.key(d)) for d in dims)
    rows = mx.tile(pack(scheme, k, v), (1, 1, capacity // 64, 1))
    tail = mx.zeros((1, 1, 64, sum(dims)), scheme.dtype)
    q = mx.random.normal((1, heads, queries, dims[0]), scheme.dtype, key=mx.random.key(0))
    ((kernel, arguments),) = self_test.calls(
        lambda: compressed_sdpa(q, scheme, rows, length, tail, 40, scores=Scores(0.1))
    )
    with msl.installed(), msl.counting() as found:
        _kernel.run(kernel.launch(*arguments), emulated=True)
    return found


@pytest.mark.parametrize(
    ("scheme", "heads", "queries"), [(K8V4, 8, 1), (K8V4, 1, 1), (K4V16, 7, 4)]
)
def test_the_cache_is_read_once(scheme: KVScheme, heads: int, queries: int) -> None:
    parts, merge = counted(scheme, 4096, heads, queries)
    rows, tail = parts.buffers["rows"], parts.buffers["tail"]
    # Codes, scales and biases: each byte once for all heads and queries.
    assert rows.distinct_read == 4096 * scheme.row_bytes
    assert rows.times_fetched == 1.0
    assert tail.times_fetched == 1.0
    if heads * queries > 4:  # staged: by one lane, and in whole pieces
        assert rows.read_bytes == rows.distinct_read
        assert rows.coalescing == rows.coalescing_128 == 1.0
        assert tail.read_bytes == 40 * (scheme.k.dim + scheme.v.dim) * 2
        assert tail.coalescing >= 0.9
        assert parts.barriers > 0
    else:  # not staged: a lane reads 8 bytes of codes at a time, and no token is waited for
        assert rows.coalescing >= 0.5
        assert parts.barriers == (_splits(4096, 1) + 1) * 2 * 3  # to join four SIMD-groups
    sums = merge.buffers["sums"]
    assert sums.times_read == 1.0
    # What is written in between is little beside the cache: float32 for each row and part.
    assert sums.distinct_read == (_splits(4096, 1) + 1) * heads * queries * scheme.v.dim * 4


def test_more_than_32_rows_read_the_cache_once_for_each_32() -> None:
    parts, _ = counted(K4V16, 256, 8, 8, 256)
    assert parts.buffers["rows"].times_read == 2.0
    assert parts.buffers["rows"].coalescing == 1.0


def test_cost_follows_the_length_and_not_the_capacity() -> None:
    for length in (0, 7, 1000):
        parts, _ = counted(K8V4, length, 8)
        # To 16 bytes for each split.
        assert 0 <= parts.buffers["rows"].read_bytes - length * K8V4.row_bytes < 16 * 32


@pytest.fixture
def overlapping(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The kernel with tiles that overlap by half."""
    whole = _kernel.header
    step = "base+=tile"

    def header(parts: tuple[str, ...]) -> str:
        assert step in whole(parts) or parts == ("compressed_sdpa.metal:merge",)
        return whole(parts).replace(step, f"{step}/2")

    monkeypatch.setattr(_kernel, "header", header)
    _kernel._compiled.cache_clear()
    yield
    _kernel._compiled.cache_clear()


@pytest.mark.usefixtures("overlapping")
def test_a_kernel_that_reads_twice_is_seen() -> None:
    parts, _ = counted(K8V4, 4096, 8)
    # 4 tiles in each split of 128 tokens: the first half of the first is read once.
    assert parts.buffers["rows"].times_read == (16 + 7 * 32) / 128
