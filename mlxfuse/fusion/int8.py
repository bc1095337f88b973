"""Int8 activations: where readers of a norm take them, in a model that is fused already."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import mlx.nn as nn

from ..errors import NotFusible
from ..nn.attention import FusedAttention
from ..nn.block import BlockForm, FusedBlock
from ..nn.delta_net import FusedDeltaNet
from ..nn.fused import FusedModule, adopt, release
from ..nn.join_linears import single
from ..nn.mlp import FusedMLP
from ..nn.moe import FusedExperts, FusedMoE, MoEForm
from ..nn.post_norm import PostNormForm
from ..nn.projection import Projection, no_integers
from .candidates import Candidate, Skip, Tree
from .certify import is_known, readers
from .forms import fused_norm, has

NAME = "int8"


def places(tree: Tree) -> Iterator[Candidate | Skip]:
    """The norms of each decoder layer, and the inputs of its o and down; or the layer as one."""
    for path, module in tree.modules:
        if not isinstance(module, FusedBlock):
            kinds = ("block", "post_norm")
            if any(is_known(type(module), kind) for kind in kinds) or has(
                module, "self_attn", "mlp"
            ):
                yield Skip(NAME, path, "no addition of the layer is fused")
            continue
        form: BlockForm = module._fused
        if isinstance(form, PostNormForm) and form.gated:
            yield Skip(NAME, path, "its attention also gives keys and values")
            continue
        if form.parallel:
            yield Skip(NAME, path, "its attention and its MLP read one norm")
            continue
        mixer, mlp = module[form.mixer], module[form.mlp]
        halves = form.mixer_adds or isinstance(form, PostNormForm)
        attention = mixer._fused if isinstance(mixer, FusedAttention) and halves else None
        below = _readers(form.mlp, mlp)
        firsts = [attention.qkv] if attention else []
        if isinstance(mixer, FusedDeltaNet):
            firsts = [*mixer._fused.joined]
        seconds = [m._fused.up for m in below.values()]
        for name, found in zip(form.norms, (firsts, seconds), strict=True):
            if not name:
                continue
            yield _place(f"{path}.{name}", partial(_norm, module, name, found))
        if attention:
            yield _place(f"{path}.{form.mixer}.o", partial(_linear, module, mixer, "o"))
        for name, each in below.items():
            if isinstance(each, FusedMLP):
                yield _place(f"{path}.{name}.down", partial(_linear, module, each, "down"))


_Change = tuple[Callable[[], None], Callable[[], None]]


def _place(path: str, change: Callable[[str], _Change]) -> Candidate | Skip:
    """Args:
    change: path -> what lets it give or take int8 activations, and what undoes it.
    """
    try:
        emit, undo = change(path)
    except NotFusible as reason:
        return Skip(NAME, path, str(reason))
    explain = f"{path} gives int8 activations"
    return Candidate(NAME, 30, path, frozenset({path}), emit, undo, explain)


def _readers(path: str, module: nn.Module) -> dict[str, FusedMLP | FusedExperts]:
    """What is fused of those that read the input of an MLP, or of what is in its place."""
    if isinstance(module, FusedMLP):
        return {path: module}
    kind = module._fused.original if isinstance(module, FusedModule) else type(module)
    below = {f"{path}.{n}": module.get(n) for n in readers(kind)}
    return {name: m for name, m in below.items() if isinstance(m, FusedMLP | FusedExperts)}


def _norm(block: nn.Module, name: str, found: list[Projection | None], _: str) -> _Change:
    """One norm, with what may read it besides those that need floats."""
    held, norm = block._fused.int8, fused_norm(block, name)
    reasons = [no_integers(reader) for reader in found or [None]]
    if None not in reasons:
        raise NotFusible(reasons[0] or "")

    def emit() -> None:
        held[name] = norm
        _hand_down(block)

    def undo() -> None:
        held.pop(name, None)
        _take_back(block)

    return emit, undo


def _linear(block: nn.Module, module: FusedAttention | FusedMLP, piece: str, path: str) -> _Change:
    """The input of a last linear, which need not add anything."""
    form, held = module._fused, block._fused.int8
    before: Projection | None = getattr(form, piece)
    linear = before or single(module, form.output)
    if reason := no_integers(linear):
        raise NotFusible(reason)

    def emit() -> None:
        setattr(form, piece, linear)
        form.rounds, held[path] = True, None
        _hand_down(block)

    def undo() -> None:
        setattr(form, piece, before)
        form.rounds = False
        held.pop(path, None)
        _take_back(block)

    return emit, undo


def _hand_down(block: nn.Module) -> None:
    """Let a block of experts hand the codes of its input down to those that read them."""
    path = block._fused.mlp
    mlp = block[path]
    names = tuple(name.removeprefix(f"{path}.") for name in _readers(path, mlp) if name != path)
    if names:
        adopt(mlp, FusedMoE, MoEForm(type(mlp), "")).readers = names


def _take_back(block: nn.Module) -> None:
    mlp = block[block._fused.mlp]
    if isinstance(mlp, FusedMoE) and not block._fused.int8:
        mlp._fused.readers = ()
        release(mlp)
