"""Rows of a GGUF file -> the modules of mlx-lm's model."""

from __future__ import annotations

import math
from contextlib import closing
from dataclasses import replace
from importlib import import_module
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from .. import memory
from ..errors import GGUFError, UnsupportedError
from ..gguf.blocks import dequantize
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
from ..nn.quantized import Place, QuantizedEmbedding, QuantizedLinear
from ..nn.rope import FrequencyRoPE, NoRoPE
from .part import Part, parent_of
from .plan import Group, Plan, WeightPlan, groups, lean
from .rope import Rope
from .rows import RowSource
from .streams import POOL, Account, StreamLoader, part_of
from .table import Config

if TYPE_CHECKING:
    from ..gguf.reader import GGUFFile

# float32 values that are dequantised at a time: 256 MiB.
CHUNK = 1 << 26


def build(
    file: GGUFFile,
    weights: Plan,
    dtype: mx.Dtype,
    budget: int | None = None,
    *,
    quantized: bool = False,
    account: Account | None = None,
    part: Part | None = None,
) -> nn.Module:
    """mlx-lm's model with the file's weights, evaluated layer by layer.

    Args:
        weights: of the whole model.
        budget: bytes of dense weights, by default half of the memory that is available; what
            exceeds it stays in the mapped file and is dequantised at every call.
        quantized: keep matrices of the types that have a kernel as the file has them.
        account: adds up what it costs.
        part: what of it this rank holds, if several machines share the model: its results are not
            those of the whole before ``part.join``.

    Host memory above the model itself: of the weight (with ``quantized``, the fused group) being
    made, the file's bytes or one chunk in float32 and, if it has several chunks, a copy; and the
    file's bytes of the next group.
    """
    config = weights.config
    account = account or Account()
    module = import_module(config.architecture.module)
    model: nn.Module = module.Model(module.ModelArgs.from_dict(config.args))
    _set_ropes(file, model, config)
    _check_parameters(model, weights)
    for path, value in config.values.items():
        parent, name = parent_of(model, path)
        setattr(parent, name, mx.array(value))
    if part is not None:
        part.narrow(model)
        weights = part.share.plan
    left = memory.available() // 2 if budget is None else budget
    in_order = list(groups(weights))
    sizes = [sum(math.prod(w.shape) for w in group.weights) for group in in_order]
    streamed = [group for group in in_order if quantized and group.has_kernel]
    after: dict[int, Group | None] = {id(g): h for g, h in pairwise([*streamed, None]) if g}
    with closing(StreamLoader(file, account)) as loader:
        for i, group in enumerate(in_order):
            if account.progress is not None:
                account.progress(sum(sizes[:i]) / sum(sizes))
            if id(group) in after:
                _place_quantized(loader, model, group, after[id(group)], dtype)
                continue
            for weight in group.weights:
                nbytes = _place_dense(file, model, weight, dtype, left, account)
                left -= nbytes
                if quantized:
                    _note(account, weight, nbytes)
    model.mapped_files = loader.mapped
    model.eval()
    return model


def _place_dense(
    file: GGUFFile,
    model: nn.Module,
    weight: WeightPlan,
    dtype: mx.Dtype,
    left: int,
    account: Account,
) -> int:
    """A weight in ``dtype``, or in the mapped file if that is more than the ``left`` bytes.

    Returns:
        the bytes that it takes in memory.
    """
    parent, name = parent_of(model, weight.module)
    nbytes = math.prod(weight.shape) * dtype.size
    dense = weight.dense or nbytes <= left
    with account.time("dequantize"):
        made = make_module(file, weight, dtype, getattr(parent, name), dense=dense)
        setattr(parent, name, made)
        mx.eval(made if isinstance(made, mx.array) else made.parameters())
    return nbytes if dense else 0


def _place_quantized(
    loader: StreamLoader, model: nn.Module, group: Group, after: Group | None, dtype: mx.Dtype
) -> None:
    """One `QuantizedWeight` for the group, and a layer over its rows for each member.

    Args:
        after: the group that is placed next.
    """
    whole = loader.weight(group, after)
    for i, weight in enumerate(group.weights):
        parent, name = parent_of(model, weight.module)
        if isinstance(getattr(parent, name), nn.Embedding):
            setattr(parent, name, QuantizedEmbedding(whole, dtype))
            continue
        rows = whole if len(group.weights) == 1 else part_of(whole, i)
        bias = _bias(loader.file, weight, dtype) if weight.bias else None
        if weight.of.headed:
            setattr(parent, name, QuantizedMultiLinear(rows))
            continue
        cls = QuantizedLinear if whole.experts is None else QuantizedSwitchLinear
        setattr(parent, name, cls(rows, bias, Place(whole, i)))


def _note(account: Account, weight: WeightPlan, nbytes: int) -> None:
    """A matrix whose type has no kernel, unless it is dense in the file too."""
    names = {s.format.name for s in weight.weight if s.format.quantized}
    if names:
        entry = account.dequantized.setdefault(" and ".join(sorted(names)), [0, 0, 0])
        stored = sum(source.nbytes for source in weight.weight)
        for j, amount in enumerate((1, stored, nbytes)):
            entry[j] += amount


def make_module(
    file: GGUFFile,
    weight: WeightPlan,
    dtype: mx.Dtype,
    stock: nn.Module | mx.array,
    *,
    dense: bool,
) -> nn.Module | mx.array:
    """The one place where rows of the file become a module of the model, or a bare array.

    Args:
        stock: what mlx-lm has at that place, not evaluated; a norm keeps it for its epsilon.
        dense: whether a matrix is dequantised now, or its rows at every call.
    """
    rows = FileRows(file, weight.weight, mapped=not dense)
    if (weight.of.dense or weight.of.headed) and isinstance(stock, nn.Module):
        whole = _dense(rows, (math.prod(weight.shape[:-1]), weight.shape[-1]), dtype)
        stock.weight = whole.reshape(weight.shape)
        return stock
    if len(weight.shape) == 1 or weight.of.log:
        found = rows(0, weight.shape[0])
        if weight.of.log:
            # Rounding the logarithm moves exp of it by 4e-7 of it, for 1e-3 to 1e3.
            if not np.all(found < 0):
                raise GGUFError(file.path, f"{weight.weight[0].tensor.name} must be negative")
            found = np.log(-found.astype(np.float64)).astype(np.float32)
        values = mx.array(found)
        if isinstance(stock, mx.array):
            return values if weight.of.float32 else values.astype(dtype)
        stock.weight = (values - weight.of.offset).astype(dtype)
        if weight.bias:
            stock.bias = _bias(file, weight, dtype)
        return stock
    if weight.of.bare:
        return _dense(rows, (weight.shape[0], weight.shape[1]), dtype)
    # Experts' matrices one below the other.
    shape = (math.prod(weight.shape[:-1]), weight.shape[-1])
    if isinstance(stock, nn.Embedding):
        if dense:
            return Embedding(_dense(rows, shape, dtype))
        return StreamedEmbedding(rows, shape, dtype)
    if isinstance(stock, nn.Conv1d):  # of each channel alone
        stock.weight, stock.groups = _dense(rows, shape, dtype)[..., None], shape[0]
        if weight.bias:
            stock.bias = _bias(file, weight, dtype)
        return stock
    bias = _bias(file, weight, dtype) if weight.bias else None
    if len(weight.shape) == 3:
        if dense:
            return SwitchLinear(_dense(rows, shape, dtype).reshape(weight.shape), bias)
        return StreamedSwitchLinear(rows, weight.shape[:2], bias)
    if dense:
        return Linear(_dense(rows, shape, dtype), bias)
    return StreamedLinear(rows, shape, bias)


def _bias(file: GGUFFile, weight: WeightPlan, dtype: mx.Dtype) -> mx.array:
    found = mx.array(FileRows(file, weight.bias, mapped=False)(0, weight.shape[0])).astype(dtype)
    return mx.zeros_like(found) if weight.silent else found


class FileRows:
    """Rows of a weight as float32, dequantised at every call.

    mapped: from the mapped file. False reads the bytes now, so that a file that has become
    shorter is a GGUFError and no crash; at every call that would cost a copy.
    """

    def __init__(self, file: GGUFFile, sources: tuple[RowSource, ...], *, mapped: bool) -> None:
        self._parts = [(s, s.bytes(file, mapped=mapped), s.order()) for s in sources]
        self._factors = [s.factors(file) for s in sources]

    def __call__(self, start: int, stop: int) -> np.ndarray:
        """Rows [start, stop) of the model's weight, float32 [stop - start, columns]."""
        found = []
        for (source, data, order), factors in zip(self._parts, self._factors, strict=True):
            rows = slice(max(0, start), max(0, min(stop, len(data))))
            start, stop = start - len(data), stop - len(data)
            if rows.start < rows.stop:
                # A fancy index copies the file's bytes of these rows, not the float rows.
                picked = data[rows] if order is None else data[order[rows]]
                shape = (len(picked), *source.shape[1:][-1:])
                found.append(dequantize(picked, source.format, shape, pool=POOL))
                if factors is not None:
                    found[-1] *= factors[rows]
        return found[0] if len(found) == 1 else np.concatenate(found)


def _dense(rows: FileRows, shape: tuple[int, int], dtype: mx.Dtype) -> mx.array:
    """A whole matrix in ``dtype``, a chunk of float32 at a time."""
    step = max(1, CHUNK // shape[1])
    chunks = []
    for start in range(0, shape[0], step):
        chunks.append(mx.array(rows(start, min(start + step, shape[0]))).astype(dtype))
        mx.eval(chunks[-1])
    return chunks[0] if len(chunks) == 1 else mx.concatenate(chunks)


def _set_ropes(file: GGUFFile, model: nn.Module, config: Config) -> None:
    """Give every attention the rotary embedding of the file, not one that mlx-lm derives."""
    made = {rope: _rope(file, rope) for rope in {config.rope, *config.ropes} if rope is not None}
    for i, layer in enumerate(model.layers):
        rope, attention = config.rope_of(i), layer.get(config.architecture.attention_at)
        if rope is not None:
            if "rope" not in attention:
                raise UnsupportedError(
                    f"this version of mlx-lm has another {config.architecture.name} model: "
                    f"layer {i} has no rotary embedding there, and has one in the file"
                )
            attention.rope = made[rope]
            indexer = attention.get("indexer", {})
            if "rope" in indexer:
                pairs = bool(config.args["indexer_rope_interleave"])
                indexer.rope = _rope(file, replace(rope, pairs=pairs))
        elif attention is not None and hasattr(attention.get("rope"), "dims"):
            attention.rope = NoRoPE()


def _rope(file: GGUFFile, rope: Rope) -> nn.Module:
    if rope.plain:
        return nn.RoPE(rope.dims, traditional=rope.pairs, base=rope.base)
    factors = None
    if rope.factors:
        tensor = file.tensors[rope.factors]
        factors = dequantize(file.read(tensor), tensor.format, tensor.shape)[: rope.dims // 2]
        if not np.all(factors > 0):
            raise GGUFError(file.path, f"{rope.factors} has values that are not positive")
    return FrequencyRoPE(mx.array(rope.periods(factors)), rope.scale, pairs=rope.pairs)


def _check_parameters(model: nn.Module, weights: Plan) -> None:
    """mlx-lm's model has exactly the weights that the file will fill, in the same shapes."""
    arch = weights.config.architecture
    filled = {w.parameter: lean(w.shape) for p in (weights.outer, *weights.layers) for w in p}
    parameters: Any = tree_flatten(model.parameters())
    expected = {
        name: lean(value.shape)  # a convolution of each channel alone has an axis of 1
        for name, value in parameters
        # A linear has the biases that the file has.
        if not name.endswith(".bias") and name not in weights.config.values
    }
    zeros = {
        f"{arch.layers_at}.{i}.{weight.module}"
        for i in range(weights.config.layers)
        for weight in weights.config.weights_of(i).values()
        if weight.zero
    }
    expected = {n: shape for n, shape in expected.items() if n in filled or n not in zeros}
    if wrong := sorted(filled.items() ^ expected.items()):
        name, _ = wrong[0]
        raise UnsupportedError(
            f"this version of mlx-lm has another {arch.name} model: "
            f"{name} is {filled.get(name)} in the file and {expected.get(name)} in mlx-lm"
        )
