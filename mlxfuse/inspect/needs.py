"""How much memory a GGUF file's model takes and reads, from its header; MLX is not imported."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from ..errors import GGUFError, UnsupportedError
from ..gguf.reader import GGUFFile
from ..memory import Machine
from ..models.config import read_config
from ..models.keys import Keys
from ..models.plan import Plan, WeightPlan, groups, plan

STEP = 2048
"""Tokens of a prompt that are processed at a time, as by mlx-lm's ``prefill_step_size``."""

# A token reads one row of these, unless the first is the output head too.
_EMBEDDING = "token_embd.weight"
_TABLES = (_EMBEDDING, "per_layer_token_embd.weight")


@dataclass(frozen=True, slots=True)
class Use:
    """Bytes that a model takes on a machine.

    weights   what stays in memory of them.
    cache     of the keys and values of a context, and the state of recurrent layers.
    prompt    what a step of a long prompt takes besides: activations, and the largest matrix
              dequantised for it.
    streamed  of the weights that are dequantised anew for each token, as they do not fit.
    """

    weights: int
    cache: int
    prompt: int
    streamed: int = 0

    @property
    def total(self) -> int:
        """What has to fit."""
        return self.weights + self.cache + self.prompt


@dataclass(frozen=True, slots=True)
class KVBits:
    """How keys and values are kept: bits of each, and the values that share a scale and a bias.

    full_only  layers with a sliding window keep theirs in 16 bits.
    """

    keys: int = 16
    values: int = 16
    group: int = 64
    full_only: bool = False

    def token(self, values: int) -> int:
        """Bytes of a layer's keys and values of a token, ``values`` numbers in all."""
        half = values // 2
        scales = -(-half // self.group) * 4  # two of 16 bits
        sides = (self.keys, self.values)
        return sum(half * bits // 8 + (scales if bits < 16 else 0) for bits in sides)


PLAIN = KVBits()


@dataclass(frozen=True, slots=True)
class Needs:
    """Bytes, unless said otherwise.

    weights   of all tensors that are loaded, as they lie in the file.
    active    read of them for one decoded token: all but the embedding's other rows and the
              experts that are not chosen.
    kv        (values a token, tokens they are kept for or 0 for all) of each layer.
    kept      of the matrices whose type has a kernel, which stay as they are in the file.
    plain     values of all other weights, which become ordinary numbers.
    apart     type -> bytes in the file, of the quantised matrices whose type has no kernel.
    dense     of all weights in float32: what the CPU's reference path would keep.
    state     of the layers with a recurrence, however many tokens there were.
    ignored   of tensors that are not loaded; they are in none of the others.
    largest   values of the largest matrix, or fused matrices, of which a long prompt makes a copy.
    width     values of one token of a prompt that its widest layer computes.
    """

    weights: int
    active: int
    kv: tuple[tuple[int, int], ...]
    kept: int
    plain: int
    apart: dict[str, int]
    dense: int
    state: int = 0
    ignored: int = 0
    largest: int = 0
    width: int = 0

    def cache(self, tokens: int, bits: KVBits = PLAIN) -> int:
        """Bytes of the caches after ``tokens``; what is plain is in 16 bits."""
        return self.state + sum(
            (PLAIN if window and bits.full_only else bits).token(values)
            * min(tokens, window or tokens)
            for values, window in self.kv
        )

    def on(self, machine: Machine, tokens: int, bits: KVBits = PLAIN) -> Use:
        """What the model takes there with a context of ``tokens``.

        Where kernels run, numbers have 16 bits. On a CPU they have 32, and matrices are kept for
        as long as half of the memory lasts.
        """
        step = min(tokens, STEP)
        if machine.kernels:
            prompt = 2 * (self.largest + step * self.width)
            return Use(self.kept + 2 * self.plain, self.cache(tokens, bits), prompt)
        held = min(self.dense, machine.budget // 2)
        cache = self.cache(tokens, bits)
        cache += cache - self.state if bits == PLAIN else 0
        return Use(held, cache, 4 * step * self.width, self.dense - held)

    def longest(self, machine: Machine, bits: KVBits = PLAIN) -> int:
        """The most tokens with which the model fits on a machine; 0 if none."""
        low, high = 0, 1 << 32
        while low < high:
            middle = (low + high + 1) // 2
            fits = self.on(machine, middle, bits).total <= machine.budget
            low, high = (middle, high) if fits else (low, middle - 1)
        return low


def needs(file: GGUFFile) -> Needs:
    """What a header tells. Of an architecture that is not supported, only of its tensors."""
    try:
        return needs_of(file, plan(file, read_config(file)))
    except (GGUFError, UnsupportedError):
        sizes = [(tensor.nbytes, math.prod(tensor.shape)) for tensor in file.tensors.values()]
        total, values = (sum(column) for column in zip(*sizes, strict=True)) if sizes else (0, 0)
        return Needs(total, total, (), total, 0, {}, 4 * values)


def needs_of(file: GGUFFile, weights: Plan) -> Needs:
    """What a plan of the file's weights says."""
    config = weights.config
    every = [weight for part in (weights.outer, *weights.layers) for weight in part]
    used = {s.tensor.name for weight in every for s in (*weight.weight, *weight.bias)}
    values = sum(map(_values, every))
    kept = kept_values = largest = 0
    apart: dict[str, int] = {}
    for group in groups(weights):
        count = sum(_values(weight, bias=False) for weight in group.weights)
        if group.has_kernel:
            kept += sum(source.nbytes for source in group.sources)
            kept_values += count
            if not group.weights[0].module.endswith("embed_tokens") or config.tied:
                largest = max(largest, count // group.sources[0].experts)
        for source in group.sources:
            if source.format.quantized and not group.has_kernel:
                name = source.format.name
                apart[name] = apart.get(name, 0) + source.nbytes
    layers = [config.sizes_of(i) for i in range(config.layers)]
    return Needs(
        weights=sum(map(_stored, every)),
        active=sum(_read(file, weight, config.tied) for weight in every),
        kv=tuple((sizes["cache"], sizes["window"]) for sizes in layers if sizes["cache"]),
        kept=kept,
        plain=values - kept_values,
        apart=apart,
        dense=4 * values,
        state=sum(sizes["state"] for sizes in layers),
        ignored=sum(
            t.nbytes for n, t in file.tensors.items() if n not in used and n[:5] != "rope_"
        ),
        largest=largest,
        width=max((_width(file, layer) for layer in weights.layers), default=0),
    )


def blocks(file: GGUFFile) -> tuple[int, int]:
    """How many layers there are, and how many blocks after them predict tokens after the next.

    A huge count is a lie: each layer has at least one tensor.
    """
    arch = file.architecture
    count = min(file.get(f"{arch}.block_count", int, default=0), len(file.tensors))
    ahead = min(file.get(f"{arch}.nextn_predict_layers", int, default=0), count)
    return count - ahead, ahead


def _stored(weight: WeightPlan) -> int:
    sources = (*weight.weight, *weight.bias)
    return sum(math.prod(s.shape) * s.format.type_size // s.format.block_size for s in sources)


def _values(weight: WeightPlan, bias: bool = True) -> int:
    sources = (*weight.weight, *weight.bias) if bias else weight.weight
    return sum(math.prod(source.shape) for source in sources)


def _chosen(file: GGUFFile, experts: int) -> int:
    """How many of a layer's experts a token uses."""
    used = Keys(file).count_or_none("expert_used_count") or 0
    return used if 0 < used < experts else experts


def _read(file: GGUFFile, weight: WeightPlan, tied: bool) -> int:
    """Bytes that one token reads of a weight."""
    size, first = _stored(weight), weight.weight[0]
    if len(weight.shape) == 3:
        return size * _chosen(file, weight.shape[0]) // weight.shape[0]
    if first.tensor.name in _TABLES and not (tied and first.tensor.name == _EMBEDDING):
        return size // max(1, weight.shape[0])
    return size


def _width(file: GGUFFile, layer: Iterable[WeightPlan]) -> int:
    """The outputs of a layer's matrices, for one token."""
    found = 0
    for weight in layer:
        if len(weight.shape) > 1:
            experts = _chosen(file, weight.shape[0]) if len(weight.shape) == 3 else 1
            found += experts * weight.shape[-2]
    return found
