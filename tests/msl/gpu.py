"""Run the kernels on an NVIDIA GPU: ``python -m tests.msl.gpu``.

The same Metal text, through PTX: every variant against its reference, then the bandwidth of one
row of x times a large weight beside a copy within the GPU's memory. It shows real concurrency, not
Apple's hardware. Without a GPU it says so and exits with 0. The exit status is 1 if a variant is
wrong.
"""

from __future__ import annotations

import sys

import mlx.core as mx
import numpy as np

from tests.kernels.variants import NAMES, Variant, call_of, kernel_of, product, variants

from . import cuda, ptx
from .errors import MslError, MslSetupError

# Normalised mean square error against the reference in MLX operations, each of which rounds.
LIMITS = {
    mx.float32: 1e-10,
    mx.float16: 1e-6,
    mx.bfloat16: 3e-5,
    mx.int8: 1e-6,
    mx.uint32: 0.0,
}
LARGE = (32768, 4096)  # more than the caches hold
REPEATS = 50


def _error(variant: Variant) -> float:
    results = variant.launch.results(
        lambda one: kernel_of(one, cuda.cuda_kernel)(inputs=list(one.arrays), **call_of(one))
    )
    errors = []
    for result, reference in zip(results, variant.reference, strict=True):
        a, b = (np.array(v.astype(mx.float32), np.float64).ravel() for v in (result, reference))
        errors.append(((a - b) ** 2).sum() / max((b**2).sum(), 1e-30))
    return float(np.max(errors))  # NaN if one is


def check() -> int:
    """Run every variant; how many are wrong."""
    wrong = count = 0
    for variant in variants():
        count += 1
        try:
            error = _error(variant)
        except MslError as e:
            wrong += 1
            print(f"{variant}: {e}")
            continue
        # Written so that a NaN is wrong.
        if not error <= LIMITS[variant.reference[0].dtype]:
            wrong += 1
            print(f"{variant}: error {error:.1e}")
    print(f"{count - wrong} of {count} variants agree with their reference")
    return wrong


def bandwidth() -> None:
    """Print GB/s of each format's product beside a copy's."""
    copy = cuda.copy_bandwidth(1 << 28)
    print(f"copy: {copy:.0f} GB/s read and written")
    for name in NAMES:
        variant = product(name, *LARGE, mx.float16)
        launch = variant.launch
        kernel = kernel_of(launch, cuda.cuda_kernel)
        kernel.repeats = REPEATS
        kernel(inputs=list(launch.arrays), **call_of(launch))
        found = variant.nbytes / kernel.milliseconds / 1e6
        print(f"{variant}: {found:.0f} GB/s, {found / copy:.2f} of the copy")


def main() -> int:
    try:
        print(f"{cuda.gpu().name}; libdevice: {ptx.libdevice()}")
    except MslSetupError as e:
        print(f"nothing was run: {e}")
        return 0
    wrong = check()
    bandwidth()
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
