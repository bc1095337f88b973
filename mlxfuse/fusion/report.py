"""What a patch did and why it did not do more."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from ..kernels import fallbacks
from .candidates import Candidate, Skip, natural

LABELS = {
    "gate_up": "gate/up",
    "experts_sum": "experts sum",
    "norm_rope": "norm+rope",
    "post_norm": "norm+add",
    "add_rms_norm": "add+norm",
    "offset_norm": "1+norm",
}


@dataclass
class Tally:
    """One kind of fusion.

    fused  formats of each place that was fused, in the order of the model.
    total  places where the model has the modules for it.
    """

    fused: list[tuple[str, ...]] = field(default_factory=list)
    total: int = 0

    @property
    def mixed(self) -> str:
        """How many places have several formats, and which; empty where none has."""
        found = [set(formats) for formats in self.fused if len(set(formats)) > 1]
        names = ", ".join(sorted({name.lower() for names in found for name in names}))
        return f"{len(found)} mixed: {names}" if found else ""

    def __str__(self) -> str:
        text = f"{len(self.fused)}/{self.total}"
        return f"{text} ({self.mixed})" if self.mixed else text


@dataclass(frozen=True)
class Check:
    """Patched against unpatched logits, on a random prompt.

    error    largest difference, relative to the largest unpatched logit.
    typical  the median token's, of the worse of prompt, single tokens and small batch.
    cosine   of the two, over all tokens.
    top1     share of tokens with the same most likely next one.
    """

    error: float
    typical: float
    cosine: float
    top1: float


def _uncounted() -> None:
    """Stands for `PatchReport.count` where there is no model."""


@dataclass
class PatchReport:
    """Result of `patch_model`; ``str`` gives the lines that are shown.

    tallies            fusion -> what was fused.
    fused              every fusion that was made.
    skipped            every place that was not fused: (fusion, path of the module, reason).
    disabled           kernel -> why its self-test failed; its calls run as reference.
    self_test_seconds  time that the self-tests of kernel variants took.
    bytes_before, bytes_after  memory that MLX's arrays of the process took.
    check              what ``check=True`` found.
    nothing            why ``auto`` fuses nothing on this machine; empty where it does.
    """

    tallies: dict[str, Tally] = field(default_factory=dict)
    fused: list[Candidate] = field(default_factory=list)
    skipped: list[Skip] = field(default_factory=list)
    disabled: dict[str, str] = field(default_factory=dict)
    self_test_seconds: float = 0.0
    bytes_before: int = 0
    bytes_after: int = 0
    check: Check | None = None
    nothing: str = ""
    count: Callable[[], tuple[int, int] | None] = field(default=_uncounted, repr=False)

    def __getstate__(self) -> dict[str, object]:
        """A copy, or a pickle, is of the text: it does not reach the model."""
        return {**vars(self), "count": _uncounted}

    def add(
        self,
        places: Iterable[Candidate | Skip],
        fused: Sequence[Candidate],
        skipped: Sequence[Skip],
    ) -> None:
        """What some detectors have found, and what became of it."""
        for place in places:
            self.tallies.setdefault(place.name, Tally()).total += 1
        for candidate in fused:
            self.tallies[candidate.name].fused.append(candidate.formats)
        order = {name: i for i, name in enumerate(self.tallies)}

        def place_of(each: Candidate | Skip) -> tuple[object, ...]:
            return order[each.name], natural(each.path)

        self.fused = sorted([*self.fused, *fused], key=place_of)
        self.skipped = sorted([*self.skipped, *skipped], key=place_of)

    @cached_property
    def dispatches(self) -> tuple[int, int] | None:
        """GPU dispatches of one decoded token before and after, counted in the model's graph when
        this is first asked for; None where nothing is fused, or nothing is left of the model.
        """
        return self.count()

    @property
    def fallbacks(self) -> dict[str, int]:
        """Calls of this process that ran without their kernel although it was wanted, by reason."""
        return {f"{op}: {reason}": n for (op, reason), n in sorted(fallbacks.items())}

    def rows(self) -> list[tuple[str, str, str, str]]:
        """(fusion, fused, of, mixed formats and why not the others) for a table."""
        found = []
        for name, tally in self.tallies.items():
            reasons = Counter(s.reason for s in self.skipped if s.name == name)
            notes = [tally.mixed] if tally.mixed else []
            notes += [f"{count}: {reason}" for reason, count in reasons.items()]
            cells = (LABELS.get(name, name), str(len(tally.fused)), str(tally.total))
            found.append((*cells, "; ".join(notes)))
        return found

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        return {
            "fusions": {
                name: {"fused": len(tally.fused), "of": tally.total}
                for name, tally in self.tallies.items()
            },
            "fused": [{"fusion": c.name, "path": c.path, "formats": c.formats} for c in self.fused],
            "skipped": [s._asdict() for s in self.skipped],
            "disabled": self.disabled,
            "nothing": self.nothing,
            "bytes": {"before": self.bytes_before, "after": self.bytes_after},
            "dispatches": self.dispatches
            and {"before": self.dispatches[0], "after": self.dispatches[1]},
            "check": self.check and vars(self.check),
            "fallbacks": self.fallbacks,
        }

    def __str__(self) -> str:
        tallies = (f"{LABELS.get(name, name)} {tally}" for name, tally in self.tallies.items())
        why = f"nothing fused: {self.nothing}" if self.nothing else "nothing fused"
        lines = [", ".join(tallies) or why]
        reasons = Counter((s.name, s.reason) for s in self.skipped)
        lines += [
            f"{LABELS.get(name, name)} not fused in {count}: {reason}"
            for (name, reason), count in reasons.items()
        ]
        lines += [f"{name} is not used: {reason}" for name, reason in self.disabled.items()]
        return "\n".join(lines)
