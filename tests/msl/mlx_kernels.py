"""MLX's own quantised kernels, from the headers in the installed wheel, run on the bench.

Sources are put together as MLX's JIT does (mlx/backend/metal/jit_kernels.cpp, quantized.cpp).
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from .build import DEFAULT_VERSION, Build, compile_kernel
from .emulate import to_numpy
from .run import Buffer, Report, Schedule, Size, launch
from .source import mlx_include

_KERNELS = "mlx/backend/metal/kernels/"
_QUANTIZED = ("quantized_utils.h", "steel/gemm/gemm.h", "quantized.h")
_INCLUDE = re.compile(r'^#include "(mlx/[^"]+)"\s*$', re.M)
_TYPES = {mx.float32: "float", mx.float16: "float16_t", mx.bfloat16: "bfloat16_t"}


def flat(header: str, seen: set[str]) -> str:
    """A header of MLX with its own includes in their place, each once."""
    if header in seen:
        return ""
    seen.add(header)
    text = (mlx_include() / header).read_text(encoding="utf-8")
    return _INCLUDE.sub(lambda m: flat(m[1], seen), text.replace("#pragma once", ""))


@functools.cache
def quantized() -> str:
    """What precedes an instantiation of a kernel of ``quantized.h``."""
    seen: set[str] = set()
    return "\n".join(flat(_KERNELS + header, seen) for header in _QUANTIZED)


def instantiate(kernel: str, dtype: mx.Dtype, *arguments: object) -> str:
    """Source of one variant of a kernel of ``quantized.h``."""
    name = f"{kernel}<{', '.join(map(str, (_TYPES[dtype], *arguments)))}>"
    made = f'template [[host_name("{kernel}")]] [[kernel]] decltype({name}) {name};'
    # The bench's entry point casts to the types of the kernel's parameters.
    return f"{quantized()}\n{made}\ntypedef {_TYPES[dtype]} T;\n"


@dataclass(frozen=True)
class Affine:
    """A weight as ``mx.quantize`` gives it."""

    codes: mx.array
    scales: mx.array
    biases: mx.array
    group_size: int
    bits: int

    @property
    def nbytes(self) -> int:
        return int(self.codes.nbytes + self.scales.nbytes + self.biases.nbytes)


@dataclass(frozen=True)
class Case:
    """``x @ weight.T`` by one of MLX's kernels: its source and how MLX launches it."""

    name: str
    source: str
    x: mx.array
    weight: Affine
    sizes: tuple[tuple[str, int], ...]
    grid: Size
    threadgroup: Size

    def run(
        self, build: Build, schedule: Schedule | None = None, count: bool = False
    ) -> tuple[np.ndarray, Report]:
        """The result (bfloat16: its bits), ``[M, N]``, and what the launch used."""
        library = compile_kernel(self.source, self.name, build, DEFAULT_VERSION)
        y = np.empty((self.x.shape[0], self.weight.codes.shape[0]), to_numpy(self.x).dtype)
        arrays = {
            "w": to_numpy(self.weight.codes),
            "scales": to_numpy(self.weight.scales),
            "biases": to_numpy(self.weight.biases),
            "x": to_numpy(self.x),
            **{n: np.array([value], np.int32) for n, value in self.sizes},
        }
        # The other arguments are strides of batches, which these launches have none of.
        buffers = [
            Buffer(n, arrays.get(n, np.zeros(8, np.int64)))
            for n in library.translation.buffers
            if n != "y"
        ]
        buffers.insert(4, Buffer("y", y, "out"))
        return y, launch(library, buffers, self.grid, self.threadgroup, schedule, count)


def qmv_fast(x: mx.array, weight: Affine) -> Case:
    """``affine_qmv_fast``: MLX's choice for M = 1, N a multiple of 8 and K one of 512."""
    (m, k), n = x.shape, weight.codes.shape[0]
    source = instantiate("affine_qmv_fast", x.dtype, weight.group_size, weight.bits, "false")
    sizes = (("in_vec_size", k), ("out_vec_size", n))
    return Case("affine_qmv_fast", source, x, weight, sizes, (32 * m, 2 * (n // 8), 1), (32, 2, 1))


def qmm_t(x: mx.array, weight: Affine) -> Case:
    """``affine_qmm_t``, the tiled kernel of 32 x 32 outputs a threadgroup of 128 threads."""
    (m, k), n = x.shape, weight.codes.shape[0]
    aligned = "true" if n % 32 == 0 else "false"
    source = instantiate("affine_qmm_t", x.dtype, weight.group_size, weight.bits, aligned, "false")
    sizes = (("K", k), ("N", n), ("M", m))
    grid = (32 * -(-n // 32), 2 * -(-m // 32), 2)
    return Case("affine_qmm_t", source, x, weight, sizes, grid, (32, 2, 2))
