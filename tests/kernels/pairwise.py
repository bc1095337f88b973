"""Few combinations of many values, in which every two values meet."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Case = dict[str, Any]


def pairs_of(case: Mapping[str, Any]) -> set[Any]:
    return set(itertools.combinations(case.items(), 2))


def pairwise(
    axes: Mapping[str, Sequence[Any]], valid: Callable[[Case], bool], draws: int = 200
) -> list[Case]:
    """Combinations of a value of each axis, so that each pair in a valid combination is in one.

    Greedy, and the same at every call: random valid combinations that have a pair still open are
    improved value by value, and the best of a few is taken. A pair that none of ``draws`` has is
    taken to be impossible.
    """
    chance = random.Random(0)

    def draw(pair: Any) -> Case | None:
        for _ in range(draws):
            case = {n: chance.choice(axes[n]) for n in axes} | dict(pair)
            if valid(case):
                return case
        return None

    def improve(case: Case, fixed: Sequence[str]) -> Case:
        for name in chance.sample([n for n in axes if n not in fixed], len(axes) - len(fixed)):
            others = [case | {name: v} for v in axes[name]]
            case = max(filter(valid, others), key=lambda c: len(pairs_of(c) & still))
        return case

    still = dict.fromkeys(
        ((a, x), (b, y))
        for a, b in itertools.combinations(axes, 2)
        for x, y in itertools.product(axes[a], axes[b])
    ).keys()
    still = set(still)
    queue = sorted(still, key=repr)
    chosen = []
    while queue:
        first = queue.pop(0)
        if first not in still:
            continue
        drawn = [c for c in (draw(first) for _ in range(5)) if c is not None]
        if not drawn:
            still.discard(first)
            continue
        cases = [improve(case, [n for n, _ in first]) for case in drawn]
        chosen.append(max(cases, key=lambda c: len(pairs_of(c) & still)))
        still -= pairs_of(chosen[-1])
    return chosen
