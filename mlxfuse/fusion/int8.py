"""Int8 activations: where readers of a norm take them, in a model that is fused already."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import mlx.nn as nn

from ..nn.attention import AttentionForm, FusedAttention
from ..nn.form import Form
from ..nn.mlp import BlockForm, FusedBlock, FusedMLP, MLPForm
from ..nn.norm import FusedNorm
from ..nn.projection import Projection, no_integers
from .candidates import Candidate, Skip, Tree
from .certify import readers
from .forms import norm_options

NAME = "int8"


def places(tree: Tree) -> Iterator[Candidate | Skip]:
    """The norms of each decoder layer, and the inputs of its o and down."""
    for path, module in tree.modules:
        if not isinstance(module, FusedBlock):
            continue
        form: BlockForm = module._fused
        mixer, mlp = module[form.mixer], module[form.mlp]
        attention: AttentionForm | None = None
        if isinstance(mixer, FusedAttention) and form.mixer_adds:
            attention = mixer._fused
        mlps = _mlps(form.mlp, mlp)
        firsts = [attention.qkv] if attention else []
        for name, found in zip(form.norms, (firsts, [f.up for f in mlps.values()]), strict=True):
            yield _norm(module, path, name, found)
        if attention:
            yield _linear(module, path, f"{form.mixer}.o", attention, attention.o)
        for name, each in mlps.items():
            yield _linear(module, path, f"{name}.down", each, each.down)


def _mlps(path: str, module: nn.Module) -> dict[str, MLPForm]:
    """What is fused of those that read the input of an MLP, or of what is in its place."""
    if isinstance(module, FusedMLP):
        return {path: module._fused}
    below = {f"{path}.{n}": module.get(n) for n in readers(type(module))}
    return {name: m._fused for name, m in below.items() if isinstance(m, FusedMLP)}


def _norm(
    block: nn.Module, path: str, name: str, found: list[Projection | None]
) -> Candidate | Skip:
    """One norm, with what may read it besides those that need floats."""
    place, options = f"{path}.{name}", norm_options(block[name])
    reasons = [no_integers(reader) for reader in found or [None]]
    if isinstance(options, str):
        return Skip(NAME, place, options)
    if None not in reasons:
        return Skip(NAME, place, reasons[0] or "")
    held, norm = block._fused.int8, FusedNorm(block, name, **options)

    def undo() -> None:
        held.pop(name, None)

    return _candidate(place, lambda: held.update({name: norm}), undo)


def _linear(
    block: nn.Module, path: str, name: str, form: AttentionForm | MLPForm, linear: Projection | None
) -> Candidate | Skip:
    """The input of one last linear."""
    if reason := no_integers(linear):
        return Skip(NAME, f"{path}.{name}", reason)
    held = block._fused.int8

    def emit() -> None:
        form.int8, held[name] = True, None

    def undo() -> None:
        form.int8 = False
        held.pop(name, None)

    return _candidate(f"{path}.{name}", emit, undo)


def _candidate(path: str, emit: Callable[[], None], undo: Callable[[], None]) -> Candidate:
    explain = f"{path} gives int8 activations"
    return Candidate(NAME, 30, path, frozenset(), frozenset({path}), emit, undo, explain)
