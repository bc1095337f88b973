"""Ranks that share a file give the logits of one process: see `worker`."""

import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from mlxfuse.export.mlx_checkpoint import export_mlx
from mlxfuse.export.streams import export
from mlxfuse.hub.demo import demo_path
from tests.distributed.results import LIMIT, Results, job
from tests.distributed.worker import Job
from tests.models import tiny

ALL = {"fuse": "all"}
WAYS = ({"fuse": "off"}, ALL, {"fuse": "all", "kv_bits": "k8v4"})
# Heads that do not come out even, one matrix for several, biases, windows, sinks and biases of
# experts, a shared expert, norms over all heads, attention and MLP side by side, sizes of each
# layer's own, delta nets, mixers, convolutions, a latent vector.
FAMILIES = (
    *("phi3", "qwen2", "gemma3", "gpt-oss", "qwen2moe", "olmo2", "cohere2", "gemma4", "net"),
    *("qwen3next", "nemotron_h_moe", "granitehybrid-experts", "lfm2moe", "deepseek2"),
)
CHECKPOINTS = ("even", "even-experts")
# Pipelines: of any layers, compressed, with windows, and with convolutions.
PIPELINES = (
    ("llama-q4", {"fuse": "all", "kv_bits": "k8v4"}),
    *((case, ALL) for case in ("gemma3", "lfm2moe", "deepseek2")),
)
WRONG = ("sum", "residual", "token")
# What the demo model says after this, greedily.
DEMO_PROMPT = [504, 3575, 282, 4649, 314]
DEMO_TOKENS = [7042, 30, 198, 198, 504, 2988, 314, 42, 216, 34, 32, 33, 40, 29, 32, 33]


def checkpoint(folder: Path, case: str) -> Job:
    """Of a tiny file as an MLX-LM checkpoint."""
    made = job(folder, case, name=f"{case} checkpoint", **ALL, dtype="float32")
    export_mlx(Path(made.path), folder / made.name)
    return replace(made, path=str(folder / made.name))


def exported(folder: Path, case: str) -> Job:
    """Of a tiny file as a folder of streams."""
    made = job(folder, case, name=f"{case} exported", **ALL)
    export(Path(made.path), folder / made.name)
    return replace(made, path=str(folder / made.name))


def pipelined(folder: Path, case: str, way: dict[str, str]) -> Job:
    return job(folder, case, name=f"{case} pipeline", **way, pipeline=True, greedy=3)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Results:
    folder = tmp_path_factory.mktemp("two")
    made = [job(folder, case, **way) for case in ("llama-q4", "uneven") for way in WAYS]
    made += [job(folder, case, **ALL) for case in FAMILIES]
    made += [checkpoint(folder, case) for case in CHECKPOINTS]
    made.append(exported(folder, "llama-q4"))
    made += [pipelined(folder, case, way) for case, way in PIPELINES]
    made += [
        job(folder, "llama-q4", name=wrong, **ALL, wrong=wrong, alone=False) for wrong in WRONG
    ]
    if demo_path().is_file():
        made.append(Job("demo", str(demo_path()), DEMO_PROMPT, greedy=16, alone=False))
    return Results(folder, 2, made)


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Results:
    folder = tmp_path_factory.mktemp("three")
    made = [job(folder, "uneven", **ALL), job(folder, "gpt-oss", **ALL)]
    made.append(pipelined(folder, "gemma3", ALL))
    if demo_path().is_file():
        made.append(Job("demo", str(demo_path()), DEMO_PROMPT, greedy=16, alone=False))
    return Results(folder, 3, made)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: " ".join(way.values()))
@pytest.mark.parametrize("case", ["llama-q4", "uneven"])
def test_two_ranks_give_the_logits_of_one(two: Results, case: str, way: dict[str, str]) -> None:
    name = " ".join((case, *way.values()))
    two.check(name)
    fused = {c.name for c in two.one[name][1].patch.fused}
    assert all(set(facts[name]["fused"]) == fused for facts in two.facts)


@pytest.mark.parametrize("case", FAMILIES)
def test_every_family_is_shared(two: Results, case: str) -> None:
    two.check(f"{case} all")


@pytest.mark.parametrize("case", CHECKPOINTS)
def test_what_mlx_lm_has_sharded_is_fused(two: Results, case: str) -> None:
    name = f"{case} checkpoint"
    two.check(name)
    want = Counter(c.name for c in two.one[name][1].patch.fused)
    assert want["qkv"]
    assert want["residual"]
    assert all(facts[name]["fused"] == want for facts in two.facts)


def test_an_exported_folder_is_shared(two: Results) -> None:
    two.check("llama-q4 exported")


@pytest.mark.parametrize("case", [case for case, _ in PIPELINES])
def test_each_rank_may_have_some_layers(two: Results, case: str) -> None:
    check_pipeline(two, f"{case} pipeline")


def test_three_ranks_may_have_some_layers_each(three: Results) -> None:
    check_pipeline(three, "gemma3 pipeline")


def check_pipeline(found: Results, name: str) -> None:
    """One sum for each rank's layers, and one for the embedding; a prompt may be read in parts."""
    found.check(name)
    ranks = len(found.ranks)
    for facts in found.facts:
        assert facts[name]["greedy"] == found.one[name][2]
        assert facts[name]["counts"]["all_sum"] == ranks + 1
        assert re.match(
            rf"{ranks} machines: .*, has layers \d+ to \d+ and ", facts[name]["notes"][0]
        )


@pytest.mark.parametrize("case", ["uneven", "gpt-oss"])
def test_three_ranks_give_the_logits_of_one(three: Results, case: str) -> None:
    three.check(f"{case} all")


@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_wrong_is_seen(two: Results, wrong: str) -> None:
    assert two.error(wrong, "llama-q4 all") > 100 * LIMIT


@pytest.mark.parametrize("case", ["llama-q4 all", "qwen2moe all", "gpt-oss all"])
def test_a_token_takes_two_sums_a_layer(two: Results, case: str) -> None:
    facts = two.facts[0][case]
    # One more for the embedding, and the rows of the head are gathered.
    assert facts["counts"]["all_sum"] == 2 * facts["layers"] + 1
    assert facts["counts"]["all_gather"] == 1


def test_heads_that_do_not_come_out_even(two: Results) -> None:
    first, second = (facts["uneven all"]["notes"][0] for facts in two.facts)
    assert first.startswith("2 machines: this one, rank 0, has 1 to 2 of 3 key/value heads and ")
    assert second.startswith("2 machines: this one, rank 1, has 1 to 2 of 3 key/value heads and ")


def test_the_demo_model_says_the_same(two: Results, three: Results) -> None:
    if not demo_path().is_file():
        pytest.skip("the demo model is not in the cache")
    for found in (*two.facts, *three.facts):
        assert found["demo"]["greedy"] == DEMO_TOKENS


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_every_case_is_shared(ranks: int, tmp_path: Path) -> None:
    made = [job(tmp_path, case, **way) for case in (*tiny.CASES, "uneven") for way in WAYS]
    found = Results(tmp_path, ranks, made, 3600)
    for one in made:
        if not found.facts[0][one.name].get("refused"):
            found.check(one.name)
    assert sum(not f.get("refused") for f in found.facts[0].values()) > len(made) // 2
