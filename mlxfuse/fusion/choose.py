"""The choice among what may be fused."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from ..kernels.runtime import tuning
from .candidates import Candidate, Skip, Tree, natural, site
from .options import Choice

SLOWER = "`mlxfuse tune` has measured it to be slower here"


def choose(
    tree: Tree, places: Iterable[Candidate | Skip], choice: Choice
) -> tuple[list[Candidate], list[Skip]]:
    """The candidates that are wanted, and of which none claims what another does.

    Returns:
        Those to emit, in order, and a skip for each of the other places.
    """
    modules = dict(tree.modules)
    wanted: list[Candidate] = []
    skipped: list[Skip] = []
    for place in places:
        reason = choice.refusal(place.name, place.path)
        if reason is not None:
            skipped.append(Skip(place.name, place.path, reason))
        elif isinstance(place, Skip):
            skipped.append(place)
        elif choice.tuned and place.path in modules and tuning.separate(site(place, modules)):
            skipped.append(Skip(place.name, place.path, SLOWER))
        else:
            wanted.append(place)
    chosen, rivals = select(wanted)
    return chosen, skipped + rivals


def select(candidates: Sequence[Candidate]) -> tuple[list[Candidate], list[Skip]]:
    """The candidates of which none claims what another does: by score, then by path and name.

    Returns:
        Those to emit, in order, and a skip for each of the others.
    """
    order = sorted(candidates, key=lambda c: (-c.score, natural(c.path), c.name))
    chosen: list[Candidate] = []
    skipped: list[Skip] = []
    owner: dict[str, Candidate] = {}
    above: dict[str, Candidate] = {}
    for candidate in order:
        rival = None
        for path in sorted(candidate.claims, key=natural):
            rival = rival or above.get(path) or next(filter(None, map(owner.get, _up(path))), None)
        if rival is not None:
            reason = f"{rival.name} of {rival.path or 'the model'} is fused there"
            skipped.append(Skip(candidate.name, candidate.path, reason))
            continue
        chosen.append(candidate)
        for path in candidate.claims:
            owner[path] = candidate
            for parent in _up(path):
                above.setdefault(parent, candidate)
    return chosen, skipped


def _up(path: str) -> Iterator[str]:
    """The path and all above it."""
    while path:
        yield path
        path = path.rpartition(".")[0]
