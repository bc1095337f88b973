"""The fusions of norms with what precedes them, and with what is added to their weight."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import mlx.nn as nn

from ..errors import NotFusible
from ..nn.join_linears import single
from ..nn.norm import FusedFactor, FusedNorm
from ..nn.offset_norm import FusedOffsetNorm, OffsetNormForm
from ..nn.post_norm import PostNormForm
from ..nn.router import FusedRouter
from .candidates import Candidate, Skip, Tree, register_detector
from .certify import certify, is_known
from .emit import Piece, candidate, same
from .forms import (
    fused_norm,
    has,
    input_gate,
    norm_options,
    post_norm_class,
    post_norm_form,
    router_form,
)
from .places import places

# What has norms of which other fusions tell.
_OTHERS = ("attention", "post_norm")


@register_detector("offset_norm")
def _offset_norms(tree: Tree) -> Iterator[Candidate | Skip]:
    """A norm and the addition to its weight in one dispatch."""
    modules = dict(tree.modules)
    for path, module in tree.modules:
        parent, _, name = path.rpartition(".")
        owner = modules.get(parent)
        if owner is None or not is_known(type(module), "norm"):
            continue
        if not norm_options(module)["offset"] or any(is_known(type(owner), k) for k in _OTHERS):
            continue
        try:
            tree.check_alone(owner, [name])
        except NotFusible as reason:
            yield Skip("offset_norm", path, str(reason))
            continue
        made = same(fused_norm(owner, name))
        piece = Piece(module, FusedOffsetNorm, OffsetNormForm(type(module)), "norm", made)
        explain = f"{path} with the addition to its weight"
        yield candidate("offset_norm", 35, parent, [name], [piece], explain)


@places("post_norm", "post_norm", post_norm_form, lambda _: False)
def _post_norm(tree: Tree, path: str, module: nn.Module, form: PostNormForm) -> Candidate:
    """The norms of a decoder layer that norms or multiplies what its halves give, with the
    additions.
    """
    posts = [*form.posts, *(name for name in form.gated[2:3] if has(module, name))]
    sides = form.beside[2:]
    names = [name for name in (*form.norms, *posts, *sides) if name]
    tree.check_alone(module, names)
    before = tuple(fused_norm(module, name) if name else None for name in form.norms)
    after: tuple[FusedNorm | FusedFactor, ...] = (FusedFactor(module, form.factor),) * 2
    if not form.factor:
        after = tuple(fused_norm(module, name) for name in posts)
    both: dict[str, tuple[Any, ...]] = {"before": before, "after": after}
    both["sides"] = tuple(fused_norm(module, name) for name in sides)
    of = post_norm_class(form)
    pieces = [Piece(module, of, form, name, same(value)) for name, value in both.items()]
    if (gate := input_gate(module, form)) is not None:
        pieces.append(Piece(module, of, form, "gate", same(gate)))
    pieces += _router(tree, module, form)
    if (following := tree.after(path)) is not None:
        pieces.append(Piece(module, of, form, "following", same(following)))
    explain = f"{', '.join(names)} of {path} with the additions"
    return candidate("post_norm", 45, path, names, pieces, explain)


def _router(tree: Tree, module: nn.Module, form: PostNormForm) -> Iterator[Piece]:
    """The choice of experts in one dispatch, where the layer has a router that is known."""
    for name in form.beside[:1]:
        router = module[name]
        with suppress(NotFusible):
            found = router_form(router, certify(type(router), "normed_router"))
            tree.check_alone(router, [found.proj])
            if found.eps == norm_options(module[form.norms[1]])["eps"]:
                yield Piece(router, FusedRouter, found, "chooses", same(True))
                yield Piece(router, FusedRouter, found, "logits", same(single(router, found.proj)))
