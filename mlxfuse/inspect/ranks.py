"""What each of several machines would hold of a model, from its header; no weight is read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import UnsupportedError
from ..gguf.exported import open_model
from ..memory import Machine
from ..models.config import read_config
from ..models.plan import plan
from ..models.shard import shares, stages
from .header import fit, verdict
from .needs import PLAIN, KVBits, needs_of

_NUMBER = 2  # bytes of an activation that is sent


def by_rank(
    path: Path,
    ranks: int,
    here: Machine,
    *,
    pipeline: bool = False,
    context: int = 0,
    bits: KVBits = PLAIN,
) -> list[dict[str, Any]]:
    """What each rank would hold, as plain data, ready for JSON. Sizes are in bytes.

    Args:
        path: a GGUF file, or an exported folder.
        here: each machine is taken to be like this one.
        pipeline: each has some layers, and not a part of each.
        context: tokens it is to be used with, by default all it was made for.
        bits: how keys and values are to be kept.

    Each has, beside what `header.fit` tells: its ``share`` of the model's bytes, those that are
    ``replicated`` on every rank, ``kv_heads`` as (its own, the model's) or, in a pipeline, the
    first and the last of its ``layers``, and of one token the number of ``sums`` over all ranks,
    with the bytes ``summed`` by each and ``gathered`` at the end, in 16-bit numbers, and the number
    of ``small_sums``: of a norm's squares, or of what makes a mixer's time steps.

    Raises:
        GGUFError, UnsupportedError, ModelRefError: as for ``load``; the model cannot be shared by
            so many.
    """
    with open_model(path) as file:
        trained = file.get(f"{file.architecture}.context_length", int, default=0)
        try:
            weights = plan(file, read_config(file))
            split = (stages if pipeline else shares)(weights, ranks)
        except UnsupportedError as error:
            raise UnsupportedError(f"{path}: {str(error).removeprefix(f'{path}: ')}") from None
        hidden = int(weights.config.args["hidden_size"])
        return [
            {
                "rank": share.rank,
                "share": share.nbytes / share.whole,
                "replicated": share.replicated,
                **(
                    {"layers": [share.layers[0], share.layers[-1]]}
                    if pipeline
                    else {"kv_heads": list(share.kv_heads)}
                ),
                "sums": wide + len(share.stages) + bool(share.vocabulary),
                "small_sums": len(share.sums) - wide + len(share.norms),
                "summed": hidden * _NUMBER,
                "gathered": sum(share.vocabulary) * _NUMBER,
                "notes": list(share.notes),
                **fit(needs_of(file, share.plan), here, context, trained, bits),
            }
            for share in split
            for wide in [sum(width >= hidden for width in share.sums.values())]
        ]


def lines(ranks: Sequence[dict[str, Any]]) -> list[str]:
    """`by_rank`'s result for people."""
    first = ranks[0]
    small = f", {first['small_sums']} smaller ones" if first["small_sums"] else ""
    shown = [
        f"on {len(ranks)} machines like this one, for each token: {first['sums']} sums of "
        f"{first['summed'] / 1e3:.1f} kB{small}, and {first['gathered'] / 1e3:.1f} kB of logits "
        "gathered"
    ]
    for rank in ranks:
        what = ", layers {} to {}".format(*rank["layers"]) if "layers" in rank else ""
        if heads := rank.get("kv_heads", [0])[0]:
            what = f", {heads} of {rank['kv_heads'][1]} key/value heads"
        shown.append(f"rank {rank['rank']}: {rank['share']:.0%} of the model{what}")
        shown += [f"  {line}" for line in verdict(rank)]
    return [*shown, *first["notes"]]
