"""What rank 0's engine tells the others' before each step, so that all do the same steps.

The others need no more of a job than what decides which tokens are read and when the answer ends:
how tokens are chosen stays with rank 0, whose choice is everyone's.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ..ranks import Ranks
from .jobs import Job
from .text import Echo


@dataclass(frozen=True, slots=True)
class Turn:
    """What happens before a step.

    dropped  uids of the jobs that end now, whatever was generated.
    begun    jobs that begin.
    kept     how many prompt caches are kept.
    """

    dropped: list[int]
    begun: list[Job]
    kept: int


def tell(team: Ranks, turn: Turn, running: Iterable[Job]) -> None:
    """Tell the other ranks.

    Args:
        running: all jobs, with those that begin.
    """
    jobs = list(running)
    begun = [
        {
            "uid": job.uid,
            "prompt": job.prompt,
            "max_tokens": job.max_tokens,
            "stops": list(job.stops),
            "boundaries": list(job.boundaries.items()),
            "cached": job.cached,
            # What a prompt's tokens cost is computed by all.
            "top": job.top if job.uid < 0 else None,
            # Jobs that share a sampler are sampled in one call, so they must on every rank.
            "like": next(each.uid for each in jobs if each.sampler is job.sampler),
        }
        for job in turn.begun
    ]
    team.share({"dropped": turn.dropped, "begun": begun, "kept": turn.kept})


def close(team: Ranks) -> None:
    """Tell the other ranks that there are no more steps."""
    team.share(None)


def told(team: Ranks) -> Turn | None:
    """What rank 0 told; None where there are no more steps."""
    found: Any = team.share(None)
    if found is None:
        return None
    return Turn(found["dropped"], [_job(**each) for each in found["begun"]], found["kept"])


def _job(boundaries: list[tuple[int, str]], top: int | None, **more: Any) -> Job:
    echo = None if top is None else Echo("", (0,) * len(more["prompt"]))
    return Job(**more, boundaries=dict(boundaries), top=top, echo=echo, deliver=lambda event: None)
