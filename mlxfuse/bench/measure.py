"""What is timed, in which order, and what is made of the times."""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ..terminal import one_line

_RANGE = re.compile(r"(\d{1,7})(?:-(\d{1,7})(?:([+*])(\d{1,7}))?)?")
_MOST = 64
_LARGEST = 1 << 20


@dataclass(frozen=True, slots=True)
class Test:
    """One row: ``prompt`` tokens are read, or ``generated`` are decoded one by one, behind
    ``depth`` tokens that are not timed.
    """

    __test__ = False  # it is no test of pytest's

    prompt: int
    generated: int
    depth: int

    @property
    def tokens(self) -> int:
        return self.prompt + self.generated

    @property
    def name(self) -> str:
        """As llama-bench names it: ``pp512``, ``tg128 @ d4096``."""
        name = f"pp{self.prompt}" if self.prompt else f"tg{self.generated}"
        return f"{name} @ d{self.depth}" if self.depth else name


def numbers(text: str) -> list[int]:
    """Whole numbers as llama-bench takes them, at most 64 of them, each up to 2**20.

    ``512,1024``; ``1-4`` is 1,2,3,4; ``0-1024+256`` goes by steps; ``128-1024*2`` by a factor.

    Raises:
        ValueError: anything else.
    """
    found: list[int] = []
    for item in text.split(","):
        match = _RANGE.fullmatch(item.strip())
        if match is None:
            raise ValueError(f"{one_line(item, 40)!r}: expected 512, 1-4, 0-1024+256 or 128-1024*2")
        first, last = int(match[1]), int(match[2] or match[1])
        step = int(match[4] or 1)
        multiply = match[3] == "*"
        if last < first or step < 1 or (multiply and (step < 2 or first == 0)):
            raise ValueError(f"{item.strip()!r} never reaches its end")
        if last > _LARGEST:
            raise ValueError(f"{item.strip()!r}: at most {_LARGEST:,}")
        while first <= last and len(found) <= _MOST:
            found.append(first)
            first = first * step if multiply else first + step
    if len(found) > _MOST:
        raise ValueError(f"{one_line(text, 40)!r} is more than {_MOST} numbers")
    return found


def tests(prompts: Sequence[int], generated: Sequence[int], depths: Sequence[int]) -> list[Test]:
    """Every combination, for each depth first the prompts; 0 tokens are no test."""
    return [
        test
        for depth in depths
        for test in (
            *(Test(count, 0, depth) for count in prompts if count),
            *(Test(0, count, depth) for count in generated if count),
        )
    ]


def alternate(
    arms: Mapping[str, Callable[[], float]],
    repetitions: int,
    *,
    pause: float = 0.0,
    sleep: Callable[[float], None] = time.sleep,
) -> dict[str, list[float]]:
    """What each arm gives, called in turns: A B, B A, A B, and so on.

    A machine that becomes slower as it heats slows each arm alike; with an even number of
    ``repetitions`` to the last term of a linear drift.

    Args:
        pause: seconds to cool down before every call.
    """
    found: dict[str, list[float]] = {name: [] for name in arms}
    for turn in range(repetitions):
        for name in list(arms) if turn % 2 == 0 else reversed(list(arms)):
            if pause:
                sleep(pause)
            found[name].append(arms[name]())
    return found


def seconds(call: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    """Wall-clock time of one call, which must wait for its results."""
    start = clock()
    call()
    return clock() - start


def speeds(test: Test, taken: Sequence[float]) -> dict[str, float | list[int] | list[float]]:
    """Tokens a second from the seconds of each repetition, under llama-bench's names.

    ``avg`` and ``stddev`` (of a sample) are llama-bench's; the median and the extremes are ours.
    """
    ns = [round(s * 1e9) for s in taken]
    ts = [test.tokens / s for s in taken]
    return {
        "avg_ns": statistics.fmean(ns),
        "stddev_ns": statistics.stdev(ns) if len(ns) > 1 else 0.0,
        "avg_ts": statistics.fmean(ts),
        "stddev_ts": statistics.stdev(ts) if len(ts) > 1 else 0.0,
        "median_ts": statistics.median(ts),
        "min_ts": min(ts),
        "max_ts": max(ts),
        "samples_ns": ns,
        "samples_ts": ts,
    }
