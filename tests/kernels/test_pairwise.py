"""The generator of test cases itself."""

from __future__ import annotations

from .pairwise import Case, covering, pairs, possible

FACTORS = {"a": (1, 2, 3), "b": ("x", "y", "z", "w"), "c": (True, False), "d": (0.5, 1.5)}


def allowed(case: Case) -> bool:
    """One pair that must not meet, and one that must not meet a third value."""
    if case.get("a") == 1 and case.get("b") == "x":
        return False
    return not (case.get("a") == 2 and case.get("b") == "y" and case.get("c"))


def test_every_pair_that_may_meet_does() -> None:
    cases = covering(FACTORS, allowed, lambda case: case["a"])
    want = possible(FACTORS, allowed)
    assert len(want) == 11 + 6 + 6 + 8 + 8 + 4
    assert set().union(*map(pairs, cases)) == want
    assert all(allowed(case) for case in cases)
    assert len(cases) <= 14  # the two longest factors alone need 11
    # Control: the last case was added for a pair that no other has.
    assert set().union(*map(pairs, cases[:-1])) < want


def test_the_cheaper_of_equal_cases_is_taken() -> None:
    factors = {"a": (1, 2), "b": (1, 2), "size": tuple(range(1, 9))}
    cases = covering(factors, lambda case: True, lambda case: case["a"] * case["size"])
    dear = covering(factors, lambda case: True, lambda case: -case["a"] * case["size"])
    assert sum(c["a"] * c["size"] for c in cases) <= sum(c["a"] * c["size"] for c in dear)


def test_it_gives_the_same_cases_every_time() -> None:
    again = [covering(FACTORS, allowed, lambda case: 1) for _ in range(2)]
    assert again[0] == again[1]
