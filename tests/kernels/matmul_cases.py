"""Cases for the quantised matmul, what they must give in float64, and how results are judged."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlxfuse.formats import BY_NAME
from mlxfuse.kernels.weight import AffineSegment, AnySegment, Part, QuantizedWeight

from .pairwise import Case, covering
from .weights import WITH_KERNEL, expected, random_blocks, segment, to_float64

NMSE = {mx.float32: 1e-10, mx.float16: 1e-6, mx.bfloat16: 1e-5}
EPS = {mx.float32: 2.0**-23, mx.float16: 2.0**-10, mx.bfloat16: 2.0**-7}
M = (1, 2, 3, 5, 8, 9, 40)
N = (1, 7, 300, 4099)
K = (32, 96, 256, 576, 768, 2880, 4096)

AFFINE = {f"affine{b}g{g}": (b, g, "affine") for b in (4, 8) for g in (32, 64, 128)}
AFFINE |= {"mxfp4": (4, 32, "mxfp4"), "mxfp8": (8, 32, "mxfp8"), "nvfp4": (4, 16, "nvfp4")}
RARE = {"affine2g32": 2, "affine3g64": 3, "affine5g128": 5, "affine6g64": 6}
AFFINE |= {n: (bits, int(n.partition("g")[2]), "affine") for n, bits in RARE.items()}

LATER = ("F32", "F16", "BF16", "NVFP4", "Q1_0", "Q2_0", "TQ1_0", "TQ2_0")
FEWER = [f.name for f in WITH_KERNEL if f.name[:3] in ("IQ1", "IQ2", "IQ3") or f.name in LATER]
FEWER += [*RARE, "mxfp8", "nvfp4"]
FEWER_VALUES = {"m": (1, 5, 40), "n": (7, 300), "activation": (None, "swiglu")}

GATED = {"swiglu": "silu", "geglu": "gelu", "geglu_tanh": "gelu_tanh", "swiglu_clipped": None}
FACTORS = {
    "format": (*(f.name for f in WITH_KERNEL), "affine4g64", "affine8g32", "mxfp4", *FEWER[-6:]),
    "dtype": tuple(NMSE),
    "m": M,
    "n": N,
    "k": K,
    "activation": (None, "silu", "gelu", "gelu_tanh", "relu2", *GATED),
    "bias": (False, True),
    "residual": (False, True),
    "layout": ("alone", "mixed", "split", "experts"),
}


def block_size(name: str) -> int:
    """What K is a multiple of."""
    return max(AFFINE[name][1], 32) if name in AFFINE else max(BY_NAME[name].block_size, 32)


def allowed(case: Case) -> bool:
    """Whether some of a case's values can go together; see `FACTORS`."""
    name = case.get("format")
    if name is not None and case.get("k", 0) % block_size(name):
        return False
    # What all formats have in common is tried with the others.
    if name in FEWER and any(case.get(f, v[0]) not in v for f, v in FEWER_VALUES.items()):
        return False
    if case.get("layout") == "split" and (case.get("residual") or case.get("activation") in GATED):
        return False
    # MLX's CPU sums float16 in float16.
    return not by_mlx(case) or case.get("dtype", mx.float32) == mx.float32


def by_mlx(case: Case) -> bool:
    """Whether there are so many rows of weights that all are MLX's that it multiplies them."""
    return case.get("format") in AFFINE and case.get("m", 0) > 8 and case.get("layout") == "alone"


def cases() -> list[Case]:
    """Every pair of the values of two `FACTORS` that may meet."""
    gates = 2
    return covering(
        FACTORS,
        allowed,
        lambda c: c["m"] * c["n"] * c["k"] * (gates if c["activation"] in GATED else 1),
    )


def random_x(rows: int, columns: int, dtype: mx.Dtype, seed: int = 0) -> mx.array:
    rng = np.random.default_rng(seed)
    return mx.array(rng.standard_normal((rows, columns)).astype(np.float32)).astype(dtype)


@dataclass(frozen=True)
class Made:
    """A weight and the numbers in it: of each part float32 ``[rows, K]``, or of each expert."""

    weight: QuantizedWeight
    parts: list[np.ndarray]


def matrix(
    name: str,
    rows: int,
    columns: int,
    dtype: mx.Dtype = mx.float16,
    experts: int | None = None,
    seed: int = 0,
) -> tuple[AnySegment, np.ndarray]:
    """Random rows of a format, ``dtype`` being that of an affine weight's scales."""
    lead = (rows,) if experts is None else (experts, rows)
    if name not in AFFINE:
        format = BY_NAME[name]
        data = random_blocks(format, math.prod(lead), columns, seed)
        found = expected(data, format).reshape(*lead, columns)
        return segment(data, format, experts), found
    bits, group, mode = AFFINE[name]
    source = random_x(math.prod(lead), columns, dtype, seed).reshape(*lead, columns)
    packed = mx.quantize(source, group_size=group, bits=bits, mode=mode)
    exact = [a if a.dtype in (mx.uint8, mx.uint32) else a.astype(mx.float32) for a in packed]
    w = mx.dequantize(*exact, group_size=group, bits=bits, mode=mode).astype(mx.float32)
    arrays = dict(zip(("codes", "scales", "supers"), packed, strict=False))
    return AffineSegment(bits, group, mode, columns, arrays), np.array(w)


def joined(
    names: Sequence[str],
    rows: Sequence[int],
    columns: int,
    dtype: mx.Dtype = mx.float16,
    experts: int | None = None,
) -> Made:
    """Parts of the given formats, those of one format in one segment."""
    parts: dict[int, tuple[Part, np.ndarray]] = {}
    for seed, name in enumerate(dict.fromkeys(names)):
        mine = [i for i, n in enumerate(names) if n == name]
        whole, w = matrix(name, sum(rows[i] for i in mine), columns, dtype, experts, seed)
        first = 0
        for i in mine:
            parts[i] = Part(whole, first, rows[i]), w[..., first : first + rows[i], :]
            first += rows[i]
    made = [parts[i] for i in sorted(parts)]
    return Made(QuantizedWeight(tuple(part for part, _ in made)), [w for _, w in made])


def made(case: Case) -> Made:
    """The weight of a case: n rows of its format, and what the layout adds."""
    name, n, k = case["format"], case["n"], case["k"]
    other = "Q4_0" if name == "Q8_0" else "Q8_0"
    gated = case["activation"] in GATED
    experts = 2 if case["layout"] == "experts" else None
    names, rows = {
        "alone": ((name,), (n,)),
        "mixed": ((name, other), (n, n if gated else 5)),
        "split": ((name, other, name), (n, 9, 2)),
        "experts": ((name,), (n,)),
    }[case["layout"]]
    if gated and len(names) == 1:
        names, rows = names * 2, rows * 2
    return joined(names, rows, k, case["dtype"], experts)


def sums(x: mx.array, parts: Sequence[np.ndarray], ids: mx.array | None = None) -> list[np.ndarray]:
    """Products in float64, ``[rows, n]`` of each part."""
    flat = to_float64(x).reshape(-1, x.shape[-1])
    return [product(flat, w.astype(np.float64), ids) for w in parts]


def magnitudes(
    x: mx.array, parts: Sequence[np.ndarray], ids: mx.array | None = None
) -> list[np.ndarray]:
    """Sums of the absolute values of what `sums` adds up."""
    flat = np.abs(to_float64(x)).reshape(-1, x.shape[-1])
    return [product(flat, np.abs(w).astype(np.float64), ids) for w in parts]


def product(x: np.ndarray, w: np.ndarray, ids: mx.array | None) -> np.ndarray:
    if ids is None:
        return x @ w.T
    chosen = np.array(ids).reshape(-1)
    rows = np.repeat(x, len(chosen) // len(x), axis=0)
    return np.stack([w[e] @ row for e, row in zip(chosen, rows, strict=True)])


_ERF = np.vectorize(math.erf, otypes=[np.float64])
# By their definitions.
ACTIVATE: dict[str | None, Callable[[np.ndarray], np.ndarray]] = {
    None: lambda v: v,
    "silu": lambda v: v / (1 + np.exp(-v)),
    "gelu": lambda v: 0.5 * v * (1 + _ERF(v / math.sqrt(2))),
    "gelu_tanh": lambda v: 0.5 * v * (1 + np.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3))),
    "relu2": lambda v: np.maximum(v, 0) ** 2,
}


def activated(name: str | None, parts: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The activation of each part, or of gate and up together."""
    if name in GATED:
        gate, up = parts
        if name == "swiglu_clipped":
            gate, up = np.minimum(gate, 7), np.clip(up, -7, 7)
            return [(up + 1) * gate / (1 + np.exp(-1.702 * gate))]
        return [ACTIVATE[GATED[name]](gate) * up]
    return [ACTIVATE[name](v) for v in parts]


def spread(
    name: str | None,
    parts: Sequence[np.ndarray],
    errors: Sequence[np.ndarray],
    erf: float = 1.5e-7,
) -> list[np.ndarray]:
    """How far `activated` may be off where each part may be off by its error.

    So is erf: the kernel's by 1.5e-7 (Abramowitz and Stegun 7.1.26), MLX's by 5e-7.
    """
    here = activated(name, parts)
    most = [np.zeros_like(y) for y in here]
    for signs in itertools.product((-1, 1), repeat=2):
        moved = [v + s * e for v, e, s in zip(parts, errors, itertools.cycle(signs), strict=False)]
        for i, y in enumerate(activated(name, moved)):
            most[i] = np.maximum(most[i], np.abs(y - here[i]))
    if name == "gelu":
        most = [e + 0.5 * erf * np.abs(v) for e, v in zip(most, parts, strict=True)]
    if name == "geglu":
        most = [most[0] + 0.5 * erf * np.abs(parts[0] * parts[1])]
    return most


def assert_close(got: mx.array, want: np.ndarray, bound: np.ndarray, dtype: mx.Dtype) -> None:
    """By NMSE, or of few columns each result by its bound."""
    assert got.dtype == dtype
    y = to_float64(got).reshape(-1, got.shape[-1])
    assert y.shape == want.shape
    if want.shape[1] < 32:
        assert np.all(np.abs(y - want) <= bound)
    else:
        assert np.sum((y - want) ** 2) <= NMSE[dtype] * np.sum(want**2)


def assert_product(got: mx.array, x: mx.array, w: np.ndarray, ids: mx.array | None = None) -> None:
    """Judge ``x @ w.T``; the bound of one result is 4 eps times the sum of absolute products."""
    (want,), (size,) = sums(x, [w], ids), magnitudes(x, [w], ids)
    assert_close(got, want, 4 * EPS[x.dtype] * size, x.dtype)
