"""`patch_model`: fused forms over a model's modules; `unpatch_model`: off again."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from .. import env
from ..errors import MLXFuseError, PatchError
from ..kernels import unavailable
from ..kernels.matmul.product import MAX_ROWS_PER_EXPERT
from ..kernels.runtime import self_test
from ..nn.experts import QuantizedSwitchLinear
from ..nn.fused import Form
from ..nn.kv.options import KVOptions, check_model, compress_caches
from ..nn.projection import MAX_IDS
from ..nn.quantized import QuantizedLinear
from . import int8
from .candidates import DETECTORS, Detector, Tree
from .checks import check_logits
from .choose import choose
from .dispatches import per_token
from .options import Choice, chosen
from .report import PatchReport


@dataclass
class _Patch:
    """What was done to a model; kept by the model, outside its tree."""

    asked: tuple[object, ...]
    report: PatchReport

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        """A copy of a patched model, or a pickle of it, is the model without the patch."""
        return type(None), ()


def patch_model(
    model: nn.Module,
    *,
    fuse: str | Iterable[str] = "auto",
    act_quant: str = "auto",
    kv_bits: int | str | None = None,
    kv_group_size: int = 64,
    kv_layers: str = "all",
    check: bool = False,
    strict: bool = False,
    detectors: Iterable[Detector] = (),
) -> PatchReport:
    """Speed up a model of mlx-lm, from ``mlx_lm.load`` or ``mlxfuse.load``, in place.

    Only what is proven to compute the same is fused; every other place is named in the report
    with the reason. Names, values and sizes of the parameters stay, so ``save_weights`` and
    adapters go on; the arrays of linears that are joined become views of the joined one, and no
    weight is held twice. In training mode, and where parameters have been replaced or changed in
    place since, the model's own code runs. Patching again changes nothing, unless the arguments
    are others or parameters have been changed: then the model is patched anew. A copy or a pickle
    of a patched model is the model without the patch, which may be patched for itself.

    Args:
        model: the model; only this instance is changed.
        fuse: ``auto`` (all where kernels run, else nothing, with the reason), ``all``, ``off``, or
            names of fusions, as a string with commas or one by one. ``-name`` leaves one out and
            ``-name:pattern``
            leaves it out at the paths that match, for example ``-qkv:model.layers.0.*``. The
            environment variable ``MLXFUSE_DISABLE``, which is read when a model is patched,
            leaves out too. Only ``int8`` in it is heeded at any later time as well.
        act_quant: ``on`` rounds the activations of attention and MLP to int8, in groups of 32,
            wherever what reads them takes that; ``auto`` does where it was measured to be
            faster, which so far is nowhere; ``off`` never does. It costs some quality.
        kv_bits: let mlx-lm make compressed key-value caches for the model: 8 or 4, or keys and
            values apart as in ``k8v4``; None for plain ones, also if they were compressed before.
            mlx-lm's own quantised caches, of its ``kv_bits``, are read by a kernel in any case.
        kv_group_size: values of a head that share a scale: 32, 64 or 128.
        kv_layers: ``all``, or ``full`` to leave layers with a sliding window plain.
        check: compare the patched model's logits with the unpatched one's on a random prompt, with
            float activations.
        strict: raise where a fusion would be skipped, or activations not rounded.
        detectors: more detectors, for this call; see `register_detector`.

    Raises:
        FusionNameError: no such fusion.
        TypeError: the model is none, or ``fuse`` is no text.
        ValueError: ``act_quant`` is none of the three, or ``kv_bits``, ``kv_group_size`` or
            ``kv_layers`` is not one of these.
        UnsupportedError: the model cannot do with compressed caches.
        PatchError: ``strict`` and something cannot be fused, or ``check`` and the logits differ;
            the model then has no patch.
    """
    _check_is_model(model)
    if act_quant not in ("auto", "on", "off"):
        raise ValueError(f"act_quant is auto, on or off; found {act_quant!r}")
    kv = KVOptions.asked(kv_bits, kv_group_size, kv_layers)
    choice = chosen(fuse)
    more = tuple(detectors)
    asked = (choice, more, act_quant == "on", kv)
    patch = getattr(model, "_mlxfuse_patch", None)
    if isinstance(patch, _Patch):
        told = not check and not (strict and patch.report.skipped)
        if patch.asked == asked and told and _holds(model):
            return patch.report
        unpatch_model(model)
    if kv is not None:
        check_model(model, kv)
    report = PatchReport(nothing=choice.nothing)
    if strict and choice.nothing:
        raise PatchError(f'nothing can be fused: {choice.nothing}; fuse="all" does without')
    if choice or more or kv is not None or (act_quant == "on" and not choice.nothing):
        before = check_logits(model) if check else None
        mx.eval(model.parameters())
        report.bytes_before = mx.get_active_memory()
        _fuse(model, (*(DETECTORS[name] for name in choice.names), *more), choice, report, strict)
        report.bytes_after = mx.get_active_memory()
        if before is not None:
            report.check = before.verify(model, report.fused)
        if act_quant == "on":
            _fuse(model, (int8.places,), choice, report, strict)
        report.count = _counting(model)
        model._mlxfuse_patch = _Patch(asked, report)
    if _has_kernels(model, report):
        try_kernels(model, report, (1,))
        self_test.on_first_use()
    if kv is not None:
        compress_caches(model, kv)
    return report


def _check_is_model(given: object) -> None:
    if not isinstance(given, nn.Module):
        hint = "; take it apart first: model, tokenizer = load(...)" * isinstance(given, tuple)
        raise TypeError(f"patch_model takes a model, found a {type(given).__name__}{hint}")


def unpatch_model(model: nn.Module) -> None:
    """Undo `patch_model`: the same modules of the same classes, with the same bytes."""
    patch = getattr(model, "_mlxfuse_patch", None)
    if isinstance(patch, _Patch):
        for candidate in reversed(patch.report.fused):
            candidate.undo()
        if patch.asked[-1] is not None:
            del model.make_cache  # the instance's; the class's is there again
        del model._mlxfuse_patch


def _holds(model: nn.Module) -> bool:
    """Whether the model has the arrays that were fused."""
    forms = (vars(module).get("_fused") for module in model.modules())
    return all(form.holds() for form in forms if isinstance(form, Form))


def _fuse(
    model: nn.Module,
    detectors: Iterable[Detector],
    choice: Choice,
    report: PatchReport,
    strict: bool,
) -> None:
    """Find, choose and emit what some detectors see in the model as it is now."""
    tree = Tree.of(model)
    places = [place for detector in detectors for place in detector(tree)]
    fused, skipped = choose(tree, places, choice)
    report.add(places, fused, skipped)
    if strict and skipped:
        for candidate in reversed(report.fused):
            candidate.undo()
        raise PatchError(
            "not everything can be fused:\n"
            + "\n".join(f"{s.name} of {s.path}: {s.reason}" for s in report.skipped)
        )
    for candidate in fused:
        candidate.emit()


def _counting(model: nn.Module) -> Callable[[], tuple[int, int] | None]:
    """`per_token` of the model, if there still is one and it is patched."""
    there = weakref.ref(model)

    def count() -> tuple[int, int] | None:
        model = there()
        if model is None or not hasattr(model, "_mlxfuse_patch"):
            return None
        try:
            return per_token(model)
        except (MLXFuseError, TypeError, ValueError):
            return None  # a model that is called in another way, or has a cache of its own

    return count


def _has_kernels(model: nn.Module, report: PatchReport) -> bool:
    """Whether the model will use kernels that are neither emulated nor unable to run."""
    layers = QuantizedLinear | QuantizedSwitchLinear
    if not report.fused and not any(isinstance(m, layers) for m in model.modules()):
        return False
    return env.get("MLXFUSE_KERNELS") != "emulated" and unavailable() is None


def try_kernels(model: nn.Module, report: PatchReport, lengths: Sequence[int]) -> None:
    """Try the kernel variants that the model uses for sequences of these lengths."""
    start = time.perf_counter()

    def run() -> None:
        for length in lengths:
            model(mx.zeros((1, length), mx.int32))

    disabled = self_test.check(self_test.calls(run))
    report.disabled |= {program.op: reason for program, reason in disabled.items()}
    report.self_test_seconds += time.perf_counter() - start


def try_every_length(model: nn.Module, report: PatchReport) -> None:
    """`try_kernels` of all that prompts and batches may need, for ranks, which have to agree."""
    if _has_kernels(model, report):
        layers = [m for m in model.modules() if isinstance(m, QuantizedSwitchLinear)]
        experts = max((m.weight.experts or 1 for m in layers), default=0)
        # So many that ids are sorted.
        many = [max(MAX_IDS, MAX_ROWS_PER_EXPERT * experts + 1)] if experts else []
        try_kernels(model, report, (*self_test.LENGTHS, *many))
