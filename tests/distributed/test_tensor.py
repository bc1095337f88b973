"""Ranks that share a file give the logits of one process: see `worker`."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlxfuse.loader import load
from tests.distributed.launch import finish, start
from tests.distributed.worker import Job, logits, write_jobs
from tests.models import tiny

CASES = ("llama", "llama-q4")
WAYS = ({"fuse": "off"}, {"fuse": "all"}, {"fuse": "all", "kv_bits": "k8v4"})
WRONG = ("sum", "residual", "token")
LIMIT = 1e-5


def name_of(case: str, way: dict[str, str]) -> str:
    return " ".join((case, *way.values()))


def jobs(folder: Path, cases: tuple[str, ...]) -> list[Job]:
    found = []
    for case in cases:
        model = tiny.build(case, 0)
        path = str(tiny.write(folder / f"{case}.gguf", model))
        prompt = model.prompt.tolist()
        found += [Job(name_of(case, way), path, prompt, **way) for way in WAYS]
    return found


class Results:
    """What the ranks found, and one process."""

    def __init__(self, folder: Path, ranks: int, made: list[Job]) -> None:
        write_jobs(folder, made)
        processes = start(ranks, "tests.distributed.worker", str(folder))
        self.one = {}
        for job in made:
            if not job.wrong:
                model, _ = load(job.path, fuse=job.fuse, kv_bits=job.kv_bits)
                self.one[job.name] = logits(model, job.prompt), model.load_report.patch
        finish(processes, 300)
        self.ranks = [dict(np.load(folder / f"{rank}.npz")) for rank in range(ranks)]
        self.facts = [json.loads((folder / f"{r}.json").read_text()) for r in range(ranks)]

    def error(self, name: str, of: str | None = None) -> float:
        """The largest difference from one process, of the largest logit."""
        want = self.one[of or name][0]
        return float(max(np.abs(r[name] - want).max() for r in self.ranks) / np.abs(want).max())


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Results:
    folder = tmp_path_factory.mktemp("two")
    made = jobs(folder, CASES)
    right = next(job for job in made if job.name == "llama-q4 all")
    controls = [replace(right, name=wrong, wrong=wrong) for wrong in WRONG]
    return Results(folder, 2, made + controls)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: " ".join(way.values()))
@pytest.mark.parametrize("case", CASES)
def test_two_ranks_give_the_logits_of_one(two: Results, case: str, way: dict[str, Any]) -> None:
    name = name_of(case, way)
    assert two.error(name) < LIMIT
    first, second = (rank[name] for rank in two.ranks)
    assert np.array_equal(first, second)
    fused = {c.name for c in two.one[name][1].fused}
    assert all(set(facts[name]["fused"]) == fused for facts in two.facts)


@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_wrong_is_seen(two: Results, wrong: str) -> None:
    assert two.error(wrong, "llama-q4 all") > 100 * LIMIT


def test_a_token_takes_two_sums_a_layer(two: Results) -> None:
    for case in CASES:
        facts = two.facts[0][name_of(case, WAYS[1])]
        # One more for the embedding, and the rows of the head are gathered.
        assert facts["counts"]["all_sum"] == 2 * facts["layers"] + 1
        assert facts["counts"]["all_gather"] == 1
