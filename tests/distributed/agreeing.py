"""One rank of a test: see `launch`. It prints what it has found, as JSON."""

from __future__ import annotations

import json

import mlx.core as mx

from mlxfuse.errors import RanksError
from mlxfuse.kernels import disabled
from mlxfuse.kernels.runtime.kernel import Program
from mlxfuse.loader import load
from mlxfuse.ranks import agreed, all_values, join
from tests.distributed.launch import wait_for_others_quietly

PROGRAM = Program("vector", ("x", "w"), ("y",), "body();", ("vector",))
LONG = "é" * 100_000


def main(path: str) -> None:
    team = join()
    assert team is not None
    wait_for_others_quietly()
    if team.rank == 1:
        disabled[PROGRAM] = "largest error 3"
    model, _ = load(path, group=team.group)
    asked: list[int] = []

    def make() -> list[int]:
        asked.append(team.rank)
        return [1, 2, 3]

    # Each rank would choose another token.
    logprobs = mx.eye(4)[team.rank : team.rank + 2]
    found = {
        "rank": team.rank,
        "disabled": [why for program, why in disabled.items() if program == PROGRAM],
        "reported": model.load_report.patch.disabled,
        "own tokens": mx.argmax(logprobs, axis=-1).tolist(),
        "tokens": agreed(lambda x: mx.argmax(x, axis=-1), team.group)(logprobs).tolist(),
        "all values": all_values([team.rank, "x" * (10 * team.rank)], team.group),
        "shared": team.share(f"of rank {team.rank}"),
        "long": team.share(LONG if team.first else "") == LONG,
        "of the first": team.of_first(make),
        "asked": asked,
    }
    try:
        load(path, fuse="off" if team.first else "all", group=team.group)
    except RanksError as error:
        found["differs"] = str(error)
    team.barrier()
    team.leave(0)
    print("\n" + json.dumps(found))
