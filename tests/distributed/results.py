"""What ranks found, beside what one process does: see `worker`."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from mlxfuse.errors import UnsupportedError
from tests.distributed.launch import finish, start_forked
from tests.distributed.worker import Job, greedy, loaded, logits, write_jobs
from tests.models import tiny
from tests.models.case import EXPERT_Q4, K_MIX, Q4_MIX, Case

LIMIT = 1e-5
"""Of the largest logit."""

# Two ranks have two and one of its key-value heads.
UNEVEN = Case("llama", 2, hidden=256, heads=12, kv_heads=3, head_dim=64, ffn=768, formats=K_MIX)
# mlx-lm shares what comes out even.
EVEN = Case("llama", 2, hidden=128, heads=8, head_dim=16, ffn=128, formats=Q4_MIX)
EXPERTS = replace(
    tiny.CASES["qwen3moe"], layers=2, hidden=128, heads=8, expert_ffn=64, formats=EXPERT_Q4
)
# Its value heads are tiled over the key heads, and blocks do not span two of them.
NET = replace(tiny.CASES["qwen35"], formats={"": "Q8_0", "ssm_out": "F32"})
# Blocks span two of its mixers' heads, and their norm is over all of them.
BOTH = replace(tiny.CASES["falcon-h1"], formats={"": "Q8_0"}, extra={"ssm_norm": (2, 64)})
OWN = {"net": NET, "both": BOTH, "uneven": UNEVEN, "even": EVEN, "even-experts": EXPERTS}


WIDE = " wide"


def widened(case: Case) -> Case:
    """With twice the heads and the width, so that four ranks have some each."""
    ffn = (4 if case.ffn <= 64 else 2) * case.ffn
    heads, kv_heads = 2 * case.heads, 2 * case.kv_heads
    return replace(case, hidden=2 * case.hidden, heads=heads, kv_heads=kv_heads, ffn=ffn)


def written(folder: Path, name: str) -> tuple[str, list[int]]:
    """A tiny file, and its prompt; of a name that ends in `WIDE` a wider one."""
    path = folder / f"{name}.gguf"
    case = OWN.get(name)
    if name.endswith(WIDE):
        case = widened(tiny.CASES[name.removesuffix(WIDE)])
    model = tiny.build(name, 0, case)
    return str(path if path.exists() else tiny.write(path, model)), model.prompt.tolist()


def job(folder: Path, case: str, *, name: str = "", **way: Any) -> Job:
    """Of a tiny file, named after it and how it is loaded."""
    path, prompt = written(folder, case)
    return Job(name or " ".join((case, *way.values())), path, prompt, **way)


class Results:
    """What so many ranks found, and one process.

    ranks  name of a job -> logits, of each rank.
    facts  name of a job -> what else it knows, of each rank.
    one    name of a job -> logits, the report and generated tokens, of one process.
    """

    def __init__(self, folder: Path, ranks: int, made: list[Job], timeout: float = 600) -> None:
        write_jobs(folder, made)
        started = start_forked(ranks, "tests.distributed.worker", str(folder))
        self.one = {}
        try:
            for one in made:
                if one.alone:
                    with suppress(UnsupportedError):  # as by the ranks
                        model = loaded(one)
                        said = greedy(model, one.prompt, one.greedy) if one.greedy else []
                        self.one[one.name] = logits(model, one.prompt), model.load_report, said
        finally:
            finish(started, timeout)
        self.ranks = [dict(np.load(folder / f"{rank}.npz")) for rank in range(ranks)]
        self.facts = [json.loads((folder / f"{r}.json").read_text()) for r in range(ranks)]

    def error(self, name: str, of: str | None = None) -> float:
        """The largest difference from one process, of the largest logit."""
        want = self.one[of or name][0]
        return float(max(np.abs(r[name] - want).max() for r in self.ranks) / np.abs(want).max())

    def check(self, name: str) -> None:
        """The logits are those of one process, and each rank has the same bits."""
        assert self.error(name) < LIMIT, f"{name}: {self.error(name):.1e}"
        for rank in self.ranks[1:]:
            assert np.array_equal(rank[name], self.ranks[0][name]), name
