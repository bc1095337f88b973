"""GPU dispatches of a function, counted in the graph it builds; works without a GPU.

MLX's ``mx.fast`` operations and ``mx.dequantize`` are one kernel each on Metal; on the CPU their
graph has the parts they are made of, so opaque operations stand in for them while counting there.
"""

from __future__ import annotations

import io
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache

from ..kernels.runtime.backend import Counting, opaque, using

# Primitives that make another view of the same memory. (A reshape of a transposed array copies,
# but not where the moved axis has one element, as in the decoding of one token.)
VIEWS = {
    *("Broadcast", "ExpandDims", "Flatten", "Reshape", "Slice", "Split", "Squeeze", "Transpose"),
    *("Unflatten", "StopGradient"),
}
_FAST = {
    "RMSNorm": "rms_norm",
    "LayerNorm": "layer_norm",
    "RoPE": "rope",
    "ScaledDotProductAttention": "scaled_dot_product_attention",
}
_NODE = re.compile(r'\{ \d+ \[label ="(\w+)[^"]*"')
_lock = threading.Lock()


def dispatches(function: Callable[[], Any], *, fused: bool = True) -> Counter[str]:
    """Dispatches by primitive, of a kernel of ours by its op; a compiled group counts as one.

    Args:
        function: gives the arrays of which the graph is counted, not evaluated.
        fused: of patched modules as they are patched, or else by their own code.
    """
    counted: Counter[str] = Counter()
    orders: list[object] = []
    with using(Counting(counted, fused=fused)), _stand_ins(counted, orders):
        graph = io.StringIO()
        mx.export_to_dot(graph, function())
    names = Counter(_NODE.findall(graph.getvalue()))
    kernels = names.pop("Depends", 0) - len(orders)
    if kernels != counted.total():
        raise ValueError("what the function uses must be evaluated, and what it launches used")
    for name, n in names.items():
        if name not in VIEWS:
            counted[_FAST.get(name, "Compiled" if name.startswith("Compiled") else name)] += n
    return counted


def per_token(model: nn.Module) -> tuple[int, int]:
    """Dispatches of a decoded token, by the model's own code and as it is patched: of the second
    one, which is as all that follow.
    """

    def count(*, fused: bool) -> int:
        cache = make_prompt_cache(model)
        # Caches take their memory with a prompt or, if they slide, with the first token after it.
        with using(Counting(Counter(), fused=fused)):
            for tokens in ([[1, 2]], [[3]]):
                mx.eval(model(mx.array(tokens), cache=cache))
        return dispatches(lambda: model(mx.array([[4]]), cache=cache), fused=fused).total()

    return count(fused=False), count(fused=True)


@contextmanager
def _stand_ins(counted: Counter[str], orders: list[object]) -> Iterator[None]:
    """While `mx.fast` would decompose: opaque operations for this thread, the real for others.

    A model's own ``mx.depends``, which launches nothing, is noted in ``orders``.
    """
    me = threading.get_ident()

    def order(*arguments: Any, **options: Any) -> Any:
        if threading.get_ident() == me:
            orders.append(None)
        return real["depends"](*arguments, **options)

    def stand_in(name: str) -> Callable[..., mx.array]:
        def call(*arguments: Any, **options: Any) -> mx.array:
            if threading.get_ident() != me:
                found: mx.array = real[name](*arguments, **options)
                return found
            counted[name] += 1
            arrays = [a for a in (*arguments, *options.values()) if isinstance(a, mx.array)]
            shape, dtype = arrays[0].shape, arrays[0].dtype
            if name == "dequantize":
                dtype = mx.float32 if arrays[1].dtype == mx.uint8 else arrays[1].dtype
                shape = (*shape[:-1], shape[-1] * 32 // options["bits"])
            elif name == "scaled_dot_product_attention":
                shape = (*shape[:-1], arrays[2].shape[-1])
            (out,) = opaque(arrays, [shape], [dtype])
            return out

        return call

    with _lock:
        places: dict[str, Any] = {"depends": mx}
        if mx.default_device() != mx.gpu:
            places |= dict.fromkeys(_FAST.values(), mx.fast) | {"dequantize": mx}
        real = {name: getattr(place, name) for name, place in places.items()}
        try:
            for name, place in places.items():
                setattr(place, name, order if name == "depends" else stand_in(name))
            yield
        finally:
            for name, place in places.items():
                setattr(place, name, real[name])
