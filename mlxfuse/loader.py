"""A GGUF file, an export or an MLX-LM checkpoint -> mlx-lm model and tokenizer, fused."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn

from .errors import UnsupportedError
from .fusion import PatchReport, chosen, patch_model
from .gguf.exported import ExportedFile, open_model
from .hub.bars import bars
from .hub.folders import is_checkpoint
from .hub.resolve import resolve
from .inspect.needs import PLAIN, KVBits
from .inspect.room import Asked, machine, room_for
from .kernels import unavailable
from .kernels.weight import type_name
from .models import Architecture
from .models.adapters import apply_adapter
from .models.build import build
from .models.checkpoint import load_checkpoint
from .models.config import read_config
from .models.part import Part
from .models.plan import plan, stored_rows
from .models.sampling import recommended
from .models.streams import Account
from .nn.kv.options import KVOptions
from .sharing import Sharing
from .tokenizer.load import load_tokenizer

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}

_LONG = 5.0  # seconds of relayout


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What loading did, as ``model.load_report``.

    seconds      wall-clock time of each step: header, tokenizer, read, relayout, dequantize,
                 self-test; a step that was not needed is absent.
    dequantized  quantised type without a kernel -> [matrices, bytes in the file, bytes in memory];
                 0 bytes in memory if they are dequantised at every call.
    patch        what was fused.
    ways         ``mapped``, ``read`` or ``relaid`` -> bytes of weights: over the pages of an
                 exported folder's files, without a copy; read from them into memory, where MLX
                 maps nothing; or laid out anew from the blocks of a GGUF file.
    sampling     the sampling options that the file recommends, under mlx-lm's names.
    notes        what the file asks for and does not get.
    """

    seconds: dict[str, float]
    dequantized: dict[str, list[int]]
    patch: PatchReport
    sampling: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    ways: dict[str, int] = field(default_factory=dict)

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        seconds = {name.replace("-", "_"): value for name, value in self.seconds.items()}
        return {
            "seconds": seconds,
            "dequantized": self.dequantized,
            "ways": self.ways,
            "patch": self.patch.as_dict(),
            "sampling": self.sampling,
            "notes": self.notes,
        }

    def lines(self) -> list[str]:
        """What takes more memory than its file, or is slow, or is not as the file asks."""
        relayout = self.seconds.get("relayout", 0.0)
        offer = (
            f"Laying out the weights took {relayout:.0f} s; `mlxfuse export MODEL FOLDER` stores "
            "them so that loading FOLDER does without"
        )
        return (
            self.notes
            + [offer] * (relayout > _LONG)
            + [
                f"{name} has no kernel: {count} matrices of {stored / 1e6:.1f} MB "
                + (f"take {held / 1e6:.1f} MB" if held else "are dequantised at every call")
                for name, (count, stored, held) in self.dequantized.items()
            ]
        )


def load(
    path_or_hf_repo: str | os.PathLike[str] | None = None,
    tokenizer_config: Mapping[str, Any] | None = None,
    model_config: Mapping[str, Any] | None = None,
    adapter_path: str | os.PathLike[str] | None = None,
    lazy: bool = False,
    return_config: bool = False,
    revision: str | None = None,
    trust_remote_code: bool = False,
    *,
    dtype: mx.Dtype | str | None = None,
    context_length: int | None = None,
    fuse: str | Iterable[str] = "auto",
    act_quant: str = "auto",
    kv_bits: int | str | None = None,
    kv_group_size: int = 64,
    ignore_memory: bool = False,
    kv_layers: str = "all",
    progress: Callable[[float], None] | None = None,
    group: mx.distributed.Group | None = None,
    pipeline: bool = False,
) -> tuple[Any, ...]:
    """Load a model: the same arguments and the same pair as ``mlx_lm.load``, and a few more.

    Args:
        path_or_hf_repo: a .gguf file; a folder with one, with an MLX-LM checkpoint, or that
            ``mlxfuse export`` wrote; ``org/repo[@revision]:Q4_K_M``; or None for the demo model.
        tokenizer_config: as for ``mlx_lm.load``; of a GGUF file ``chat_template`` and the special
            tokens, such as ``eos_token``.
        model_config: as for ``mlx_lm.load``: values that replace those of the configuration.
        adapter_path: a folder with a LoRA adapter that ``mlx_lm.lora`` wrote; machines that share a
            model share it too.
        lazy: as for ``mlx_lm.load``; the weights of a GGUF file are always read at once.
        return_config: also return the model's configuration.
        revision: branch, tag or commit of the repository.
        trust_remote_code: only False: mlxfuse never runs code that comes with a model.
        dtype: type of activations and dense weights: float32, float16 or bfloat16. By default
            that of an MLX-LM checkpoint; for other models float32 on CPU and, on Metal, float16
            or, for the architectures whose residual stream leaves its range, bfloat16.
        context_length: tokens the model will be used with, by default as many as it was made for.
            Only ``longrope`` models (Phi-3) depend on it: above their original context they use
            their long rotary factors, else the short ones, as llama.cpp does with ``-c``.
        fuse: what `patch_model` fuses: ``auto``, ``all``, ``off`` or names. Matrices of the types
            that have a kernel stay as they are in the file where kernels run, or where something
            is to be fused; elsewhere they are dequantised.
        act_quant: ``auto``, ``on`` or ``off``: see `patch_model`. Of a model that machines share,
            what the last matrices of attention and MLP read stays in floats.
        kv_bits: compress the key-value caches that mlx-lm makes for the model: 8 or 4, or keys
            and values apart as in ``k8v4``. Keys and values are rotated first.
        kv_group_size: values of a head that share a scale: 32, 64 or 128.
        ignore_memory: load a model that does not fit; what has no kernel and no room is then
            dequantised at every call.
        kv_layers: ``all``, or ``full`` to leave layers with a sliding window plain.
        progress: called with the share of the weights that is in memory, 0 to 1.
        group: the machines that share the model, as ``mx.distributed.init`` gives them; each of
            them calls ``load`` with the same arguments, reads and keeps its own part, and gets
            the same logits. None, or a group of one: this process alone, which under
            ``mlx.launch`` too loads all of the model and runs it by itself. Tokens are to be
            chosen by one for all: `mlxfuse.ranks.agreed`.
        pipeline: each machine of the group has some layers, one after the other, and not a part
            of each layer: for slow links, and models whose heads cannot be shared. One chat is
            then no faster than on one machine.

    Returns:
        (model, tokenizer), with ``return_config`` (model, tokenizer, configuration);
        ``model.load_report`` tells what was done. Some files ask that certain tokens are never
        generated; mlx-lm's own ``generate`` needs to be told, by
        ``logits_processors=make_logits_processors(tokenizer.suppressed)``.

    Raises:
        DoesNotFitError: the model, with a cache for ``context_length`` tokens (by default those it
            was made for, at most 4096), takes more memory than there is for it.
        ModelRefError: nothing has that name.
        DownloadError: it cannot be downloaded.
        ExportError, CheckpointError: the folder, or the adapter, is not as it was written.
        GGUFError: the file is malformed, or its tensors contradict its metadata.
        UnsupportedError: the architecture, a tensor type or a feature is not supported.
        ValueError: ``kv_bits``, ``kv_group_size`` or ``kv_layers`` is not one of these,
            ``context_length`` is less than 1, or there is a ``pipeline`` without a ``group``.
        RanksError: on all of ``group``, if versions, arguments or the model's files differ there.
    """
    if trust_remote_code:
        raise UnsupportedError("trust_remote_code: mlxfuse never runs code that comes with a model")
    if context_length is not None and context_length < 1:
        raise ValueError(f"context_length is {context_length}; expected at least one token")
    sharing = Sharing.among(group, pipeline)
    kv: dict[str, Any] = {
        "kv_bits": kv_bits,
        "kv_group_size": kv_group_size,
        "kv_layers": kv_layers,
    }
    asked = Asked(context_length, _cache_bits(**kv), ignore_memory)  # refused before any reading
    account = Account(progress=progress)
    path = _on_this_machine(path_or_hf_repo, revision)
    changes = Changes(dict(tokenizer_config or {}), dict(model_config or {}))
    if not isinstance(fuse, str) and isinstance(fuse, Iterable):
        fuse = ",".join(sorted(map(str, fuse)))  # the same on all machines
    if sharing is not None:
        told = (dtype, context_length, fuse, act_quant, kv, changes)
        sharing.begin(path, told, None if adapter_path is None else Path(adapter_path))
    if is_checkpoint(path):
        if context_length is not None:
            raise UnsupportedError(f"{path}: context_length is for GGUF files; leave it out")
        opened = _open_checkpoint(path, dtype, changes, lazy, account, sharing)
    else:
        quantized = unavailable() is None or bool(chosen(fuse))
        opened = _open_gguf(path, dtype, changes, asked, quantized, account, sharing)
    if adapter_path is not None:
        apply_adapter(opened.model, Path(adapter_path), opened.part)
    if opened.part is not None:
        opened.part.join(opened.model)
    patch = patch_model(opened.model, fuse=fuse, act_quant=act_quant, **kv)
    if sharing is not None:
        sharing.end(opened.model, patch)
    opened.model.load_report = _report(account, opened, patch)
    pair = (opened.model, opened.tokenizer)
    return (*pair, opened.config) if return_config else pair


def _cache_bits(kv_bits: int | str | None, kv_group_size: int, kv_layers: str) -> KVBits:
    """How many bits the caches take; ValueError for what `patch_model` would refuse."""
    options = KVOptions.asked(kv_bits, kv_group_size, kv_layers)
    if options is None:
        return PLAIN
    full_only = options.layers == "full"
    return KVBits(options.k_bits, options.v_bits, options.group_size, full_only)


def _on_this_machine(name: str | os.PathLike[str] | None, revision: str | None) -> Path:
    """Where the model's files are, downloaded if need be."""
    ref = None if name is None else os.fspath(name)
    with bars() as downloading:
        return resolve(ref, revision=revision, progress=downloading, note=_warn)


def _report(account: Account, opened: Opened, patch: PatchReport) -> LoadReport:
    seconds = dict(account.seconds)
    if patch.self_test_seconds:
        seconds["self-test"] = patch.self_test_seconds
    ways = dict(account.ways)
    return LoadReport(seconds, account.dequantized, patch, opened.sampling, opened.notes, ways)


@dataclass(frozen=True, slots=True)
class Changes:
    """What a script wants otherwise than the model's files have it."""

    tokenizer: dict[str, Any]
    model: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Opened:
    """A model that is not fused yet; see `LoadReport` for ``sampling`` and ``notes``.

    part  what of it this rank has, if several machines share it; not joined yet.
    """

    model: nn.Module
    tokenizer: TokenizerWrapper
    config: dict[str, Any]
    sampling: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    part: Part | None = None


def _open_checkpoint(
    path: Path,
    dtype: mx.Dtype | str | None,
    changes: Changes,
    lazy: bool,
    account: Account,
    sharing: Sharing | None,
) -> Opened:
    group = None if sharing is None else sharing.of_checkpoint(path)
    wanted = None if dtype is None else named_dtype(dtype)
    with account.time("read"):
        model, tokenizer, config = load_checkpoint(
            path,
            dtype=wanted,
            tokenizer_config=changes.tokenizer,
            model_config=changes.model,
            lazy=lazy,
            group=group,
            progress=account.progress,
        )
    notes = [] if group is None else [f"{group.size()} machines share the model, as mlx-lm does"]
    return Opened(model, tokenizer, config, notes=notes)


def _open_gguf(
    path: Path,
    dtype: mx.Dtype | str | None,
    changes: Changes,
    asked: Asked,
    quantized: bool,
    account: Account,
    sharing: Sharing | None,
) -> Opened:
    with ExitStack() as stack:
        with account.time("header"):
            file = stack.enter_context(open_model(path))
            try:
                config = read_config(file, asked.context)
                config = replace(config, args={**config.args, **changes.model})
                weights = plan(file, config)
            except UnsupportedError as error:
                named = str(path) in str(error)
                raise (error if named else UnsupportedError(f"{path}: {error}")) from None
            part = None if sharing is None else sharing.part(path, weights)
            own = weights if part is None else part.share.plan
            room = room_for(file, own, machine(quantized), asked)
            if isinstance(file, ExportedFile):
                file.arrange(stored_rows(weights))
        with account.time("tokenizer"):
            tokenizer = load_tokenizer(file)
            _change(tokenizer, changes.tokenizer)
            sampling, notes = recommended(file.metadata)
        activations = activation_dtype(config.architecture, dtype)
        model = build(
            file, weights, activations, room, quantized=quantized, account=account, part=part
        )
    if part is not None:
        notes = [str(part.share), *part.share.notes, *notes]
    return Opened(model, tokenizer, dict(config.args), sampling, notes, part)


# What a tokenizer_config may change of a GGUF file's tokenizer.
_CHANGEABLE = ("chat_template", "bos_token", "eos_token", "pad_token", "unk_token")


def _change(tokenizer: TokenizerWrapper, changes: Mapping[str, Any]) -> None:
    for name, value in changes.items():
        if name == "trust_remote_code":
            continue  # a GGUF file has no code
        if name not in _CHANGEABLE:
            raise UnsupportedError(
                f"tokenizer_config: {name} cannot be changed for a GGUF file; expected "
                + ", ".join(_CHANGEABLE)
            )
        setattr(tokenizer._tokenizer, name, value)
        if name == "eos_token":
            tokenizer.eos_token_ids = {tokenizer.convert_tokens_to_ids(value)}
        if name == "chat_template":
            tokenizer.has_chat_template = value is not None


def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=3)


def named_dtype(dtype: mx.Dtype | str) -> mx.Dtype:
    """A type of activations by its name.

    Raises:
        ValueError: it is none.
    """
    if isinstance(dtype, mx.Dtype):
        dtype = type_name(dtype)
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype}; expected {', '.join(DTYPES)}")
    return DTYPES[dtype]


def activation_dtype(arch: Architecture, dtype: mx.Dtype | str | None = None) -> mx.Dtype:
    """The type that ``load`` uses; see there."""
    if dtype is None:
        dtype = arch.metal_dtype if mx.default_device() == mx.gpu else "float32"
    return named_dtype(dtype)
