"""`patch_model`: fused forms over a model's modules; `unpatch_model`: off again."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from .. import env
from ..errors import PatchError
from ..kernels import unavailable
from ..kernels.matmul.product import MAX_ROWS_PER_EXPERT
from ..kernels.runtime import self_test, tuning
from ..nn.experts import QuantizedSwitchLinear
from ..nn.fused import Form
from ..nn.kv.options import KVOptions, check_model, compress_caches
from ..nn.projection import MAX_IDS
from ..nn.quantized import QuantizedLinear
from . import int8
from .candidates import DETECTORS, Candidate, Detector, Skip, Tree, natural, select, site
from .checks import check_logits
from .dispatches import per_token
from .options import Choice, chosen
from .report import PatchReport, Tally

SLOWER = "`mlxfuse tune` has measured it to be slower here"


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
        fuse: ``auto`` (all where kernels run, else nothing), ``all``, ``off``, or names of fusions,
            as a string with commas or one by one. ``-name`` leaves one out and ``-name:pattern``
            leaves it out at the paths that match, for example ``-qkv:model.layers.0.*``. The
            environment variable ``MLXFUSE_DISABLE`` leaves out too.
        act_quant: ``on`` rounds the activations of attention and MLP to int8, in groups of 32,
            wherever what reads them takes that; ``auto`` does where it was measured to be
            faster, which so far is nowhere; ``off`` never does. It costs some quality.
        kv_bits: let mlx-lm make compressed key-value caches for the model: 8 or 4, or keys and
            values apart as in ``k8v4``; None for plain ones, also if they were compressed before.
        kv_group_size: values of a head that share a scale: 32, 64 or 128.
        check: compare the patched model's logits with the unpatched one's on a random prompt, with
            float activations.
        strict: raise where a fusion would be skipped.
        detectors: more detectors, for this call; see `register_detector`.

    Raises:
        ValueError: no such fusion, or ``act_quant`` is none of the three.
        UnsupportedError: the model cannot do with compressed caches.
        PatchError: ``strict`` and something cannot be fused, or ``check`` and the logits differ;
            the model is then as it was.
    """
    if act_quant not in ("auto", "on", "off"):
        raise ValueError(f"act_quant is auto, on or off; found {act_quant!r}")
    kv = None if kv_bits is None else KVOptions.parse(kv_bits, kv_group_size)
    choice = chosen(fuse)
    more = tuple(detectors)
    asked = (choice, more, act_quant == "on", kv)
    patch = getattr(model, "_mlxfuse_patch", None)
    if isinstance(patch, _Patch):
        if patch.asked == asked and _holds(model):
            return patch.report
        unpatch_model(model)
    if kv is not None:
        check_model(model, kv)
    report = PatchReport()
    if choice or more or kv is not None:
        before = check_logits(model) if check else None
        _fuse(model, choice, more, report, strict=strict)
        if before is not None:
            report.check = before.verify(model, report.fused)
        if act_quant == "on":
            _round(model, choice, report)
        model._mlxfuse_patch = _Patch(asked, report)
    _self_test(model, report)
    if kv is not None:
        compress_caches(model, kv)
    return report


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
    choice: Choice,
    more: tuple[Detector, ...],
    report: PatchReport,
    *,
    strict: bool,
) -> None:
    tree = Tree.of(model)
    modules = dict(tree.modules)
    found: list[Candidate] = []
    for detector in (*(DETECTORS[name] for name in choice.names), *more):
        for place in detector(tree):
            report.tallies.setdefault(place.name, Tally()).total += 1
            reason = choice.refusal(place.name, place.path)
            if reason is not None:
                report.skipped.append(Skip(place.name, place.path, reason))
            elif isinstance(place, Skip):
                report.skipped.append(place)
            elif choice.tuned and tuning.separate(site(place, modules)):
                report.skipped.append(Skip(place.name, place.path, SLOWER))
            else:
                found.append(place)
    fused, rivals = select(found)
    report.skipped += rivals
    order = {name: i for i, name in enumerate(report.tallies)}
    report.skipped.sort(key=lambda s: (order[s.name], natural(s.path)))
    if strict and report.skipped:
        raise PatchError(
            "not everything can be fused:\n"
            + "\n".join(f"{s.name} of {s.path}: {s.reason}" for s in report.skipped)
        )
    mx.eval(model.parameters())
    report.bytes_before = mx.get_active_memory()
    for candidate in fused:
        candidate.emit()
        report.tallies[candidate.name].fused.append(candidate.formats)
    report.fused = sorted(fused, key=lambda c: (order[c.name], natural(c.path)))
    report.bytes_after = mx.get_active_memory()
    report.count = _counting(model)


def _round(model: nn.Module, choice: Choice, report: PatchReport) -> None:
    """Let the layers that are fused use int8 activations."""
    tally = report.tallies.setdefault(int8.NAME, Tally())
    for place in int8.places(Tree.of(model)):
        tally.total += 1
        reason = choice.refusal(place.name, place.path)
        if reason is not None or isinstance(place, Skip):
            why = reason if reason is not None else place[2] if isinstance(place, Skip) else ""
            report.skipped.append(Skip(place.name, place.path, why))
            continue
        place.emit()
        tally.fused.append(())
        report.fused.append(place)


def _counting(model: nn.Module) -> Callable[[], tuple[int, int] | None]:
    """`per_token` of the model, if there still is one and it is patched."""
    there = weakref.ref(model)

    def count() -> tuple[int, int] | None:
        model = there()
        return None if model is None or not hasattr(model, "_mlxfuse_patch") else per_token(model)

    return count


def _self_test(model: nn.Module, report: PatchReport) -> None:
    """Try the kernel variants that the model uses, unless they are emulated or cannot run."""
    modules = list(model.modules())
    experts = [m.weight.experts or 1 for m in modules if isinstance(m, QuantizedSwitchLinear)]
    kernels = report.fused or experts or any(isinstance(m, QuantizedLinear) for m in modules)
    if not kernels or env.get("MLXFUSE_KERNELS") == "emulated" or unavailable() is not None:
        return
    start = time.perf_counter()
    # So many that ids are sorted.
    many = [max(MAX_IDS, MAX_ROWS_PER_EXPERT * max(experts) + 1)] if experts else []

    def run() -> None:
        for length in (*self_test.LENGTHS, *many):
            model(mx.zeros((1, length), mx.int32))

    disabled = self_test.check(self_test.calls(run))
    report.disabled = {program.op: reason for program, reason in disabled.items()}
    report.self_test_seconds = time.perf_counter() - start
