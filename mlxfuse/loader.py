"""GGUF file -> mlx-lm model and tokenizer."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import mlx.core as mx
import mlx.nn as nn

from .errors import UnsupportedError
from .fusion import PatchReport, chosen, patch_model
from .gguf.exported import ExportedFile, open_model
from .hub.resolve import resolve
from .kernels import unavailable
from .kernels.weight import type_name
from .models import Architecture
from .models.build import build
from .models.config import read_config
from .models.plan import plan, stored_rows
from .models.sampling import recommended
from .models.streams import Account
from .nn.kv.options import KVOptions
from .tokenizer.load import load_tokenizer

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What loading did, as ``model.load_report``.

    seconds      wall-clock time of each step: header, tokenizer, read, relayout, dequantize,
                 self-test; a step that was not needed is absent.
    dequantized  quantised type without a kernel -> [matrices, bytes in the file, bytes in memory];
                 0 bytes in memory if they are dequantised at every call.
    patch        what was fused.
    sampling     the sampling options that the file recommends, under mlx-lm's names.
    notes        what the file asks for and does not get.
    """

    seconds: dict[str, float]
    dequantized: dict[str, list[int]]
    patch: PatchReport
    sampling: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        seconds = {name.replace("-", "_"): value for name, value in self.seconds.items()}
        return {
            "seconds": seconds,
            "dequantized": self.dequantized,
            "patch": self.patch.as_dict(),
            "sampling": self.sampling,
            "notes": self.notes,
        }

    def lines(self) -> list[str]:
        """What takes more memory than its file, or is slow, or is not as the file asks."""
        return self.notes + [
            f"{name} has no kernel: {count} matrices of {stored / 1e6:.1f} MB "
            + (f"take {held / 1e6:.1f} MB" if held else "are dequantised at every call")
            for name, (count, stored, held) in self.dequantized.items()
        ]


def load(
    ref: str | os.PathLike[str] | None = None,
    *,
    dtype: mx.Dtype | str | None = None,
    revision: str | None = None,
    context_length: int | None = None,
    fuse: str | Iterable[str] = "auto",
    act_quant: str = "auto",
    kv_bits: int | str | None = None,
    kv_group_size: int = 64,
) -> tuple[nn.Module, TokenizerWrapper]:
    """Load a GGUF file: the same pair as ``mlx_lm.load``.

    Args:
        ref: a path, also of a folder that ``mlxfuse export`` wrote,
            ``org/repo[@revision]:Q4_K_M``, or None for the demo model.
        dtype: type of activations and dense weights: float32, float16 or bfloat16. By default
            float32 on CPU and, on Metal, float16 or, for the architectures whose residual stream
            leaves its range, bfloat16.
        revision: branch, tag or commit of the repository.
        context_length: tokens the model will be used with, by default as many as it was made for.
            Only ``longrope`` models (Phi-3) depend on it: above their original context they use
            their long rotary factors, else the short ones, as llama.cpp does with ``-c``.
        fuse: what `patch_model` fuses: ``auto``, ``all``, ``off`` or names. Matrices of the types
            that have a kernel stay as they are in the file where kernels run, or where something
            is to be fused; elsewhere they are dequantised.
        act_quant: ``auto``, ``on`` or ``off``: see `patch_model`.
        kv_bits: compress the key-value caches that mlx-lm makes for the model: 8 or 4, or keys
            and values apart as in ``k8v4``. Keys and values are rotated first.
        kv_group_size: values of a head that share a scale: 32, 64 or 128.

    Raises:
        ModelRefError: nothing has that name.
        DownloadError: it cannot be downloaded.
        ExportError: the exported folder is not as it was written.
        GGUFError: the file is malformed, or its tensors contradict its metadata.
        UnsupportedError: the architecture, a tensor type or a feature is not supported.
        ValueError: ``kv_bits`` or ``kv_group_size`` is not one of these.
    """
    if kv_bits is not None:
        KVOptions.parse(kv_bits, kv_group_size)  # refused before anything is read
    account = Account()
    quantized = unavailable() is None or bool(chosen(fuse))
    path = resolve(None if ref is None else os.fspath(ref), revision=revision)
    with ExitStack() as stack:
        with account.time("header"):
            file = stack.enter_context(open_model(path))
            try:
                weights = plan(file, read_config(file, context_length))
            except UnsupportedError as error:
                named = str(path) in str(error)
                raise (error if named else UnsupportedError(f"{path}: {error}")) from None
            if isinstance(file, ExportedFile):
                file.arrange(stored_rows(weights))
        with account.time("tokenizer"):
            tokenizer = load_tokenizer(file)
            sampling, notes = recommended(file.metadata)
        activations = activation_dtype(weights.config.architecture, dtype)
        model = build(file, weights, activations, quantized=quantized, account=account)
    patch = patch_model(
        model, fuse=fuse, act_quant=act_quant, kv_bits=kv_bits, kv_group_size=kv_group_size
    )
    if patch.self_test_seconds:
        account.seconds["self-test"] = patch.self_test_seconds
    model.load_report = LoadReport(
        dict(account.seconds), account.dequantized, patch, sampling, notes
    )
    return model, tokenizer


def activation_dtype(arch: Architecture, dtype: mx.Dtype | str | None = None) -> mx.Dtype:
    """The type that ``load`` uses; see there."""
    if isinstance(dtype, mx.Dtype):
        dtype = type_name(dtype)
    if dtype is None:
        dtype = arch.metal_dtype if mx.default_device() == mx.gpu else "float32"
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype}; expected {', '.join(DTYPES)}")
    return DTYPES[dtype]
