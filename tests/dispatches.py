"""Counts the GPU dispatches of a function from its traced graph; works without a GPU.

``mx.export_function`` records every primitive, Metal kernels included. MLX's ``mx.fast``
operations, one kernel each on Metal, are recorded as what they decompose into on the CPU, so
opaque kernels stand in for them while tracing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import pytest

from mlxfuse.kernels import _kernel

# Primitives that make another view of the same memory. (A reshape of a transposed array copies,
# but not where the moved axis has one element, as in the decoding of one token.)
VIEWS = {
    *("Broadcast", "ExpandDims", "Flatten", "Reshape", "Slice", "Split", "Squeeze", "Transpose"),
    *("Unflatten", "StopGradient"),
}
FAST = ("rms_norm", "rope", "scaled_dot_product_attention")


def _stand_in(name: str) -> Callable[..., mx.array]:
    """A kernel of the shape of ``mx.fast.NAME``: reads every array, gives one like the first."""

    def call(*arguments: Any, **options: Any) -> mx.array:
        arrays = [a for a in (*arguments, *options.values()) if isinstance(a, mx.array)]
        kernel = mx.fast.metal_kernel(
            name=f"{name}_",
            input_names=[f"x{i}" for i in range(len(arrays))],
            output_names=["out"],
            source="out[0] = x0[0];",
        )
        (out,) = kernel(
            inputs=arrays,
            output_shapes=[arrays[0].shape],
            output_dtypes=[arrays[0].dtype],
            grid=(1, 1, 1),
            threadgroup=(1, 1, 1),
        )
        return out

    return call


def dispatches(function: Callable[..., Any], *arrays: mx.array) -> Counter[str]:
    """Dispatches of ``function(*arrays)`` by primitive, or by the name of a Metal kernel."""
    found: list[dict[str, Any]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_kernel, "_unavailable", lambda mode: None)
        patch.setenv("MLXFUSE_KERNELS", "metal")
        for name in FAST:
            patch.setattr(mx.fast, name, _stand_in(name))
        mx.export_function(found.append, function, *arrays)
    names = []
    for record in found:
        if record["type"] == "primitive" and record["name"] not in VIEWS:
            name = record["name"]
            if name == "CustomKernel":
                name = record["arguments"][0].removeprefix("custom_kernel_").split("__")[0]
            names.append(name)
    return Counter(names)
