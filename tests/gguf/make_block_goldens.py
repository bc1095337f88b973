"""Writes ``block_goldens.npz``: blocks decoded by llama.cpp itself, for the types that gguf-py
and libgguf do not both decode.

    pip install xllamacpp && python -m tests.gguf.make_block_goldens

The wheel's shared library exports ggml's ``dequantize_row_*``. For each type there are a zero
block, an edge block and random ones; ``TYPE`` holds the bytes and ``TYPE.weights`` what llama.cpp
decodes.
"""

from __future__ import annotations

import ctypes
import importlib.util
from pathlib import Path

import numpy as np

from mlxfuse.formats import BY_NAME

GOLDENS = Path(__file__).with_name("block_goldens.npz")
FUNCTIONS = {
    "Q1_0": "dequantize_row_q1_0",
    "Q2_0": "dequantize_row_q2_0",
    "Q8_K": "dequantize_row_q8_K",
}
BLOCKS = 8


def main() -> None:
    spec = importlib.util.find_spec("xllamacpp")
    if spec is None or spec.origin is None:
        raise SystemExit("pip install xllamacpp")
    (library,) = Path(spec.origin).parent.glob("xllamacpp*.so")
    llama = ctypes.CDLL(str(library))
    rng = np.random.default_rng(0)
    arrays = {}
    for name, function in FUNCTIONS.items():
        format = BY_NAME[name]
        blocks = rng.integers(0, 256, (BLOCKS, format.type_size), dtype=np.uint8)
        blocks[0] = 0
        blocks[1] = 255  # all-ones codes under a subnormal scale
        blocks[1, :4] = [1, 0, 1, 0]
        weights = np.empty((BLOCKS, format.block_size), np.float32)
        call = getattr(llama, function)
        call.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
        call.restype = None
        call(blocks.ctypes.data, weights.ctypes.data, weights.size)
        arrays[name], arrays[f"{name}.weights"] = blocks, weights
    np.savez_compressed(GOLDENS, **arrays)


if __name__ == "__main__":
    main()
