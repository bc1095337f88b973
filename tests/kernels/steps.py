"""What holds for every kernel that takes one token into a state."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np

from mlxfuse.kernels.runtime import kernel as _kernel
from mlxfuse.kernels.runtime.kernel import Kernel

from .matmul_cases import EPS
from .weights import to_float64


def far(got: mx.array, want: np.ndarray) -> float:
    """The largest error, of the largest value."""
    return float(np.abs(to_float64(got) - want).max() / np.abs(want).max())


def check_step(
    kernel: Kernel,
    call: Any,
    run: Callable[[Any], Sequence[mx.array]],
    exact: Callable[[Any], Sequence[np.ndarray]],
) -> Sequence[mx.array]:
    """One dispatch gives the exact result and state, and each argument matters.

    Returns:
        the kernel's results.
    """
    before = _kernel.launches[kernel.name]
    got = run(call)
    assert _kernel.launches[kernel.name] - before == 1
    want, dtype = exact(call), next(iter(call.arrays.values())).dtype
    for found in (got, kernel.reference(call)):
        assert far(found[0], want[0]) <= EPS[dtype] / 2 + 2e-6
        assert far(found[1], want[1]) <= 1e-6
        assert (found[0].dtype, found[1].dtype) == (dtype, mx.float32)
    for name, array in call.arrays.items():
        changed = exact(replace(call, **{name: array[..., ::-1] if array.size > 1 else -array}))
        assert max(far(got[0], changed[0]), far(got[1], changed[1])) > 1e-3, name
    return got
