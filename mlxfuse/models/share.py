"""What one of several machines holds of a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .plan import Plan
from .rows import Ranges

Kept = tuple[Ranges | None, Ranges | None, Ranges | None]


@dataclass(frozen=True, slots=True)
class Wide:
    """A norm over a width of which the ranks have parts, or several one after the other.

    width   that is normed together.
    groups  how many such widths there are.
    first   the first of them of which this rank has a part.
    """

    width: int
    groups: int = 1
    first: int = 0


@dataclass(frozen=True, slots=True)
class Share:
    """What one of several ranks holds of a model.

    rank, ranks  its number, and how many there are.
    plan         its rows and columns of each weight; a weight of which it has none is left out.
    sums         path of each module whose results are added up over the ranks -> their width.
    absent       path of each module of which it has nothing -> how many outputs a row has there.
    norms        path of each norm over what the ranks have parts of -> what the whole is.
    kept         path of each matrix of which it has a part -> which matrices of a stack, rows and
                 columns; None for all of them.
    vocabulary   how many rows of the vocabulary each rank has; empty if each has all.
    counts       path of each attention, delta net, mixer and convolution that is split -> what it
                 counts here; see `axes.counts`.
    kv_heads     its key-value heads, and the model's; of the layer that has most of them.
    fewest       its key-value heads of the layer that has fewest.
    nbytes       bytes of the file that it holds.
    replicated   of them, bytes of what other ranks hold too.
    whole        bytes of the file that one machine alone would hold.
    notes        what is not split, and why.
    layers       the layers of which it has something: all of them, or the stage of a pipeline.
    stages       the layers with which the ranks' stages end, if it is a pipeline.
    """

    rank: int
    ranks: int
    plan: Plan
    sums: Mapping[str, int]
    absent: Mapping[str, int]
    norms: Mapping[str, Wide]
    kept: Mapping[str, Kept]
    vocabulary: tuple[int, ...]
    counts: Mapping[str, Mapping[str, int]]
    kv_heads: tuple[int, int]
    fewest: int
    nbytes: int
    replicated: int
    whole: int
    notes: tuple[str, ...]
    layers: range
    stages: tuple[int, ...] = ()

    def __str__(self) -> str:
        """A line of a report."""
        most, every = self.kv_heads
        own = f"{most}" if self.fewest == most else f"{self.fewest} to {most}"
        latent = self.plan.config.architecture.latent
        kind = "attention" if latent else "key/value"
        part = f"{own} of {every} {kind} heads and " if self.fewest < every else ""
        if self.stages:
            part = f"layers {self.layers[0]} to {self.layers[-1]} and "
        return (
            f"{self.ranks} machines: this one, rank {self.rank}, has {part}"
            f"{100 * self.nbytes / self.whole:.0f} % of the bytes"
        )
