"""Dequantisation against gguf-py and libgguf (and llama.cpp's goldens), bit for bit."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gguf
import gguf.quants
import libgguf
import numpy as np
import pytest

from mlxfuse import codebooks
from mlxfuse.errors import UnsupportedError
from mlxfuse.formats import BY_NAME, FORMATS, Format
from mlxfuse.gguf.blocks import can_dequantize, dequantize

GOLDENS = np.load(Path(__file__).with_name("block_goldens.npz"))

# Which oracles decode each type; Q2_0 and Q8_K have llama.cpp's goldens only.
GGUF_PY = {
    *("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"),
    *("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "TQ1_0", "TQ2_0", "MXFP4", "NVFP4"),
    *("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS"),
}
LIBGGUF = GGUF_PY - {"F32", "F16", "BF16"} | {"Q1_0"}
COMPARED = sorted(GGUF_PY | LIBGGUF)
BLOCKS = [name for name in COMPARED if BY_NAME[name].quantized]

# Byte offsets of the float16 scales; IQ1_M's is spread over four nibbles.
FLOAT16_AT = {
    **dict.fromkeys(("Q4_0", "Q5_0", "Q8_0", "IQ4_NL", "Q1_0", "Q2_0"), (0,)),
    **dict.fromkeys(("Q4_1", "Q5_1", "Q4_K", "Q5_K"), (0, 2)),
    **dict.fromkeys(("IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ1_S", "IQ4_XS"), (0,)),
    **{"Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,), "TQ1_0": (52,), "TQ2_0": (64,)},
}
# 0, -0, 1, -1.5, the least and greatest subnormals and normals, infinities, NaNs.
EDGE_FLOAT16 = np.array(
    [
        *(0, 0x8000, 0x3C00, 0xBE00, 1, 0x8001, 0x03FF, 0x83FF),
        *(0x0400, 0x7BFF, 0xFBFF, 0x7C00, 0xFC00, 0x7E00, 0xFE00, 0x7D01),
    ],
    np.uint16,
)


def assert_same_bits(actual: np.ndarray, expected: np.ndarray) -> None:
    """Equal bit patterns; a NaN equals any NaN (the two oracles differ in its sign)."""
    assert actual.dtype == expected.dtype == np.float32
    assert actual.shape == expected.shape
    assert np.array_equal(np.isnan(actual), np.isnan(expected))
    different = (actual.view(np.uint32) != expected.view(np.uint32)) & ~np.isnan(actual)
    first = np.argwhere(different)[:1]
    assert not different.any(), f"{different.sum()} differ, first at {first}"


def oracles(data: np.ndarray, format: Format) -> list[np.ndarray]:
    """What each oracle decodes from rows of blocks."""
    with np.errstate(all="ignore"):
        found = []
        if format.name in GGUF_PY:
            found.append(gguf.quants.dequantize(data, gguf.GGMLQuantizationType(format.id)))
        if format.name in LIBGGUF:
            found.append(libgguf.dequantize_rows(data, format.id))
    assert found
    return found


def random_rows(format: Format, rows: int, blocks: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng([seed, format.id])
    return rng.integers(0, 256, (rows, blocks * format.type_size), dtype=np.uint8)


def decode(data: np.ndarray, format: Format) -> np.ndarray:
    return dequantize(
        data, format, (len(data), data.shape[1] // format.type_size * format.block_size)
    )


def edge_blocks(format: Format) -> np.ndarray:
    """Every edge scale with codes of all zeros, all ones and random bits."""
    size, name = format.type_size, format.name
    fills = [np.zeros(size, np.uint8), np.full(size, 255, np.uint8)]
    fills += list(random_rows(format, 2, 1, seed=1))
    blocks = []
    for fill in fills:
        if name in FLOAT16_AT:
            for at in FLOAT16_AT[name]:
                for value in EDGE_FLOAT16:
                    block = fill.copy()
                    block[at : at + 2] = np.frombuffer(value.tobytes(), np.uint8)
                    blocks.append(block)
        elif name == "IQ1_M":
            for value in EDGE_FLOAT16:
                block = fill.copy()
                for i in range(4):
                    block[49 + 2 * i] = block[49 + 2 * i] & 15 | (int(value) >> 4 * i & 15) << 4
                blocks.append(block)
        else:  # one-byte scales: all of them
            scales = {"MXFP4": 1, "NVFP4": 4}[name]
            for value in range(256):
                block = fill.copy()
                block[:scales] = (value + 64 * np.arange(scales)) % 256
                blocks.append(block)
    return np.stack(blocks)


def test_every_type_but_the_activations_only_one_is_decoded() -> None:
    assert [f.name for f in FORMATS.values() if not can_dequantize(f)] == ["Q8_1"]
    with pytest.raises(UnsupportedError, match="Q8_1 is a type of intermediate activations"):
        dequantize(np.zeros(36, np.uint8), BY_NAME["Q8_1"], (32,))


@pytest.mark.parametrize("name", COMPARED)
def test_random_blocks_equal_the_oracles(name: str) -> None:
    format = BY_NAME[name]
    data = random_rows(format, 37, max(3, 384 // format.block_size))
    for expected in oracles(data, format):
        assert_same_bits(decode(data, format), expected)


@pytest.mark.parametrize("name", ["Q1_0", "Q2_0", "Q8_K"])
def test_blocks_equal_llama_cpp(name: str) -> None:
    assert_same_bits(decode(GOLDENS[name], BY_NAME[name]), GOLDENS[f"{name}.weights"])


@pytest.mark.parametrize("name", BLOCKS)
def test_edge_blocks_equal_the_oracles(name: str) -> None:
    format = BY_NAME[name]
    data = edge_blocks(format)
    for expected in oracles(data, format):
        assert_same_bits(decode(data, format), expected)


@pytest.mark.parametrize("name", ["Q4_1", "Q6_K", "IQ3_S", "F16"])
def test_tensors_of_several_chunks_equal_the_oracles(name: str) -> None:
    # 197,888 weights: three full chunks and a partial one.
    format = BY_NAME[name]
    data = random_rows(format, 773, 256 // format.block_size)
    for expected in oracles(data, format):
        assert_same_bits(decode(data, format), expected)


@pytest.mark.parametrize("name", ["F16", "BF16"])
def test_all_values_of_two_byte_floats(name: str) -> None:
    data = np.arange(1 << 16, dtype="<u2").view(np.uint8)[None]
    (expected,) = oracles(data, BY_NAME[name])
    assert_same_bits(decode(data, BY_NAME[name]), expected)


@pytest.mark.parametrize(
    ("name", "dtype", "values", "expected"),
    [
        ("I8", "<i1", [-128, -1, 0, 127], [-128, -1, 0, 127]),
        ("I16", "<i2", [-32768, 257, 0, 32767], [-32768, 257, 0, 32767]),
        # 2**24 + 1 and 2**24 + 3 are ties, which go to the even neighbour.
        ("I32", "<i4", [-(2**31), 2**24 + 1, 2**24 + 3], [-(2.0**31), 2.0**24, 2.0**24 + 4]),
        ("I64", "<i8", [-(2**63), 2**40 + 1, 7], [-(2.0**63), 2.0**40, 7]),
        ("F32", "<f4", [1e-45, -0.0, np.inf], [1e-45, -0.0, np.inf]),
        ("F64", "<f8", [1 + 2**-24, 1e300, -0.0, 1e-45], [1, np.inf, -0.0, 1e-45]),
    ],
)
def test_plain_values(name: str, dtype: str, values: list[float], expected: list[float]) -> None:
    data = np.array(values, dtype).view(np.uint8)[None]
    assert_same_bits(decode(data, BY_NAME[name]), np.array([expected], np.float32))


def test_a_q4_0_block_by_hand() -> None:
    # d = -0.5; byte j holds j in its low nibble (weight j) and 15 - j in its high one (j + 16).
    nibbles = np.arange(16)
    block = np.concatenate([np.array([-0.5], "<f2").view(np.uint8), nibbles | (15 - nibbles) << 4])
    expected = -0.5 * (np.concatenate([nibbles, 15 - nibbles]) - 8)
    actual = dequantize(block.astype(np.uint8), BY_NAME["Q4_0"], (32,))
    assert np.array_equal(actual, expected)


def test_a_q4_k_block_by_hand() -> None:
    # d = 2, dmin = 0.25; group g has scale g + 1 and minimum 60 - g, so the low six bits of both
    # halves of the packing and their two top bits are used.
    scales, minima = np.arange(1, 9), 60 - np.arange(8)
    packed = np.concatenate(
        [
            scales[:4] | scales[4:] >> 4 << 6,
            minima[:4] | minima[4:] >> 4 << 6,
            scales[4:] & 15 | (minima[4:] & 15) << 4,
        ]
    )
    codes = np.arange(256).reshape(8, 32) % 16
    qs = (codes[0::2] | codes[1::2] << 4).ravel()
    head = np.array([2, 0.25], "<f2").view(np.uint8)
    block = np.concatenate([head, packed, qs]).astype(np.uint8)
    expected = 2 * scales[:, None] * codes - 0.25 * minima[:, None]
    assert np.array_equal(dequantize(block, BY_NAME["Q4_K"], (256,)), expected.ravel())


@pytest.mark.parametrize("name", BLOCKS)
def test_the_comparison_sees_one_bit_of_a_scale(name: str) -> None:
    format = BY_NAME[name]
    data = np.tile(np.arange(format.type_size, dtype=np.uint8) + 33, (1, 2))
    changed = data.copy()
    # IQ1_M keeps its scale in the high nibbles of its last bytes; one-byte scales come first.
    at, bit = (55, 16) if name == "IQ1_M" else (FLOAT16_AT.get(name, (0,))[0], 1)
    changed[0, at] ^= bit
    for expected in oracles(data, format):
        assert_same_bits(decode(data, format), expected)
        with pytest.raises(AssertionError, match="differ"):
            assert_same_bits(decode(changed, format), expected)


@pytest.mark.parametrize(
    ("name", "codes"), [("Q4_1", 4), ("Q4_K", 16), ("IQ4_NL", 2), ("NVFP4", 4)]
)
def test_the_comparison_sees_swapped_nibbles(name: str, codes: int) -> None:
    format = BY_NAME[name]
    data = np.arange(format.type_size, dtype=np.uint8)[None] + np.uint8(33)
    swapped = data.copy()
    swapped[:, codes:] = swapped[:, codes:] >> 4 | swapped[:, codes:] << 4
    for expected in oracles(data, format):
        with pytest.raises(AssertionError, match="differ"):
            assert_same_bits(decode(swapped, format), expected)


def test_the_comparison_tells_zeros_and_one_ulp_apart() -> None:
    one = np.ones(4, np.float32)
    with pytest.raises(AssertionError, match="differ"):
        assert_same_bits(np.zeros(1, np.float32), -np.zeros(1, np.float32))
    with pytest.raises(AssertionError, match="1 differ, first at \\[\\[2\\]\\]"):
        assert_same_bits(np.where(np.arange(4) == 2, np.nextafter(one, 2), one), one)
    with pytest.raises(AssertionError):
        assert_same_bits(one, np.full(4, np.nan, np.float32))


def test_shapes() -> None:
    format = BY_NAME["Q5_K"]
    data = random_rows(format, 6, 2)
    data.flags.writeable = False
    (expected, _) = oracles(data, format)
    assert_same_bits(dequantize(data, format, (2, 3, 512)).reshape(6, 512), expected)
    rows = [dequantize(row, format, (512,)) for row in data]  # they are independent
    assert_same_bits(np.stack(rows), expected)
    # Data at an odd address, as views into a file are.
    odd = np.concatenate([np.zeros(1, np.uint8), data.ravel()])[1:]
    assert_same_bits(dequantize(odd, format, (6, 512)), expected)
    for shape in ((0, 512), (3, 0)):
        assert dequantize(np.empty(0, np.uint8), format, shape).shape == shape


@pytest.mark.parametrize(
    ("nbytes", "shape", "message"),
    [
        (17, (32,), r"Q4_0 tensor of shape \(32,\) takes 18 bytes; there are 17"),
        (36, (32,), "takes 18 bytes; there are 36"),
        (18, (31,), "rows of a multiple of 32 weights"),
        (18, (), "rows of a multiple of 32 weights"),
        (18, (-1, -32), "rows of a multiple of 32 weights"),
        (0, (2**40, 2**40), "takes .* bytes; there are 0"),
    ],
)
def test_sizes_that_do_not_agree(nbytes: int, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dequantize(np.zeros(nbytes, np.uint8), BY_NAME["Q4_0"], shape)


def test_arrays_that_do_not_agree() -> None:
    format, data = BY_NAME["Q4_0"], np.zeros((4, 18), np.uint8)
    for bad in (data.view(np.int8), data[:, ::-1]):
        with pytest.raises(ValueError, match="must be a C-contiguous uint8 array"):
            dequantize(bad, format, (4, 32))


@pytest.mark.parametrize("name", ["Q4_K", "IQ2_XXS", "F16"])
def test_scratch_does_not_grow_with_the_tensor(name: str) -> None:
    format = BY_NAME[name]
    rows, columns = 1024, 4096
    data = np.zeros((rows, format.row_bytes(columns)), np.uint8)
    dequantize(data[:1], format, (1, columns))  # tables that are made once
    tracemalloc.start()
    out = dequantize(data, format, (rows, columns))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < out.nbytes * 9 / 8


def test_threads_decode_what_the_oracles_do() -> None:
    # 2,662,400 weights: two full jobs and a partial one, each of several chunks.
    format = BY_NAME["Q4_0"]
    data = random_rows(format, 1300, 64)
    with ThreadPoolExecutor(4) as pool:
        out = dequantize(data, format, (1300, 2048), pool=pool)
    for expected in oracles(data, format):
        assert_same_bits(out, expected)


# SHA-256 of each grid as int8, so that a new gguf package cannot change what we decode.
GRIDS = {
    "IQ2_XXS": "05826b5d3e472a3a78f196be62ac78acf81df0f909626e12ab9fa2a5d490dd54",
    "IQ2_XS": "06e47aaca60b4dc1d9b5a3f34540437058a6b142b4d7a59d5ded769b4d1bf1de",
    "IQ2_S": "e1aa1473412b0552c2174c30ef22ab4073f6a181b85a17056e8249bd2932fd88",
    "IQ3_XXS": "46e35f5a997efdee6c99ce57854c8a0d4f0ff8ca57e5e8a60c0793ea580acf5d",
    "IQ3_S": "bd1af4945a1717c65610b0284e4628b9a1ba3b306fae3a06f6e5f597356e349f",
    "IQ1_S": "07540ffc1aeaf6ad4d97e96b0fcc765aae39671d4ae4a27bbd0e796fde167c6a",
}


@pytest.mark.parametrize("name", GRIDS)
def test_the_grids_are_the_known_ones(name: str) -> None:
    assert hashlib.sha256(codebooks.grid(name).tobytes()).hexdigest() == GRIDS[name]


def test_a_gguf_package_without_the_grids(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf.quants.IQ2_XXS, "grid", None)
    monkeypatch.setattr(gguf.quants.IQ2_XXS, "grid_hex", None)
    with pytest.raises(UnsupportedError, match=r"codebook of IQ2_XXS .* install gguf 0.19"):
        codebooks.grid.__wrapped__("IQ2_XXS")


def test_gguf_py_is_imported_for_iq_types_only() -> None:
    script = (
        "import sys, numpy as np\n"
        "from mlxfuse.formats import BY_NAME\n"
        "from mlxfuse.gguf.blocks import dequantize\n"
        "dequantize(np.zeros(144, np.uint8), BY_NAME['Q4_K'], (256,))\n"
        "assert not {'gguf', 'mlx', 'mlx.core', 'transformers'} & set(sys.modules)\n"
        "dequantize(np.zeros(66, np.uint8), BY_NAME['IQ2_XXS'], (256,))\n"
        "assert 'gguf' in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
