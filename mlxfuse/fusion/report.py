"""What a patch did and why it did not do more."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

LABELS = {"qkv": "qkv", "gate_up": "gate/up", "residual": "residual"}


@dataclass
class Tally:
    """One kind of fusion.

    fused  formats of each place that was fused, in the order of the model.
    total  places where the model has the modules for it.
    """

    fused: list[tuple[str, ...]] = field(default_factory=list)
    total: int = 0

    def __str__(self) -> str:
        mixed = [set(formats) for formats in self.fused if len(set(formats)) > 1]
        text = f"{len(self.fused)}/{self.total}"
        if mixed:
            names = ", ".join(sorted({name.lower() for names in mixed for name in names}))
            text += f" ({len(mixed)} mixed: {names})"
        return text


@dataclass
class PatchReport:
    """Result of `patch_model`; ``str`` gives the lines that are shown.

    tallies            fusion -> what was fused.
    skipped            (fusion, path of the module, reason) for every place that was not.
    disabled           kernel -> why its self-test failed; its calls run as reference.
    self_test_seconds  time that the self-tests of kernel variants took.
    """

    tallies: dict[str, Tally] = field(default_factory=dict)
    skipped: list[tuple[str, str, str]] = field(default_factory=list)
    disabled: dict[str, str] = field(default_factory=dict)
    self_test_seconds: float = 0.0

    def __str__(self) -> str:
        tallies = (f"{LABELS[name]} {tally}" for name, tally in self.tallies.items())
        lines = [", ".join(tallies) or "nothing fused"]
        reasons = Counter((name, reason) for name, _, reason in self.skipped)
        lines += [
            f"{LABELS[name]} not fused in {count}: {reason}"
            for (name, reason), count in reasons.items()
        ]
        lines += [f"{name} is not used: {reason}" for name, reason in self.disabled.items()]
        return "\n".join(lines)
