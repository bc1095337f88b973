"""Norms that add a number to their weight, where no other fusion has them."""

from __future__ import annotations

from collections.abc import Iterator

from ..errors import NotFusible
from ..nn.offset_norm import FusedOffsetNorm, OffsetNormForm
from .candidates import Candidate, Skip, Tree, register_detector
from .certify import is_known
from .emit import Piece, candidate, same
from .forms import fused_norm, norm_options

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
