"""`patch_model`: fused forms over a model's modules; `unpatch_model`: off again."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .. import env
from ..kernels import self_test, unavailable
from ..nn.attention import FusedAttention
from ..nn.experts import MAX_ROWS_PER_EXPERT, QuantizedSwitchLinear
from ..nn.linear import FusedLinear, Linear
from ..nn.mlp import FusedMLP
from ..nn.quantized import FusedQuantizedLinear, QuantizedLinear
from .certified import CERTIFIED, certify
from .report import PatchReport, Tally

FUSIONS = tuple(CERTIFIED)

# fusion -> (names of linears that become one, the name of that one), joined or already one matrix
_JOINED = {
    "qkv": (("q_proj", "k_proj", "v_proj"), "qkv"),
    "gate_up": (("gate_proj", "up_proj"), "gate_up"),
}
_WHOLE = {"qkv": "qkv_proj", "gate_up": "gate_up_proj"}

Fused = FusedQuantizedLinear | FusedLinear


@dataclass(frozen=True)
class _Change:
    """What was done to one module: its class, and linears that were joined into one."""

    module: nn.Module
    cls: type[nn.Module]
    linears: dict[str, nn.Module] = field(default_factory=dict)
    joined: str = ""

    def undo(self) -> None:
        fused = self.module.pop(self.joined, None)
        if isinstance(fused, FusedLinear):
            fused.hand_back([x for x in self.linears.values() if isinstance(x, nn.Linear)])
        for name, linear in self.linears.items():
            self.module[name] = linear
        self.module.__class__ = self.cls


@dataclass
class _Patch:
    """Everything that was done to a model; kept by the model, outside its tree."""

    changes: list[_Change]
    report: PatchReport


def patch_model(model: nn.Module, fuse: str | Iterable[str] = "auto") -> PatchReport:
    """Fuse what is proven to compute the same; see ``FUSIONS`` for the names.

    ``qkv`` reads q, k and v in one dispatch, ``gate_up`` computes ``act(gate) * up`` in one,
    ``residual`` adds the residual in o and down where both of those are fused. A patched model is
    left as it is. No weight is copied but dense ones, of which the copy replaces the originals.

    Args:
        model: an mlx-lm model.
        fuse: ``auto`` (all where kernels run, else nothing), ``all``, ``off``, or names, as a
            string with commas or one by one.

    Raises:
        ValueError: no such fusion.
    """
    names = chosen(fuse)
    patch = getattr(model, "_mlxfuse_patch", None)
    if isinstance(patch, _Patch):
        return patch.report
    patch = _Patch([], PatchReport())
    uses = Counter(id(module) for _, module in _modules(model))
    places = sorted(_modules(model), key=lambda item: _natural(item[0]))
    for name in names:
        tally = Tally()
        for path, module in places:
            if not _is_place(name, module):
                continue
            tally.total += 1
            if uses[id(module)] > 1:
                made: _Change | str = "it is used in several places"
            elif name == "residual":
                made = _fuse_block(module)
            else:
                made = _fuse_linears(name, module, uses)
            if isinstance(made, str):
                patch.report.skipped.append((name, path, made))
                continue
            patch.changes.append(made)
            tally.fused.append(module[made.joined].formats if made.joined else ())
        if tally.total:
            patch.report.tallies[name] = tally
    if names:
        model._mlxfuse_patch = patch
    _self_test(model, patch.report)
    return patch.report


def _self_test(model: nn.Module, report: PatchReport) -> None:
    """Try the kernel variants that the model uses, unless they are emulated or cannot run."""
    modules = [module for _, module in _modules(model)]
    experts = [m.weight.experts or 1 for m in modules if isinstance(m, QuantizedSwitchLinear)]
    quantised = experts or any(isinstance(m, QuantizedLinear) for m in modules)
    if not quantised or env.get("MLXFUSE_KERNELS") == "emulated" or unavailable() is not None:
        return
    start = time.perf_counter()
    # So many that every expert is dequantised.
    many = [MAX_ROWS_PER_EXPERT * max(experts) + 1] if experts else []

    def run() -> None:
        for length in (*self_test.LENGTHS, *many):
            model(mx.zeros((1, length), mx.int32))

    disabled = self_test.check(self_test.calls(run))
    report.disabled = {program.op: reason for program, reason in disabled.items()}
    report.self_test_seconds = time.perf_counter() - start


def unpatch_model(model: nn.Module) -> None:
    """Undo `patch_model`: the same modules, the same bytes, no copy left behind."""
    patch = getattr(model, "_mlxfuse_patch", None)
    if isinstance(patch, _Patch):
        for change in reversed(patch.changes):
            change.undo()
        del model._mlxfuse_patch


def chosen(fuse: str | Iterable[str]) -> tuple[str, ...]:
    """The fusions that ``fuse`` asks for, in the order they are made."""
    if fuse == "off" or (fuse == "auto" and unavailable() is not None):
        return ()
    if fuse in ("auto", "all"):
        return FUSIONS
    wanted = {n.strip() for n in fuse.split(",")} if isinstance(fuse, str) else set(fuse)
    if unknown := sorted(wanted - set(FUSIONS)):
        raise ValueError(
            f"fuse is auto, all, off or of {', '.join(FUSIONS)}; found {', '.join(unknown)}"
        )
    return tuple(name for name in FUSIONS if name in wanted)


def _modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module with its path, once for each path."""
    stack: list[tuple[str, Any]] = [("", model)]
    while stack:
        path, node = stack.pop()
        if isinstance(node, nn.Module):
            yield path, node
            node = node.children()
        items = node.items() if isinstance(node, dict) else enumerate(node)
        for key, value in items:
            if isinstance(value, (dict, list)):
                stack.append((f"{path}.{key}" if path else str(key), value))


def _natural(path: str) -> tuple[tuple[int, str], ...]:
    """Order of paths in which layer 10 follows layer 9."""
    return tuple((int(p), "") if p.isdigit() else (-1, p) for p in path.split("."))


def _is_place(fusion: str, module: nn.Module) -> bool:
    if fusion == "residual":
        # Gemma norms each branch before it is added: nothing can be added in the projection.
        return {"self_attn", "mlp"} <= module.keys() and "post_feedforward_layernorm" not in module
    return all(name in module for name in _JOINED[fusion][0]) or _WHOLE[fusion] in module


def _fuse_linears(fusion: str, module: nn.Module, uses: Counter[int]) -> _Change | str:
    """The module with its linears joined, or why not."""
    fused_class, reason = certify(fusion, module)
    if fused_class is None:
        return reason
    names, joined = _JOINED[fusion]
    whole = _WHOLE[fusion] in module
    linears = {name: module[name] for name in ((_WHOLE[fusion],) if whole else names)}
    for name, linear in linears.items():
        if uses[id(linear)] > 1:
            return f"{name} is used in several places"
    made = _cut(module, fusion, *linears.values()) if whole else _join(list(linears.values()))
    if isinstance(made, str):
        return made
    made.train(module.training)
    change = _Change(module, type(module), linears, joined)
    for name in linears:
        del module[name]
    module[joined] = made
    module.__class__ = fused_class
    return change


def _join(linears: Sequence[nn.Module]) -> Fused | str:
    quantized = [x for x in linears if isinstance(x, QuantizedLinear) and _known(x)]
    dense = [x for x in linears if isinstance(x, nn.Linear) and _known(x)]
    if len(quantized) == len(linears):
        if len({x.weight.columns for x in quantized}) > 1:
            return "its linears have different inputs"
        return FusedQuantizedLinear.join(quantized)
    if len(dense) < len(linears):
        return "its linears are " + " and ".join(sorted({_kind(x) for x in linears}))
    if len({(x.weight.dtype, x.weight.shape[1]) for x in dense}) > 1:
        return "its linears have different types or inputs"
    return FusedLinear.join(dense)


def _cut(module: nn.Module, fusion: str, linear: nn.Module) -> Fused | str:
    if not _known(linear):
        return f"its linear is {_kind(linear)}"
    quantized = isinstance(linear, QuantizedLinear)
    total = linear.weight.rows if quantized else linear.weight.shape[0]
    parts = [total // 2] * 2
    if fusion == "qkv":
        head = total // (module.n_heads + 2 * module.n_kv_heads)
        parts = [head * n for n in (module.n_heads, module.n_kv_heads, module.n_kv_heads)]
    made: Fused | None = None
    if isinstance(linear, QuantizedLinear):
        made = FusedQuantizedLinear.cut(linear, parts)
    elif isinstance(linear, nn.Linear):
        made = FusedLinear.cut(linear, parts)
    return made or "its matrix has other rows than its parts"


def _known(linear: nn.Module) -> bool:
    """A layer that does nothing but multiply and add its bias: no LoRA, no subclass."""
    return type(linear) in (QuantizedLinear, Linear, nn.Linear)


def _kind(linear: nn.Module) -> str:
    """What a linear is, for a reason."""
    if not _known(linear):
        return type(linear).__name__
    return "quantised" if isinstance(linear, QuantizedLinear) else "dense"


def _fuse_block(module: nn.Module) -> _Change | str:
    fused_class, reason = certify("residual", module)
    if fused_class is None:
        return reason
    attention, mlp = module.self_attn, module.mlp
    if not (isinstance(attention, FusedAttention) and isinstance(mlp, FusedMLP)):
        return "its attention or its MLP is not fused"
    change = _Change(module, type(module))
    module.__class__ = fused_class
    return change
