"""Integer products of int8 activations: exact sums of groups, one order of adding them up."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import mlx.core as mx
import numpy as np
import pytest

from mlxfuse import codebooks
from mlxfuse.formats import BY_NAME
from mlxfuse.kernels.activations import GROUP, Int8Activations
from mlxfuse.kernels.matmul import int8_matmul as module
from mlxfuse.kernels.matmul.int8_matmul import unsupported
from mlxfuse.kernels.matmul.tile_program import ACTIVATIONS
from mlxfuse.kernels.runtime import kernel as _kernel
from mlxfuse.kernels.runtime import self_test
from mlxfuse.kernels.weight import AffineSegment, AnySegment, Part, QuantizedWeight
from tests import msl

from .. import variants
from ..flat import call_of, flat
from ..matmul_cases import activated
from ..matmul_cases import joined as joined_cases
from ..weights import expected, random_blocks, segment, to_float64

int8_matmul = flat(module.int8_matmul)

LEGACY = ("Q4_0", "Q4_1", "Q5_0", "Q5_1")
OTHERS = ("Q8_0", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
TABLES = ("IQ4_NL", "IQ4_XS", "MXFP4")
GGUF = tuple(f.name for f in BY_NAME.values() if f.traits and f.traits.integers)
MIXED = ("Q4_0", "Q5_1", "Q6_K", "affine8g64")
AFFINE = tuple(f"affine{bits}g{group}" for bits in (4, 8) for group in (32, 64, 128))
AFFINE += ("affine2g64", "affine3g32", "affine5g64", "affine6g128")
# Largest error, of the sum of |x| |w| of an output: of float32 sums, then of one rounding.
EPS = {mx.float32: 2.0**-22, mx.float16: 2.0**-11, mx.bfloat16: 2.0**-8}


def quantized(x: np.ndarray, dtype: mx.Dtype = mx.float32) -> Int8Activations:
    """Groups of 32 as ggml's Q8_1 quantises them."""
    groups = x.astype(np.float32).reshape(*x.shape[:-1], x.shape[-1] // GROUP, GROUP)
    scales = np.abs(groups).max(-1) / np.float32(127)
    divided = groups / np.where(scales == 0, np.float32(1), scales)[..., None]
    codes = np.trunc(divided + np.copysign(np.float32(0.5), divided)).astype(np.int8)
    return of_codes(codes.reshape(x.shape), scales, dtype)


def of_codes(codes: np.ndarray, scales: np.ndarray, dtype: mx.Dtype) -> Int8Activations:
    total = codes.reshape(*scales.shape, GROUP).sum(-1, dtype=np.int32)
    sums = scales * total.astype(np.float32)
    return Int8Activations(mx.array(codes), mx.array(scales), mx.array(sums), dtype)


def random_x(*shape: int, dtype: mx.Dtype = mx.float32, seed: int = 0) -> Int8Activations:
    return quantized(np.random.default_rng(seed).standard_normal(shape), dtype)


def values(x: Int8Activations) -> np.ndarray:
    codes = np.array(x.codes).astype(np.float64)
    return codes * np.repeat(np.array(x.scales).astype(np.float64), GROUP, axis=-1)


def affine(name: str, rows: int, columns: int, *, ones: bool = False) -> AffineSegment:
    """Any codes; scales and biases as random numbers, or 1."""
    bits, group = (int(n) for n in name.removeprefix("affine").split("g"))
    rng = np.random.default_rng([bits, group, rows, columns])
    words = rng.integers(0, 1 << 32, (rows, columns * bits // 32), np.uint64).astype(np.uint32)
    shape = (rows, columns // group)
    scales, biases = (
        np.ones(shape) if ones else rng.uniform(-0.1, 0.1, shape) * factor for factor in (1, 8)
    )
    half = [mx.array(a.astype(np.float16)) for a in (scales, biases)]
    arrays = {"codes": mx.array(words), "scales": half[0], "supers": half[1]}
    return AffineSegment(bits, group, "affine", columns, arrays)


def affine_values(s: AffineSegment) -> np.ndarray:
    """float64, by the definition in MLX's documentation."""
    words, scales, biases = (np.array(s.arrays[n]) for n in ("codes", "scales", "supers"))
    bits = np.unpackbits(words.view(np.uint8), axis=-1, bitorder="little")
    codes = bits.reshape(s.rows, -1, s.bits) @ (1 << np.arange(s.bits))
    scales, biases = (np.repeat(a.astype(np.float64), s.group_size, -1) for a in (scales, biases))
    return codes * scales + biases


def made(
    name: str, rows: int, columns: int, *, ones: bool = False
) -> tuple[AnySegment, np.ndarray]:
    """A segment and its weights in float64; with ``ones`` all of them are integers."""
    if name in AFFINE:
        s = affine(name, rows, columns, ones=ones)
        return s, affine_values(s)
    fmt = BY_NAME[name]
    data = random_blocks(fmt, rows, columns, seed=columns)
    if ones:
        blocks = data.reshape(-1, fmt.type_size)
        blocks[: len(blocks) // 8 * 2] = np.repeat([[0], [255]], len(blocks) // 8, 0)
        one = 8 if fmt.traits.grid in codebooks.SHAPES else 1  # whose scales are eighths
        for at in fmt.float16:
            blocks[:, at : at + 2] = np.array([one], np.float16).view(np.uint8)
        if name == "IQ1_M":  # the same, 4 bits above each word of scales
            for at, bits in ((49, 0x00), (51, 0x00), (53, 0x80), (55, 0x40)):
                blocks[:, at] = blocks[:, at] & 15 | bits
        for at in fmt.exponents:
            blocks[:, at] = 128  # 2^1, of values that are multiples of a half
    return segment(data, fmt), expected(data, fmt).astype(np.float64)


def joined(
    names: tuple[str, ...], rows: tuple[int, ...], columns: int
) -> tuple[QuantizedWeight, list[np.ndarray]]:
    found = joined_cases(names, rows, columns)
    return found.weight, [w.astype(np.float64) for w in found.parts]


def assert_close(got: mx.array, x: Int8Activations, w: np.ndarray) -> None:
    x64, y = values(x), to_float64(got)
    want = x64 @ w.T
    assert (got.dtype, y.shape) == (x.dtype, want.shape)
    bound = EPS[x.dtype] * (np.abs(x64) @ np.abs(w).T) + 2.0**-30
    assert np.all(np.abs(y - want) <= bound)
    if x.dtype == mx.float32 and y.size > 1:  # a single sum may be next to nothing
        assert np.sum((y - want) ** 2) <= 1e-12 * np.sum(want**2)


def group_sums(weight: QuantizedWeight, codes: np.ndarray, rows: int) -> np.ndarray:
    """Each part's int8_matmul with a scale of 1 for one group and 0 for the others, ``rows`` rows
    of x at a time: ``[groups, N]`` of what a single group adds to the result."""
    groups = codes.size // GROUP
    found = []
    for at in range(0, groups, rows):
        chosen = np.arange(at, at + rows) % groups
        scales = np.eye(groups, dtype=np.float32)[chosen]
        x = of_codes(np.tile(codes, (rows, 1)), scales, mx.float32)
        found.append(to_float64(mx.concatenate(int8_matmul(x, weight, split=True), -1)))
    return np.concatenate(found)[:groups]


@pytest.mark.parametrize(
    ("names", "m"), [(LEGACY, 1), (OTHERS, 3), (AFFINE[1:5], 1), (TABLES, 1), (MIXED, 40)], ids=str
)
def test_sums_of_groups_are_the_integers(names: tuple[str, ...], m: int, kernels: str) -> None:
    """With scales of 1 a float32 result is the int32 sum, below 2^24, and nothing else."""
    check_sums(names, m)


@pytest.mark.slow
@pytest.mark.parametrize("m", [1, 3, 8, 40])
@pytest.mark.parametrize("name", [*GGUF, *AFFINE])
def test_sums_of_every_format(name: str, m: int, kernels: str) -> None:
    check_sums((name,), m)


def check_sums(names: tuple[str, ...], m: int) -> None:
    parts = [made(name, 19, 256, ones=True) for name in names]
    weight = QuantizedWeight(tuple(Part(s, 0, 19) for s, _ in parts))
    w = np.concatenate([w for _, w in parts])
    assert np.array_equal(w, np.rint(w))
    random = np.random.default_rng(0).integers(-127, 128, 256)
    for codes in (random, np.full(256, 127), np.full(256, -127)):
        products = codes.astype(np.int64) * w.astype(np.int64)
        want = products.reshape(len(w), -1, GROUP).sum(-1).T
        assert np.abs(want).max() < 1 << 24
        assert np.array_equal(group_sums(weight, codes.astype(np.int8), m), want)


@pytest.fixture
def broken(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The kernel with one text in the place of another."""
    right, wrong = request.param
    whole = _kernel.header

    def header(parts: tuple[str, ...]) -> str:
        assert right in whole(parts)
        return whole(parts).replace(right, wrong)

    monkeypatch.setenv("MLXFUSE_KERNELS", "emulated")
    monkeypatch.setattr(_kernel, "header", header)
    _kernel._compiled.cache_clear()
    with msl.installed(build="fast"):
        yield
    _kernel._compiled.cache_clear()


@pytest.mark.usefixtures("broken")
@pytest.mark.parametrize("broken", [("products.w", "0")], indirect=True, ids=["3 of 4 codes"])
@pytest.mark.parametrize("m", [3, 40])
def test_wrong_sums_are_seen(m: int) -> None:
    with pytest.raises(AssertionError):
        check_sums(("Q4_0",), m)


@pytest.mark.parametrize("name", [*GGUF, *AFFINE])
def test_the_reference(name: str) -> None:
    """Exact sums, and products of any scales, by MLX's operations."""
    check_sums((name,), 8)
    weight, w = made(name, 21, 512)
    for x in (random_x(5, 512, dtype=dtype) for dtype in EPS):
        assert_close(int8_matmul(x, QuantizedWeight.whole(weight))[0], x, w)


def test_the_reference_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, w = made("Q4_K", 21, 512)
    x = random_x(7, 512)
    whole = int8_matmul(x, QuantizedWeight.whole(weight))[0]
    monkeypatch.setattr(module, "_CHUNK", 3 * 21 * 16)
    assert mx.array_equal(int8_matmul(x, QuantizedWeight.whole(weight))[0], whole)
    assert_close(whole, x, w)


SHAPES = [
    ("Q4_0", (32, 96, 576, 2880)),
    ("Q6_K", (256, 768, 4096)),
    ("affine8g32", (32, 96, 4096)),
]


@pytest.mark.parametrize(("name", "columns"), SHAPES, ids=[s[0] for s in SHAPES])
def test_shapes(name: str, columns: tuple[int, ...], kernels: str) -> None:
    before = _kernel.launches["int8_matmul"]
    for i, k in enumerate(columns):
        for m, n in zip((1, 9, 40), ((70, 1, 7), (1, 7, 70), (7, 70, 1))[i % 3], strict=True):
            weight, w = made(name, n, k)
            x = random_x(m, k, seed=m)
            assert_close(int8_matmul(x, QuantizedWeight.whole(weight))[0], x, w)
    assert _kernel.launches["int8_matmul"] - before == 3 * len(columns)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*GGUF, *AFFINE])
def test_the_full_product(name: str, kernels: str) -> None:
    """Every format, K, N and M, the types of the result in turn."""
    block = BY_NAME[name].block_size if name in GGUF else int(name.split("g")[1])
    dtypes = itertools.cycle(EPS)
    for k in (k for k in (32, 96, 256, 576, 768, 2880, 4096) if k % block == 0):
        weight, w = made(name, 300, k)
        for n in (1, 7, 300 if k < 1024 else 70):
            whole = QuantizedWeight((Part(weight, 0, n),))
            for m in (*range(1, 10), 32, 40):
                x = random_x(m, k, dtype=next(dtypes), seed=m)
                assert_close(int8_matmul(x, whole)[0], x, w[:n])


def test_a_wrong_scale_is_seen() -> None:
    weight, w = made("Q6_K", 64, 512)
    x = random_x(2, 512)
    w[40, :256] *= 1.001  # one block of 128
    with pytest.raises(AssertionError):
        assert_close(int8_matmul(x, QuantizedWeight.whole(weight))[0], x, w)


def test_results_do_not_depend_on_the_other_rows(kernels: str) -> None:
    """1 to 12 rows of x, alone and together, in one dispatch for q, k and v and in three."""
    weight, w = joined(("Q4_K", "Q4_K", "Q6_K"), (13, 8, 7), 2304)
    x = random_x(12, 2304)
    want = check_rows(weight, x, (*range(1, 9), 12) if kernels != "checked" else (1, 5))
    for got, decoded in zip(want, w, strict=True):
        assert_close(got, x, decoded)
    for m in (1, 5):
        for alone, one in zip(weight.split(), want, strict=True):
            assert mx.array_equal(int8_matmul(rows_of(x, 0, m), alone)[0], one[:m])


def rows_of(x: Int8Activations, start: int, stop: int) -> Int8Activations:
    return Int8Activations(*(a[start:stop] for a in (x.codes, x.scales, x.sums)), x.dtype)


def check_rows(
    weight: QuantizedWeight, x: Int8Activations, lengths: tuple[int, ...]
) -> list[mx.array]:
    """The outputs of all rows one by one; the first rows at once must be the same."""
    rows = x.shape[0]
    single = [int8_matmul(rows_of(x, i, i + 1), weight, split=True) for i in range(rows)]
    want = [mx.concatenate(parts) for parts in zip(*single, strict=True)]
    for m in lengths:
        for got, one in zip(int8_matmul(rows_of(x, 0, m), weight, split=True), want, strict=True):
            assert mx.array_equal(got, one[:m])
    return want


@pytest.mark.usefixtures("broken")
@pytest.mark.parametrize(
    "broken", [("g=lane;", "g=many>1?lane^lane>>1:lane;")], indirect=True, ids=["order"]
)
def test_an_order_of_its_own_is_seen() -> None:
    weight, _ = joined(("Q4_K",), (13,), 2304)
    with pytest.raises(AssertionError):
        check_rows(weight, random_x(3, 2304), (3,))


@pytest.mark.parametrize("m", [1, 3])
def test_gate_and_up_fused_and_alone(m: int, kernels: str) -> None:
    weight, _ = joined(("Q4_1", "Q4_1"), (13, 13), 1152)
    x = random_x(m, 1152)
    outputs = int8_matmul(x, weight, split=True)
    assert mx.array_equal(int8_matmul(x, weight)[0], mx.concatenate(outputs, axis=-1))
    for got, alone in zip(outputs, weight.split(), strict=True):
        assert mx.array_equal(got, int8_matmul(x, alone)[0])


@pytest.mark.parametrize("m", [1, 3, 40])
@pytest.mark.parametrize(("activation", "dtype"), [("swiglu", mx.float16), ("relu2", mx.bfloat16)])
def test_epilogues(activation: str, dtype: mx.Dtype, m: int, kernels: str) -> None:
    check_epilogue(activation, dtype, m)


def check_epilogue(activation: str | None, dtype: mx.Dtype, m: int) -> None:
    weight, w = joined(("Q4_1", "Q4_1"), (45, 45), 256)
    rng = np.random.default_rng(1)
    x = quantized(rng.standard_normal((m, 256)) * 0.02, dtype)
    bias = mx.array(rng.standard_normal(90).astype(np.float32)).astype(dtype)
    products = [
        values(x) @ v.T + b for v, b in zip(w, to_float64(bias).reshape(2, 45), strict=True)
    ]
    want = np.concatenate(activated(activation, products), -1)
    residual = mx.array(rng.standard_normal(want.shape).astype(np.float32)).astype(dtype)
    want = want + to_float64(residual)
    (got,) = int8_matmul(x, weight, bias=bias, residual=residual, activation=activation)
    assert got.dtype == dtype
    bound = {mx.float32: 1e-12, mx.float16: 1e-6, mx.bfloat16: 1e-5}[dtype]
    assert np.sum((to_float64(got) - want) ** 2) <= bound * np.sum(want**2)


@pytest.mark.slow
@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
def test_every_epilogue(activation: str | None, kernels: str) -> None:
    for m in (1, 3, 40):
        for dtype in EPS:
            check_epilogue(activation, dtype, m)


def test_leading_dimensions_zeros_and_no_rows(kernels: str) -> None:
    weight, w = made("Q4_0", 7, 96)
    whole = QuantizedWeight.whole(weight)
    x = quantized(np.random.default_rng(0).standard_normal((2, 3, 96)) * [[[1], [0], [1]]])
    (got,) = int8_matmul(x, whole)
    assert got.shape == (2, 3, 7)
    assert mx.array_equal(got[:, 1], mx.zeros((2, 7)))
    flat = Int8Activations(*(a.flatten(0, 1) for a in (x.codes, x.scales, x.sums)), mx.float32)
    assert_close(got.reshape(6, 7), flat, w)
    if kernels != "metal":
        before = _kernel.fallbacks.total()
        assert int8_matmul(random_x(2, 0, 96), whole)[0].shape == (2, 0, 7)
        assert _kernel.fallbacks.total() == before + 1


def test_it_means_the_product_of_the_activations() -> None:
    x = np.random.default_rng(3).standard_normal((4, 1024)).astype(np.float32)
    weight, w = made("Q4_K", 64, 1024)
    got = to_float64(int8_matmul(quantized(x), QuantizedWeight.whole(weight))[0])
    want = x.astype(np.float64) @ w.T
    error = np.sum((got - want) ** 2) / np.sum(want**2)
    assert 1e-6 < error < 1e-4  # activations rounded to 8 bits


def of_expert(weight: QuantizedWeight, expert: int) -> QuantizedWeight:
    """One expert's matrices, dense."""
    taken = {id(s): s.take(expert) for s in weight.segments}
    return QuantizedWeight(tuple(Part(taken[id(p.segment)], p.first, p.rows) for p in weight.parts))


@pytest.mark.parametrize(
    ("names", "grouped", "activation"),
    [(("Q4_1", "Q4_1"), True, "swiglu"), (("affine8g64",), False, None), (("Q6_K",), True, None)],
    ids=str,
)
def test_experts_have_the_bits_of_the_dense_products(
    names: tuple[str, ...], grouped: bool, activation: str | None, kernels: str
) -> None:
    check_experts(names, grouped, activation)


def check_experts(names: tuple[str, ...], grouped: bool, activation: str | None) -> None:
    """x has a row for each group of ids, or one for each id; 11 rows are no multiple of 4."""
    weight = joined_cases(names, (11,) * len(names), 512, mx.float32, 4).weight
    ids = mx.array([[3, 0], [1, 1], [2, 3]], mx.uint32)
    x = random_x(3, 512) if grouped else random_x(3, 2, 512)
    before = _kernel.launches["int8_matmul"]
    (got,) = int8_matmul(x, weight, activation=activation, experts=ids)
    ran = _kernel.launches["int8_matmul"] - before
    assert got.shape == (3, 2, 11)
    for i, j in np.ndindex(3, 2):
        row = (i,) if grouped else (i, j)
        one = Int8Activations(*(a[row][None] for a in (x.codes, x.scales, x.sums)), x.dtype)
        own = of_expert(weight, ids[i, j].item())
        (want,) = int8_matmul(one, own, activation=activation)
        assert mx.array_equal(got[i, j], want[0])
    assert ran == 1


@pytest.mark.usefixtures("broken")
@pytest.mark.parametrize(
    "broken", [("/size->outputs", "%size->outputs")], indirect=True, ids=["row"]
)
def test_an_experts_wrong_row_is_seen() -> None:
    with pytest.raises(AssertionError):
        check_experts(("Q4_1", "Q4_1"), True, "swiglu")


def test_the_reference_of_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLXFUSE_KERNELS", "reference")
    found = joined_cases(("Q4_K", "Q6_K"), (9, 7), 256, mx.float32, 3)
    ids, x = mx.array([2, 0, 2, 1]), random_x(2, 256)
    got = int8_matmul(x, found.weight, split=True, experts=ids.reshape(2, 2))
    for y, w in zip(got, found.parts, strict=True):
        for n, i in enumerate(ids.tolist()):
            assert_close(
                y.reshape(4, -1)[n, None], rows_of(x, n // 2, n // 2 + 1), w[i].astype(float)
            )


def test_experts_of_no_rows_give_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLXFUSE_KERNELS", "emulated")
    weight = joined_cases(("Q4_0", "Q4_0"), (9, 9), 256, mx.float32, 3).weight
    ids = mx.zeros((2, 0, 2), mx.uint32)
    (got,) = int8_matmul(random_x(2, 0, 256), weight, activation="swiglu", experts=ids)
    assert got.shape == (2, 0, 2, 9)


def test_only_the_chosen_experts_are_read() -> None:
    """Every byte of the matrices of 3 of 8 experts once, and none of the others'."""
    experts, rows, columns = 8, 64, 512
    whole = QuantizedWeight.whole(variants.segment("Q4_0", experts * rows, columns, experts))
    x = random_x(1, columns, dtype=mx.float16)
    ids = mx.array([[6, 1, 3]], mx.uint32)
    with msl.installed(), msl.counting() as found:
        _kernel.run(module.KERNEL.launch(call_of(x, whole, experts=ids)))
    (counts,) = found
    codes, scales = (counts.buffers[n] for n in ("codes0", "scales0"))
    assert codes.distinct_read + scales.distinct_read == whole.nbytes * len(ids[0]) // experts
    assert codes.times_read == 1.0


@pytest.mark.parametrize(("name", "m"), [("Q4_0", 8), ("Q4_K", 1), ("Q6_K", 1)])
def test_traffic(name: str, m: int) -> None:
    """Weights once; codes, scales and sums of x once for each SIMD-group's rows of W."""
    rows, columns = 256, 2048
    whole = QuantizedWeight.whole(variants.segment(name, rows, columns))
    x = random_x(m, columns, dtype=mx.float16)
    launch = module.KERNEL.launch(call_of(x, whole))
    with msl.installed(), msl.counting() as found:
        _kernel.run(launch)
    (counts,) = found
    buffers = counts.buffers
    inputs = {"x": x.codes, "x_scales": x.scales}
    if name == "Q4_K":
        inputs["x_sums"] = x.sums
    assert {n for n in buffers if n.startswith("x")} == set(inputs)
    for n, a in inputs.items():
        assert buffers[n].distinct_read == a.nbytes
        assert buffers[n].times_read == rows / 2
    streams = [t for n, t in buffers.items() if n.startswith(("codes", "high"))]
    assert {t.times_read for t in streams} == {1.0}
    scales = [t for n, t in buffers.items() if n.startswith(("scales", "supers"))]
    assert {t.times_fetched for t in scales} == {1.0}
    least = whole.nbytes + sum(a.nbytes for a in inputs.values()) + m * rows * 2
    assert 1.0 <= counts.distinct_bytes / least <= 1.001


def test_what_is_not_for_integers() -> None:
    taken = [*GGUF, *AFFINE]
    assert {unsupported(QuantizedWeight.whole(made(n, 4, 256)[0])) for n in taken} == {None}
    for name in ("Q2_K", "mlx mxfp4"):
        weight = QuantizedWeight.whole(variants.segment(name, 4, 256))
        found = name.removeprefix("mlx ")
        assert unsupported(weight) == f"int8 activations: {found} is no scale times small integers"
        with pytest.raises(ValueError, match=f"{found} is no scale times"):
            int8_matmul(random_x(1, 256), weight)


def test_shapes_that_do_not_fit_are_refused() -> None:
    weight, _ = joined(("Q4_0", "Q4_0"), (6, 8), 64)
    with pytest.raises(ValueError, match=r"x: expected \[\.\.\., 64\], found \(2, 32\)"):
        int8_matmul(random_x(2, 32), weight)
    with pytest.raises(ValueError, match=r"gate and up of equal rows, found \[6, 8\]"):
        int8_matmul(random_x(2, 64), weight, activation="swiglu")
    with pytest.raises(ValueError, match=r"residual: expected \(2, 14\)"):
        int8_matmul(random_x(2, 64), weight, residual=mx.zeros((2, 6)))


def test_self_test(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLXFUSE_CACHE", str(tmp_path))
    weight, _ = joined(("Q4_0", "Q4_0"), (40, 40), 64)
    call = call_of(random_x(3, 64), weight, activation="swiglu")
    with msl.installed(build="fast"):
        assert self_test.check([(module.KERNEL, (call,))], emulated=True) == {}


@pytest.mark.parametrize("names", [("Q4_0", "Q4_1"), ("Q4_1", "Q8_0"), ("Q6_K", "affine8g64")])
@pytest.mark.parametrize("rows", [3, 40])
def test_gate_and_up_of_different_formats(names: tuple[str, str], rows: int) -> None:
    """With and without biases, one row at a time and in tiles."""
    parts = [made(name, 19, 256) for name in names]
    weight = QuantizedWeight(tuple(Part(s, 0, 19) for s, _ in parts))
    x = random_x(rows, 256)
    with pytest.MonkeyPatch.context() as patch, msl.installed(build="fast"):
        patch.setenv("MLXFUSE_KERNELS", "emulated")
        before = _kernel.launches["int8_matmul"]
        (got,) = int8_matmul(x, weight, activation="swiglu")
        assert _kernel.launches["int8_matmul"] == before + 1
    gate, up = (values(x) @ w.T for _, w in parts)
    want = gate / (1 + np.exp(-gate)) * up
    assert np.abs(to_float64(got) - want).max() < 1e-5 * np.abs(want).max()
