"""GGUF file -> mlx-lm model and tokenizer."""

from __future__ import annotations

import math
import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from .errors import GGUFError, UnsupportedError
from .gguf.blocks import dequantize
from .gguf.reader import GGUFFile, open_gguf
from .gguf.tokenizer import load_tokenizer
from .hub import resolve
from .models.config import Architecture, Config, Rope, read_config
from .models.plan import Plan, RowSource, WeightPlan, plan
from .nn.rope import FrequencyRoPE

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

# float32 values that are dequantised at a time: 256 MiB.
CHUNK = 1 << 26
DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}


def load(
    ref: str | os.PathLike[str] | None = None,
    *,
    dtype: mx.Dtype | str | None = None,
    revision: str | None = None,
    context_length: int | None = None,
) -> tuple[nn.Module, TokenizerWrapper]:
    """Load a GGUF file: the same pair as ``mlx_lm.load``.

    Args:
        ref: a path, ``org/repo[@revision]:Q4_K_M``, or None for the demo model.
        dtype: type of activations and dense weights: float32, float16 or bfloat16. By default
            float32 on CPU and, on Metal, float16 or, for the architectures whose residual stream
            leaves its range, bfloat16.
        revision: branch, tag or commit of the repository.
        context_length: tokens the model will be used with, by default as many as it was made for.
            Only ``longrope`` models (Phi-3) depend on it: above their original context they use
            their long rotary factors, else the short ones, as llama.cpp does with ``-c``.

    Raises:
        ModelRefError: nothing has that name.
        DownloadError: it cannot be downloaded.
        GGUFError: the file is malformed, or its tensors contradict its metadata.
        UnsupportedError: the architecture, a tensor type or a feature is not supported.
    """
    path = resolve(None if ref is None else os.fspath(ref), revision=revision)
    with open_gguf(path) as file:
        weights = plan(file, read_config(file, context_length))
        tokenizer = load_tokenizer(file)
        model = build(file, weights, activation_dtype(weights.config.architecture, dtype))
    return model, tokenizer


def activation_dtype(arch: Architecture, dtype: mx.Dtype | str | None = None) -> mx.Dtype:
    """The type that ``load`` uses; see there."""
    if isinstance(dtype, mx.Dtype):
        dtype = str(dtype).removeprefix("mlx.core.")
    if dtype is None:
        dtype = arch.metal_dtype if mx.default_device() == mx.gpu else "float32"
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype}; expected {', '.join(DTYPES)}")
    return DTYPES[dtype]


def build(file: GGUFFile, weights: Plan, dtype: mx.Dtype) -> nn.Module:
    """mlx-lm's model with the file's weights, evaluated layer by layer.

    Host memory above the model itself: one tensor's bytes and, of the weight being made, one
    chunk in float32 and a copy in ``dtype``.
    """
    config = weights.config
    module = import_module(config.architecture.module)
    model: nn.Module = module.Model(module.ModelArgs.from_dict(config.args))
    if hasattr(model, "sanitize"):
        # gemma3 learns here, from the names of the weights, whether its output head is tied.
        model.sanitize({} if config.tied else {"lm_head.weight": None})
    _set_ropes(file, model, config)
    _check_parameters(model, weights)
    for part in (weights.outer, *weights.layers):
        for weight in part:
            parent, name = _parent(model, weight.module)
            made = make_module(file, weight, dtype, getattr(parent, name), config)
            setattr(parent, name, made)
            mx.eval(made.parameters())
    model.eval()
    return model


def make_module(
    file: GGUFFile, weight: WeightPlan, dtype: mx.Dtype, stock: nn.Module, config: Config
) -> nn.Module:
    """The one place where rows of the file become a module of the model.

    Args:
        stock: mlx-lm's module at that place, not evaluated; a norm keeps it for its epsilon.
    """
    if len(weight.shape) == 1:
        values = _dense(file, weight.weight, mx.float32) - config.architecture.norm_offset
        stock.weight = values.astype(dtype)
        return stock
    if isinstance(stock, nn.Embedding):
        stock.weight = _dense(file, weight.weight, dtype)
        return stock
    linear = nn.Linear(1, 1, bias=bool(weight.bias))
    linear.weight = _dense(file, weight.weight, dtype)
    if weight.bias:
        linear.bias = _dense(file, weight.bias, dtype)
    return linear


def _dense(file: GGUFFile, sources: tuple[RowSource, ...], dtype: mx.Dtype) -> mx.array:
    """Rows of the file, dequantised in float32 and rounded to ``dtype``: [rows, columns]."""
    chunks = []
    for source in sources:
        data = source.read(file)
        rest = source.shape[1:]
        step = max(1, CHUNK // max(1, math.prod(rest)))
        for start in range(0, len(data), step):
            rows = data[start : start + step]
            values = dequantize(rows, source.format, (len(rows), *rest))
            chunks.append(mx.array(values).astype(dtype))
            mx.eval(chunks[-1])
    return chunks[0] if len(chunks) == 1 else mx.concatenate(chunks)


def _set_ropes(file: GGUFFile, model: nn.Module, config: Config) -> None:
    """Give every attention the rotary embedding of the file, not one that mlx-lm derives."""
    whole = _rope(file, config.rope)
    sliding = whole if config.rope_swa is None else _rope(file, config.rope_swa)
    period = config.args.get("sliding_window_pattern", 1)
    for i, layer in enumerate(model.layers):
        layer.self_attn.rope = whole if i % period == period - 1 else sliding


def _rope(file: GGUFFile, rope: Rope) -> nn.Module:
    if rope.plain:
        return nn.RoPE(rope.dims, traditional=False, base=rope.base)
    factors = None
    if rope.factors:
        tensor = file.tensors[rope.factors]
        factors = dequantize(file.read(tensor), tensor.format, tensor.shape)
        if not np.all(factors > 0):
            raise GGUFError(file.path, f"{rope.factors} has values that are not positive")
    return FrequencyRoPE(mx.array(rope.periods(factors)), rope.scale)


def _parent(model: nn.Module, path: str) -> tuple[nn.Module, str]:
    *parents, name = path.split(".")
    module: Any = model
    for part in parents:
        module = module[int(part)] if isinstance(module, list) else module[part]
    return module, name


def _check_parameters(model: nn.Module, weights: Plan) -> None:
    """mlx-lm's model has exactly the weights that the file will fill, in the same shapes."""
    filled = {f"{w.module}.weight": w.shape for p in (weights.outer, *weights.layers) for w in p}
    expected = {
        name: value.shape
        for name, value in tree_flatten(model.parameters())
        if not name.endswith(".bias")  # a linear has the biases that the file has
    }
    if wrong := sorted(filled.items() ^ expected.items()):
        name, _ = wrong[0]
        raise UnsupportedError(
            f"this version of mlx-lm has another {weights.config.architecture.name} model: "
            f"{name} is {filled.get(name)} in the file and {expected.get(name)} in mlx-lm"
        )
