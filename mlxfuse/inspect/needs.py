"""How much memory a GGUF file's model takes and reads, from its header; MLX is not imported."""

from __future__ import annotations

import math
import re
from collections.abc import Container
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..gguf.reader import GGUFFile

_LAYER = re.compile(r"blk\.(\d{1,6})\.")
_KEYS = re.compile(r"blk\.(\d{1,6})\.attn_(k|v|k_norm)\.weight")
_EXPERTS = re.compile(r"blk\.\d{1,6}\.ffn_(gate|up|down|gate_up)_exps\.(weight|bias)")


@dataclass(frozen=True, slots=True)
class Needs:
    """Bytes, unless said otherwise.

    weights        of all tensors, as they lie in the file; what stays in memory where every
                   type has a kernel.
    dense          of all matrices in float32: what the CPU's reference path would keep.
    active         read for one decoded token: all weights but the embedding's other rows and
                   the experts that are not chosen.
    kv             (bytes a token, tokens it is kept for or 0 for all) of each layer, in float16.
    state          of the layers with a recurrence, however many tokens there were.
    ignored        of the blocks that predict tokens after the next one; they are not loaded and in
                   none of the others.
    """

    weights: int
    dense: int
    active: int
    kv: tuple[tuple[int, int], ...]
    state: int = 0
    ignored: int = 0

    def cache(self, tokens: int) -> int:
        """Bytes of the key-value cache after ``tokens``, and of the recurrent layers' state."""
        return self.state + sum(size * min(tokens, window or tokens) for size, window in self.kv)

    def without_kernels(self, budget: int) -> tuple[Needs, int]:
        """What stays in memory on a CPU, and bytes more that are dequantised for every token.

        Matrices are float32 for as long as half of the memory lasts; so is the cache.
        """
        held = min(self.dense, budget // 2)
        kv = tuple((2 * size, window) for size, window in self.kv)
        return replace(self, weights=held, kv=kv), self.dense - held

    def longest(self, budget: int) -> int:
        """The most tokens of which weights and cache fit in ``budget``; 0 if none."""
        low, high = 0, 1 << 32
        while low < high:
            middle = (low + high + 1) // 2
            fits = self.weights + self.cache(middle) <= budget
            low, high = (middle, high) if fits else (low, middle - 1)
        return low


def needs(file: GGUFFile) -> Needs:
    """What the header tells; a key that a file lacks counts as llama.cpp's default.

    Raises:
        GGUFError: a key has another type than it must have.
    """
    arch = file.architecture
    used = file.get(f"{arch}.expert_used_count", int, default=0)
    total = file.get(f"{arch}.expert_count", int, default=0)
    layers, _ = blocks(file)
    own = layers - _shared(file)
    weights = active = dense = ignored = 0
    # A token reads one row of these.
    tables = ["token_embd.weight"] if "output.weight" in file.tensors else []
    tables.append("per_layer_token_embd.weight")
    for tensor in file.tensors.values():
        if tensor.name == "rope_freqs.weight":
            continue
        size = tensor.nbytes
        match, shared = _LAYER.match(tensor.name), _KEYS.fullmatch(tensor.name)
        if (match and int(match[1]) >= layers) or (shared and int(shared[1]) >= own):
            ignored += size
            continue
        weights += size
        dense += math.prod(tensor.shape) * 4
        if _EXPERTS.fullmatch(tensor.name) and 0 < used < total:
            size = size * used // total
        elif tensor.name in tables:
            size = size // max(1, tensor.shape[0])
        active += size
    recurrent = [i for i in range(layers) if f"blk.{i}.ssm_out.weight" in file.tensors]
    state = len(recurrent) * _state(file) if recurrent else 0
    return Needs(weights, dense, active, _caches(file, layers, recurrent), state, ignored)


def _shared(file: GGUFFile) -> int:
    """How many layers, the last ones, read the keys and values of an earlier one."""
    return file.get(f"{file.architecture}.attention.shared_kv_layers", int, default=0)


def blocks(file: GGUFFile) -> tuple[int, int]:
    """How many layers there are, and how many blocks after them predict tokens after the next.

    A huge count is a lie: each layer has at least one tensor.
    """
    arch = file.architecture
    count = min(file.get(f"{arch}.block_count", int, default=0), len(file.tensors))
    ahead = min(file.get(f"{arch}.nextn_predict_layers", int, default=0), count)
    return count - ahead, ahead


def _state(file: GGUFFile) -> int:
    """Of a gated delta net: its last inputs in float16, and a float32 matrix for each value head.

    llama.cpp's names: see ``models.families``.
    """
    names = ("conv_kernel", "inner_size", "state_size", "group_count")
    kernel, inner, head, groups = (
        file.get(f"{file.architecture}.ssm.{name}", int, default=0) for name in names
    )
    return 2 * max(0, kernel - 1) * (inner + 2 * groups * head) + 4 * inner * head


def _caches(file: GGUFFile, layers: int, recurrent: Container[int]) -> tuple[tuple[int, int], ...]:
    """Of each layer with attention that has keys and values of its own."""
    arch = file.architecture

    def each(key: str, default: int, layers: int) -> list[int]:
        """One value a layer; a file gives one number or a list."""
        value: Any = file.metadata.get(f"{arch}.{key}", default)
        if isinstance(value, np.ndarray) and value.dtype.kind in "biu":
            value = [int(v) for v in value[:layers]]
            return [*value, *[default] * (layers - len(value))]
        return [int(value)] * layers if isinstance(value, int) else [default] * layers

    heads = file.get(f"{arch}.attention.head_count", int, default=0) if layers else 0
    embd = file.get(f"{arch}.embedding_length", int, default=0)
    head = embd // heads if heads else 0
    keys = file.get(f"{arch}.attention.key_length", int, default=head)
    values = file.get(f"{arch}.attention.value_length", int, default=head)
    window = file.get(f"{arch}.attention.sliding_window", int, 4096 if arch == "gemma2" else 0)
    # The cache of these architectures' sliding layers is bounded. The numbers are their periods.
    periods = {"gemma2": 2, "gemma3": 6, "gpt-oss": 2, "gemma4": 6}
    slides = [0] * layers
    if window and arch in periods:
        name = "attention.sliding_window_pattern"
        slides, period = each(name, 0, layers), file.metadata.get(f"{arch}.{name}", periods[arch])
        if type(period) is int:
            slides = [int((i + 1) % max(1, period) != 0) for i in range(layers)]
    kv_heads = each("attention.head_count_kv", heads, layers)
    pairs = [keys + values] * layers
    if arch == "gemma4":
        of_window = [
            file.get(f"{arch}.attention.{n}_length_swa", int, default=0) for n in ("key", "value")
        ]
        pairs = [sum(of_window) if slide else keys + values for slide in slides]
    return tuple(
        (2 * n * pair, window if slide else 0)
        for i, (n, pair, slide) in enumerate(zip(kv_heads, pairs, slides, strict=True))
        if i not in recurrent and i < layers - _shared(file)
    )
