"""The streams of `mlxfuse.formats` hold every byte of a file, in the order the table documents."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import gguf
import numpy as np
import pytest

from mlxfuse.formats import BY_NAME, FORMATS, Format
from mlxfuse.gguf import relayout as module
from mlxfuse.gguf.relayout import allocate, relayout, restore, stream_shapes

WITH_STREAMS = [f for f in FORMATS.values() if f.streams and not f.traits.stored]

# Block bytes (offset, values) that make every weight its own code minus the offset.
ONE = (0x00, 0x3C)  # 1.0 in float16
NEUTRAL: dict[str, tuple[int, dict[int, tuple[int, ...]]]] = {
    "Q4_0": (8, {0: ONE}),
    "Q4_1": (0, {0: ONE, 2: (0, 0)}),
    "Q5_0": (16, {0: ONE}),
    "Q5_1": (0, {0: ONE, 2: (0, 0)}),
    "Q2_K": (0, {0: (1,) * 16, 80: (*ONE, 0, 0)}),
    "Q3_K": (4, {96: (0x11,) * 8 + (0xAA,) * 4, 108: ONE}),
    "Q4_K": (0, {0: (*ONE, 0, 0), 4: (1,) * 4 + (0,) * 4 + (1,) * 4}),
    "Q5_K": (0, {0: (*ONE, 0, 0), 4: (1,) * 4 + (0,) * 4 + (1,) * 4}),
    "Q6_K": (32, {192: (1,) * 16, 208: ONE}),
}


def random_rows(format: Format, rows: int, columns: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (rows, format.row_bytes(columns)), dtype=np.uint8)


def decoded(data: np.ndarray, name: str) -> np.ndarray:
    return gguf.quants.dequantize(data, gguf.GGMLQuantizationType[name])


def planes(format: Format, streams: dict[str, np.ndarray]) -> np.ndarray:
    """Codes of every weight, by the bit positions that `mlxfuse.formats` documents."""
    rows = streams["codes"].shape[0]
    h, j, b = np.meshgrid(np.arange(2), np.arange(4), np.arange(4), indexing="ij")
    codes = streams["codes"].view(np.uint8).reshape(rows, -1)
    four_bit = format.name not in ("Q2_K", "Q3_K")
    groups = codes.reshape(rows, -1, 16 if four_bit else 8).astype(np.int32)
    if four_bit:
        value = groups[:, :, 4 * j + b] >> 4 * h & 15
    else:
        value = groups[:, :, 4 * (j % 2) + b] >> (4 * h + 2 * (j // 2)) & 3
    if "high" in streams:
        high = streams["high"].view(np.uint8).reshape(rows, value.shape[1], -1).astype(np.int32)
        if high.shape[2] == 4:
            bit = 4 * h + j if format.block_size == 256 else 4 * (j % 2) + 2 * h + j // 2
            value |= (high[:, :, b] >> bit & 1) << (4 if four_bit else 2)
        else:
            value |= (high[:, :, 4 * (j % 2) + b] >> (4 * h + 2 * (j // 2)) & 3) << 4
    return value.reshape(rows, -1)


@pytest.mark.parametrize("format", WITH_STREAMS, ids=lambda f: f.name)
def test_every_byte_lies_in_exactly_one_stream(format: Format) -> None:
    places = [at for s in format.streams for at in range(s.start, s.stop)]
    assert sorted(places) == list(range(format.type_size))


@pytest.mark.parametrize("columns", [256, 1280])
@pytest.mark.parametrize("format", WITH_STREAMS, ids=lambda f: f.name)
def test_round_trip_is_exact(format: Format, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CHUNK", 3000)  # several chunks, the last one ragged
    data = random_rows(format, 37, columns)
    streams = allocate(format, 37, columns)
    relayout(data, format, streams)
    assert sum(s.nbytes for s in streams.values()) == data.nbytes
    with ThreadPoolExecutor(3) as pool:
        threaded = allocate(format, 37, columns)
        relayout(data, format, threaded, pool)
        back = np.empty_like(data)
        restore(threaded, format, back, pool)
    for name, stream in streams.items():
        np.testing.assert_array_equal(threaded[name].view(np.uint8), stream.view(np.uint8))
    np.testing.assert_array_equal(back, data)
    # One flipped bit of the file is one flipped bit of one stream.
    data[20, 7] ^= 16
    relayout(data, format, threaded)
    flipped = sum(
        int(np.bitwise_count(a.view(np.uint8) ^ threaded[n].view(np.uint8)).sum())
        for n, a in streams.items()
    )
    assert flipped == 1


@pytest.mark.parametrize("name", sorted(NEUTRAL))
def test_bit_planes_are_where_the_table_says(name: str) -> None:
    format = BY_NAME[name]
    offset, fields = NEUTRAL[name]
    data = random_rows(format, 8, 512)
    blocks = data.reshape(-1, format.type_size)
    for at, values in fields.items():
        blocks[:, at : at + len(values)] = values
    expected = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[name]) + offset
    streams = allocate(format, 8, 512)
    relayout(data, format, streams)
    np.testing.assert_array_equal(planes(format, streams), expected)


def test_more_rows_than_are_worked_on_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A block of TQ1_0 grows, so that fewer of them are a piece."""
    monkeypatch.setattr(module, "_CHUNK", 1 << 12)
    module._masks.cache_clear()
    data = random_rows(BY_NAME["TQ1_0"], 96, 512)
    data.reshape(-1, 54)[:, 52:] = ONE
    streams = allocate(BY_NAME["TQ1_0"], 96, 512)
    relayout(data, BY_NAME["TQ1_0"], streams)
    two = np.empty((96, 2 * 66), np.uint8)
    restore(streams, BY_NAME["TQ2_0"], two)
    np.testing.assert_array_equal(decoded(two, "TQ2_0"), decoded(data, "TQ1_0"))
    module._masks.cache_clear()


def test_trits_are_stored_as_two_bits_and_restored() -> None:
    format = BY_NAME["TQ1_0"]
    quantised = gguf.quants.quantize(
        np.random.default_rng(0).standard_normal((9, 512)).astype(np.float32),
        gguf.GGMLQuantizationType.TQ1_0,
    )
    streams = allocate(format, 9, 512)
    relayout(quantised, format, streams)
    assert sum(s.nbytes for s in streams.values()) == quantised.nbytes * 66 / 54
    back = np.empty_like(quantised)
    restore(streams, format, back)
    np.testing.assert_array_equal(back, quantised)
    two = np.empty((9, 2 * 66), np.uint8)
    restore(streams, BY_NAME["TQ2_0"], two)
    np.testing.assert_array_equal(decoded(two, "TQ2_0"), decoded(quantised, "TQ1_0"))
    # A byte that no writer makes means the weights of one that it does.
    quantised[:, :52] = np.random.default_rng(1).integers(0, 256, quantised[:, :52].shape)
    relayout(quantised, format, streams)
    restore(streams, format, back)
    assert not np.array_equal(back, quantised)
    np.testing.assert_array_equal(decoded(back, "TQ1_0"), decoded(quantised, "TQ1_0"))


def test_rows_of_several_tensors_share_streams() -> None:
    format = BY_NAME["Q6_K"]
    first, second = random_rows(format, 3, 256, 1), random_rows(format, 5, 256, 2)
    streams = allocate(format, 8, 256)
    relayout(first, format, {n: s[:3] for n, s in streams.items()})
    relayout(second, format, {n: s[3:] for n, s in streams.items()})
    back = np.empty((8, format.type_size), np.uint8)
    restore(streams, format, back)
    np.testing.assert_array_equal(back, np.concatenate([first, second]))


def test_wrong_shapes_are_refused() -> None:
    format = BY_NAME["Q4_K"]
    with pytest.raises(ValueError, match="multiple of 256 weights, found 288"):
        stream_shapes(format, 1, 288)
    with pytest.raises(ValueError, match="Q8_K has no stream layout"):
        stream_shapes(BY_NAME["Q8_K"], 1, 256)
    with pytest.raises(ValueError, match="blocks of 144 bytes, found rows of 143 bytes"):
        relayout(np.zeros((2, 143), np.uint8), format, {})
    streams = allocate(format, 2, 256)
    streams["codes"] = streams["codes"][:1]
    with pytest.raises(ValueError, match=r"stream codes of Q4_K.*\(2, 32\).*\(1, 32\)"):
        relayout(np.zeros((2, 144), np.uint8), format, streams)
