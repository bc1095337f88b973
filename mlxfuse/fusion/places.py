"""What detectors are made of: the places with a known body, and the projections there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import mlx.nn as nn

from ..errors import NotFusible
from ..nn.join_linears import (
    check_experts,
    check_joinable,
    copies,
    cut,
    format_of,
    join,
    join_experts,
    single,
)
from ..nn.projection import Projection
from .candidates import Candidate, Skip, Tree, register_detector
from .certify import Match, certify, is_known
from .emit import same

# What makes a projection, and the formats of its weights.
Made = tuple[Callable[[], Projection], tuple[str, ...]]
Find = Callable[[Tree, str, nn.Module, Any], Candidate | None]


def places(
    name: str,
    kind: str,
    form: Callable[[nn.Module, Match], Any],
    looks: Callable[[nn.Module], bool] | None = None,
    otherwise: Callable[[Tree, str, nn.Module], Candidate] | None = None,
) -> Callable[[Find], Find]:
    """Decorator: register what finds the place in one module that has a known body.

    Args:
        kind: of the body.
        form: what the place is found from.
        looks: whether a module without such a body is reported all the same. None: neither it nor
            one that is odd in its form, of which another detector tells.
        otherwise: finds the place in a module that looks so and has no known body.
    """

    def register(find: Find) -> Find:
        @register_detector(name)
        def detector(tree: Tree) -> Iterator[Candidate | Skip]:
            for path, module in tree.modules:
                known = is_known(type(module), kind)
                if not (known or (looks is not None and looks(module))):
                    continue
                told = looks is not None
                try:
                    if not known and otherwise is not None:
                        found: Candidate | None = otherwise(tree, path, module)
                    else:
                        held = form(module, certify(type(module), kind))
                        told = True
                        found = find(tree, path, module, held)
                except NotFusible as reason:
                    if told:
                        yield Skip(name, path, str(reason))
                    continue
                if found is not None:
                    yield found

        return find

    return register


def matched(_: nn.Module, match: Match) -> Match:
    """What a place is found from where its body alone tells."""
    return match


def joined(tree: Tree, module: nn.Module, names: tuple[str, ...], rows: Any = None) -> Made:
    """One projection of the linears, or of so many rows each of the only one."""
    tree.check_alone(module, names, arrays=False)
    if len(names) == 1:
        whole = cut(module, names[0], rows)
        return same(whole), whole.formats
    linears = [module[name] for name in names]
    check_joinable(linears)
    if copies(linears):
        tree.check_alone(module, names)
    return partial(join, module, names), tuple(map(format_of, linears))


def joined_experts(tree: Tree, module: nn.Module, names: tuple[str, ...]) -> Made:
    """`joined` for switch linears."""
    linears = [module[name] for name in names]
    tree.check_alone(module, names, arrays=False)
    check_experts(linears)
    return partial(join_experts, module, names), tuple(map(format_of, linears))


def alone(tree: Tree, module: nn.Module, name: str) -> Projection:
    """The projection of one linear."""
    tree.check_alone(module, [name], arrays=False)
    return single(module, name)
