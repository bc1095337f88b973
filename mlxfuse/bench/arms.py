"""Two forms of one model that are timed beside each other: stock MLX-LM's, and mlxfuse's."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.generate import maybe_quantize_kv_cache
from mlx_lm.models import mla, switch_layers
from mlx_lm.models.cache import can_trim_prompt_cache, make_prompt_cache, trim_prompt_cache

from ..errors import MLXFuseError
from ..formats import AFFINE
from ..fusion.checks import BOUNDS, Reference, logits
from ..fusion.report import Check
from ..kernels.matmul.decode import decode
from ..kernels.weight import AnySegment, Part, QuantizedWeight, type_name
from ..nn.cpu import (
    Embedding,
    Linear,
    StreamedEmbedding,
    StreamedLinear,
    StreamedSwitchLinear,
    SwitchLinear,
)
from ..nn.experts import QuantizedSwitchLinear
from ..nn.heads import QuantizedMultiLinear
from ..nn.quantized import QuantizedEmbedding, QuantizedLinear
from .cases import nearest_bits
from .measure import Test, seconds

HELD = (QuantizedLinear, QuantizedEmbedding, QuantizedSwitchLinear, QuantizedMultiLinear)
_SEED = 8
_STEP = 2048  # tokens of a prompt that are processed at a time, as in mlx_lm.generate
# Types that MLX's affine weights hold exactly, of which codes fill a word.
_AFFINE = {name: how for name, how in AFFINE.items() if 32 % how[0] == 0}


@dataclass(frozen=True, slots=True)
class Arm:
    """One form of the model.

    name    for the table.
    what    exactly what it is.
    model   an mlx-lm model.
    start   tokens from which caches that begin plain are compressed; 0 for those that do not.
    """

    name: str
    what: str
    model: nn.Module
    start: int = 0


class Runner:
    """An arm at one test: makes ready once, then can be called for the seconds of one run."""

    def __init__(self, arm: Arm, test: Test, vocabulary: int) -> None:
        self._model: Any = arm.model
        self._start = arm.start
        self._test = test
        count = test.depth + max(1, test.prompt)
        ids = np.random.default_rng(_SEED).integers(0, vocabulary, (1, count))
        self._tokens = mx.array(ids)
        self._cache: Any = None
        self._held = nbytes(arm.model)
        self._read = active(arm.model)
        self.memory = 0
        self.read: float | None = None

    def warm_up(self) -> None:
        """The same work, of a few decoded tokens at most; not timed."""
        self._run(min(self._test.generated, 4))
        self.memory = 0

    def __call__(self) -> float:
        return self._run(self._test.generated)

    def _run(self, generated: int) -> float:
        test = self._test
        if self._cache is None:
            self._cache = make_prompt_cache(self._model)
            self._read_prompt(self._tokens[:, : test.depth])
        before, depth_bytes = mx.get_active_memory(), cached(self._cache)
        mx.reset_peak_memory()
        rest = self._tokens[:, test.depth :]
        taken = seconds(
            lambda: self._prefill(rest) if test.prompt else self._decode(rest, generated)
        )
        held = cached(self._cache)
        peak = max(0, mx.get_peak_memory() - before)
        self.memory = max(self.memory, self._held + depth_bytes + peak)
        if test.generated and self._read is not None:
            self.read = self._read + (depth_bytes + held) / 2
        kept = test.depth >= max(1, self._start)  # else it may have become compressed
        if kept and can_trim_prompt_cache(self._cache):
            trim_prompt_cache(self._cache, test.prompt or generated)
        else:
            self._cache = None
        return taken

    def _logits(self, tokens: mx.array) -> mx.array:
        found: mx.array = self._model(tokens, cache=self._cache)
        if self._start:  # the caches know how
            maybe_quantize_kv_cache(self._cache, self._start, 64, 8)
        return found

    def _read_prompt(self, tokens: mx.array) -> None:
        for start in range(0, tokens.shape[1], _STEP):
            self._logits(tokens[:, start : start + _STEP])
            mx.eval([c.state for c in self._cache])

    def _prefill(self, tokens: mx.array) -> None:
        """As mlx-lm does: logits of the last token only."""
        self._read_prompt(tokens[:, :-1])
        mx.eval(self._logits(tokens[:, -1:]))

    def _decode(self, token: mx.array, count: int) -> None:
        """As mlx-lm does: the next step is built while the GPU works on this one."""
        ahead = mx.argmax(self._logits(token)[:, -1], axis=-1)
        mx.async_eval(ahead)
        for i in range(count):
            now = ahead
            if i < count - 1:
                ahead = mx.argmax(self._logits(now[None])[:, -1], axis=-1)
                mx.async_eval(ahead)
            mx.eval(now)


def compare(reference: Reference, ours: nn.Module) -> Check:
    """How far logits are from the reference's, over a prompt and decoded tokens.

    Raises:
        MLXFuseError: further than `patch_model`'s check allows, which is what rounding explains.
    """
    found = reference.compare(ours)
    if not reference.within(found):
        raise MLXFuseError(
            f"mlxfuse is not timed: its logits differ from the reference's by {found.error:.3g} of "
            f"the largest, {found.typical:.3g} typically, where rounding explains "
            f"{BOUNDS[reference.logits.dtype]:g} ({found.top1:.0%} of the greedy tokens agree); "
            "please report this, with the model's name"
        )
    return found


def decoded(model: nn.Module, before: int = 0) -> Reference:
    """Logits by MLX's operations on the decoded weights: what kernels are held to."""
    model.train()  # in which mode no kernel runs
    try:
        return Reference(logits(model, before), before)
    finally:
        model.eval()


@dataclass
class _Stock:
    """How stock modules are made.

    dtype       of the activations.
    requantize  what MLX cannot hold exactly becomes affine, else dense.
    kinds       of weights that were made, in order.
    """

    dtype: mx.Dtype
    requantize: bool
    kinds: dict[str, None] = field(default_factory=dict)


def stock_of(
    model: nn.Module, *, requantize: bool = False, budget: int | None = None
) -> tuple[nn.Module, str]:
    """The same model with mlx-lm's and MLX's own modules, and what its weights are.

    Arrays are shared. What lies in a file's bytes becomes MLX's affine weights where those are
    exactly the same numbers, else dense in the type of the activations.

    Args:
        requantize: affine weights of about the same size instead of dense ones; other numbers.
        budget: bytes that dense weights may take.

    Raises:
        MLXFuseError: weights that do not fit in memory have no such form.
    """
    arrays: Any = tree_flatten(model.parameters())
    dtype = next(a.dtype for _, a in arrays if mx.issubdtype(a.dtype, mx.floating))
    how = _Stock(dtype, requantize)
    dense = sum(
        m.weight.rows * m.weight.columns * (m.weight.experts or 1) * dtype.size
        for m in model.modules()
        if isinstance(m, HELD) and not {p.segment.name for p in m.weight.parts} <= _AFFINE.keys()
    )
    if budget is not None and not requantize and dense > budget:
        raise MLXFuseError(
            f"stock MLX-LM would need {dense / 1e9:.1f} GB for what it cannot hold as the file "
            f"does, {max(0, budget) / 1e9:.1f} GB are left: compare with --stock affine"
        )
    made = _copy(model, how)
    return made, " and ".join(how.kinds) or "the checkpoint's own weights"


def copy_of(model: nn.Module) -> nn.Module:
    """The same model in modules of its own, which can be patched otherwise; arrays are shared."""
    made: nn.Module = _copy(model, None)
    return made


def _copy(node: Any, how: _Stock | None) -> Any:
    if isinstance(node, list):
        return [_copy(child, how) for child in node]
    if isinstance(node, nn.Module):
        leaf = None if how is None else _stock_leaf(node, how)
        if leaf is not None:
            return leaf
        made = type(node).__new__(type(node))
        nn.Module.__init__(made)
        vars(made).update(vars(node))
        dict.update(made, {k: _copy(v, how) for k, v in node.items()})
        return made
    if isinstance(node, dict):
        return {k: _copy(v, how) for k, v in node.items()}
    return node


def _stock_leaf(module: nn.Module, how: _Stock) -> nn.Module | None:
    """MLX's own layer for one of ours; None where it is MLX's already."""
    if isinstance(module, StreamedLinear | StreamedEmbedding | StreamedSwitchLinear):
        raise MLXFuseError(
            "there is no stock MLX-LM to compare with: its dense weights do not fit in memory"
        )
    if isinstance(module, Linear | Embedding | SwitchLinear):
        made = _empty(module, 0, 0)
        made.update(dict(module.items()))
        how.kinds[f"dense {type_name(module.weight.dtype)}"] = None
        return made.eval()
    if not isinstance(module, HELD):
        return None
    weight = module.weight
    exact = _exact(weight, how.dtype)
    if exact is None:
        dense = mx.concatenate([decode(_flat(p)) for p in weight.parts])
        arrays, bits, group = {"weight": dense.astype(how.dtype)}, 0, 0
        if how.requantize:
            group = 64 if weight.columns % 64 == 0 else 32
            segment = weight.parts[0].segment
            count = segment.rows * segment.columns * (segment.experts or 1)
            bits = nearest_bits(8 * segment.nbytes / count)
            made_of = mx.quantize(arrays["weight"], group_size=group, bits=bits)
            arrays = dict(zip(("weight", "scales", "biases"), made_of, strict=True))
        kind = f"affine {bits}-bit (group {group}), requantised" if bits else "dense "
        kind += "" if bits else type_name(how.dtype)
    else:
        (bits, arrays), group = exact, 32
        kind = f"affine {bits}-bit (group {group}), exactly the file's"
    how.kinds[kind] = None
    if weight.experts is not None:
        arrays = {n: a.reshape(weight.experts, weight.rows, -1) for n, a in arrays.items()}
    made = _empty(module, bits, group)
    made.update(arrays)
    if "bias" in module:
        made.bias = module.bias
    mx.eval(made.parameters())
    return made.eval()


def _empty(module: nn.Module, bits: int, group: int) -> nn.Module:
    """MLX's layer of that kind, of the smallest size: its arrays are to be replaced."""
    if isinstance(module, SwitchLinear | QuantizedSwitchLinear):
        if bits:
            return switch_layers.QuantizedSwitchLinear(64, 1, 1, False, group, bits)
        return switch_layers.SwitchLinear(1, 1, 1, bias=False)
    if isinstance(module, QuantizedMultiLinear):
        if bits:
            return mla.QuantizedMultiLinear(64, 1, 1, group, bits, "affine")
        return mla.MultiLinear(1, 1, 1)
    if isinstance(module, Linear | QuantizedLinear):
        if bits:
            return nn.QuantizedLinear(64, 1, bias=False, group_size=group, bits=bits)
        return nn.Linear(1, 1, bias=False)
    if bits:
        return nn.QuantizedEmbedding(1, 64, group_size=group, bits=bits)
    return nn.Embedding(1, 1)


def _flat(part: Part) -> AnySegment:
    """The rows of a part, of all experts one after the other."""
    rows = slice(part.first, part.first + part.rows)
    arrays = {n: a[..., rows, :].flatten(0, -2) for n, a in part.segment.arrays.items()}
    return replace(part.segment, arrays=arrays)


def _exact(weight: QuantizedWeight, dtype: mx.Dtype) -> tuple[int, dict[str, mx.array]] | None:
    """Bits and arrays of MLX's affine weights, if they are the same numbers.

    The scales have the type of the activations: of another, MLX would give another type.
    """
    names = {p.segment.name for p in weight.parts}
    if len(names) > 1 or not names <= _AFFINE.keys():
        return None
    bits, zero = _AFFINE[names.pop()]
    found: list[dict[str, mx.array]] = []
    for part in weight.parts:
        segment = _flat(part)
        scales = segment.arrays["scales"]
        if zero:
            biases = scales * -zero
        else:
            pairs = scales.reshape(len(scales), -1, 2)
            scales, biases = pairs[..., 0], pairs[..., 1]
        scales, biases = scales.astype(dtype), biases.astype(dtype)
        want = decode(segment).reshape(*scales.shape, 32)
        d, m = (a.astype(mx.float32)[..., None] for a in (scales, biases))
        codes = mx.where(d == 0, 0, mx.round((want - m) / mx.where(d == 0, 1, d)))
        per_word = 32 // bits
        words = codes.astype(mx.uint32).reshape(len(scales), -1, per_word)
        packed = (words << (mx.arange(per_word, dtype=mx.uint32) * bits)).sum(-1)
        if not mx.array_equal(codes * d + m, want):
            return None
        found.append({"weight": packed.astype(mx.uint32), "scales": scales, "biases": biases})
    return bits, {k: mx.concatenate([f[k] for f in found]) for k in found[0]}


def _arrays(node: Any) -> Iterator[mx.array]:
    if isinstance(node, mx.array):
        yield node
    elif isinstance(node, dict | list):
        for child in node.values() if isinstance(node, dict) else node:
            yield from _arrays(child)


def nbytes(node: Any) -> int:
    """Bytes of all arrays of a module, each once."""
    return sum(a.nbytes for a in {id(a): a for a in _arrays(node)}.values())


def active(model: nn.Module) -> int | None:
    """Bytes of weights that one decoded token reads; None where the experts used are not known.

    All but the rows of an embedding that has a head of its own, and the experts not chosen.
    """
    total = nbytes(model)
    modules = dict(model.named_modules())
    own_head = any(path.rpartition(".")[2] == "lm_head" for path in modules)
    used = getattr(getattr(model, "args", None), "num_experts_per_tok", None)
    embeddings = (nn.Embedding, nn.QuantizedEmbedding, QuantizedEmbedding)
    for module in modules.values():
        if own_head and isinstance(module, embeddings):
            weight = module.weight
            rows = weight.rows if isinstance(weight, QuantizedWeight) else len(weight)
            total -= nbytes(module) * (rows - 1) // rows
        elif type(module).__name__.endswith("SwitchLinear"):  # mlx-lm's and ours
            if not isinstance(used, int):
                return None
            experts = next(len(a) for a in _arrays(module))
            total -= nbytes(module) * (experts - used) // experts
    return total


def cached(caches: Any) -> int:
    """Bytes of what mlx-lm's caches hold now, without what is only reserved."""
    total = 0
    for cache in caches:
        keys = getattr(cache, "keys", None)
        if keys is not None:
            reserved = (keys if isinstance(keys, mx.array) else keys[0]).shape[-2]
            total += cache.nbytes * min(cache.offset, reserved) // reserved
        elif not cache.empty():
            total += cache.nbytes
    return total
