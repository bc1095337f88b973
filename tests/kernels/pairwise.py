"""Cases in which every two values of different factors meet: a pairwise covering array."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Case = dict[str, Any]
Pair = tuple[tuple[str, Any], tuple[str, Any]]


def pairs(case: Mapping[str, Any]) -> set[Pair]:
    return set(itertools.combinations(sorted(case.items(), key=lambda item: item[0]), 2))


def possible(factors: Mapping[str, Sequence[Any]], allowed: Callable[[Case], bool]) -> set[Pair]:
    """Every pair of values of two factors that may meet."""
    return {
        ((a, v), (b, w))
        for a, b in itertools.combinations(sorted(factors), 2)
        for v in factors[a]
        for w in factors[b]
        if allowed({a: v, b: w})
    }


def covering(
    factors: Mapping[str, Sequence[Any]],
    allowed: Callable[[Case], bool],
    cost: Callable[[Case], float],
    tries: int = 12,
) -> list[Case]:
    """Few cases that hold every pair that may meet, greedily; of equal ones the cheapest.

    Args:
        factors: name -> values.
        allowed: of some factors' values, whether a case may have them all. A case is built value
            by value and must never come to a factor of which no value is left.
        cost: of a whole case.
        tries: cases built, in other orders of the factors, of which the best is taken.
    """
    rng = random.Random(0)
    left = possible(factors, allowed)
    cases = []
    while left:
        seed = min(left, key=repr)
        built = []
        for _ in range(tries):
            case = dict(seed)
            for name in rng.sample(sorted(set(factors) - case.keys()), len(factors) - 2):
                values = [v for v in factors[name] if allowed({**case, name: v})]
                rng.shuffle(values)
                case[name] = max(
                    values,
                    key=lambda v: sum(
                        tuple(sorted([(name, v), other], key=lambda item: item[0])) in left
                        for other in case.items()
                    ),
                )
            built.append((-len(pairs(case) & left), cost(case), len(built), case))
        cases.append(min(built)[3])
        left -= pairs(cases[-1])
    return cases
