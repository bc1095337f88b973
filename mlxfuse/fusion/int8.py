"""Int8 activations: where readers of a norm take them, in a model that is fused already."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import mlx.nn as nn

from ..nn.attention import FusedAttention
from ..nn.block import BlockForm, FusedBlock
from ..nn.delta_net import FusedDeltaNet
from ..nn.fused import FusedModule, adopt, release
from ..nn.join_linears import single
from ..nn.mlp import FusedMLP
from ..nn.moe import FusedExperts, FusedMoE, MoEForm
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
        attention = mixer._fused if isinstance(mixer, FusedAttention) and form.mixer_adds else None
        below = _readers(form.mlp, mlp)
        firsts = [attention.qkv] if attention else []
        if isinstance(mixer, FusedDeltaNet):
            firsts = [*mixer._fused.joined]
        seconds = [m._fused.up for m in below.values()]
        for name, found in zip(form.norms, (firsts, seconds), strict=True):
            yield _norm(module, path, name, found)
        if attention:
            yield _linear(module, path, f"{form.mixer}.o", mixer, "o")
        for name, each in below.items():
            if isinstance(each, FusedMLP):
                yield _linear(module, path, f"{name}.down", each, "down")


def _readers(path: str, module: nn.Module) -> dict[str, FusedMLP | FusedExperts]:
    """What is fused of those that read the input of an MLP, or of what is in its place."""
    if isinstance(module, FusedMLP):
        return {path: module}
    kind = module._fused.original if isinstance(module, FusedModule) else type(module)
    below = {f"{path}.{n}": module.get(n) for n in readers(kind)}
    return {name: m for name, m in below.items() if isinstance(m, FusedMLP | FusedExperts)}


def _norm(
    block: nn.Module,
    path: str,
    name: str,
    found: list[Projection | None],
) -> Candidate | Skip:
    """One norm, with what may read it besides those that need floats."""
    place, options = f"{path}.{name}", norm_options(block[name])
    reasons = [no_integers(reader) for reader in found or [None]]
    if isinstance(options, str):
        return Skip(NAME, place, options)
    if None not in reasons:
        return Skip(NAME, place, reasons[0] or "")
    held, norm = block._fused.int8, FusedNorm(block, name, **options)

    def emit() -> None:
        held[name] = norm
        _hand_down(block)

    def undo() -> None:
        held.pop(name, None)
        _take_back(block)

    return _candidate(place, emit, undo)


def _linear(
    block: nn.Module, path: str, name: str, module: FusedAttention | FusedMLP, piece: str
) -> Candidate | Skip:
    """The input of a last linear, which need not add anything."""
    form, held = module._fused, block._fused.int8
    before: Projection | None = getattr(form, piece)
    linear = before or single(module, form.output)
    if reason := linear if isinstance(linear, str) else no_integers(linear):
        return Skip(NAME, f"{path}.{name}", reason)

    def emit() -> None:
        setattr(form, piece, linear)
        form.rounds, held[name] = True, None
        _hand_down(block)

    def undo() -> None:
        setattr(form, piece, before)
        form.rounds = False
        held.pop(name, None)
        _take_back(block)

    return _candidate(f"{path}.{name}", emit, undo)


def _hand_down(block: nn.Module) -> None:
    """Let a block of experts hand the codes of its input down to those that read them."""
    path = block._fused.mlp
    mlp = block[path]
    names = tuple(name.removeprefix(f"{path}.") for name in _readers(path, mlp) if name != path)
    if names:
        body = type(mlp).__call__
        adopt(mlp, FusedMoE, MoEForm(type(mlp), "", body)).readers = names


def _take_back(block: nn.Module) -> None:
    mlp = block[block._fused.mlp]
    if isinstance(mlp, FusedMoE) and not block._fused.int8:
        mlp._fused.readers = ()
        release(mlp)


def _candidate(path: str, emit: Callable[[], None], undo: Callable[[], None]) -> Candidate:
    explain = f"{path} gives int8 activations"
    return Candidate(NAME, 30, path, frozenset(), frozenset({path}), emit, undo, explain)
