"""Ranks that share a file give the logits of one process: see `worker`."""

import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers

from mlxfuse.errors import UnsupportedError
from mlxfuse.export.mlx_checkpoint import export_mlx
from mlxfuse.export.streams import export
from mlxfuse.gguf.reader import open_gguf
from mlxfuse.hub.demo import demo_path
from mlxfuse.loader import load
from mlxfuse.models.config import read_config
from mlxfuse.models.plan import plan
from mlxfuse.models.shard import shares
from tests.distributed.results import LIMIT, WIDE, Results, job, written
from tests.distributed.worker import Job
from tests.models import tiny

ALL = {"fuse": "all"}
WAYS = ({"fuse": "off"}, ALL, {"fuse": "all", "kv_bits": "k8v4"})
# Heads that do not come out even, one matrix for several, biases, windows, sinks and biases of
# experts, a shared expert, norms over all heads, attention and MLP side by side, sizes of each
# layer's own, delta nets, mixers, convolutions, a latent vector.
FAMILIES = (
    *("phi3", "qwen2", "gemma3", "gpt-oss", "qwen2moe", "olmo2", "cohere2", "gemma4", "net"),
    *("qwen3next", "nemotron_h_moe", "granitehybrid-experts", "both", "jamba", "mamba", "mamba2"),
    *("lfm2moe", "deepseek2"),
)
CHECKPOINTS = ("even", "even-experts")
# Pipelines: of any layers, compressed, with windows, and with convolutions.
PIPELINES = (
    ("llama-q4", {"fuse": "all", "kv_bits": "k8v4"}),
    *((case, ALL) for case in ("gemma3", "lfm2moe", "deepseek2")),
)
# What is done wrong on purpose, and in which file.
# With an adapter: heads that do not come out even, biases, experts, mixers.
ADAPTED = ("uneven", "qwen2", "qwen2moe", "both")
# Activations of 8 bits, where machines that share a model have them too: a rank's part of what o
# and down read stays in floats.
INT8 = {"fuse": "all,-int8:*.o,-int8:*.down", "act_quant": "on"}
WRONG = {"sum": "llama-q4", "residual": "llama-q4", "token": "llama-q4", "norm": "both"}
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


def adapted(folder: Path, case: str, **way: Any) -> Job:
    """Of a tiny file with an adapter on all its linears, which changes the logits much."""
    made = job(
        folder, case, name=" ".join((case, "adapted", *map(str, way.values()))), **ALL, **way
    )
    adapter = folder / f"{case}-adapter"
    if not adapter.exists():
        model, _ = load(made.path, fuse="off")
        how = {"rank": 4, "scale": 8.0, "dropout": 0.0}
        linear_to_lora_layers(model, 2, how)
        arrays = dict(tree_flatten(model.parameters()))
        names = [name for name in arrays if name.endswith(("lora_a", "lora_b"))]
        keys = mx.random.split(mx.random.key(0), len(names))
        pairs = zip(names, keys, strict=True)
        adapter.mkdir()
        mx.save_safetensors(
            str(adapter / "adapters.safetensors"),
            {name: 0.1 * mx.random.normal(arrays[name].shape, key=key) for name, key in pairs},
        )
        config = {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": how}
        (adapter / "adapter_config.json").write_text(json.dumps(config))
    return replace(made, adapter=str(adapter))


def check_ways(found: Results, cases: tuple[str, ...]) -> None:
    """Logits of one process, whatever is fused, and the same places are fused."""
    for case in cases:
        for way in WAYS:
            name = " ".join((case, *way.values()))
            found.check(name)
            fused = {c.name for c in found.one[name][1].patch.fused}
            assert all(set(facts[name]["fused"]) == fused for facts in found.facts), name


def check_checkpoint(found: Results, name: str) -> None:
    """What mlx-lm has sharded is fused as what it has not."""
    found.check(name)
    want = Counter(c.name for c in found.one[name][1].patch.fused)
    assert want["qkv"], name
    assert want["residual"], name
    assert all(facts[name]["fused"] == want for facts in found.facts), name


def check_pipeline(found: Results, name: str) -> None:
    """One sum for each rank's layers, and one for the embedding; a prompt may be read in parts."""
    found.check(name)
    ranks = len(found.ranks)
    for facts in found.facts:
        assert facts[name]["greedy"] == found.one[name][2], name
        assert facts[name]["counts"]["all_sum"] == ranks + 1, name
        assert re.match(
            rf"{ranks} machines: .*, has layers \d+ to \d+ and ", facts[name]["notes"][0]
        )


def check_sums(found: Results, name: str) -> None:
    """Two a layer and token, one for the embedding, and the rows of the head are gathered."""
    facts = found.facts[0][name]
    assert facts["counts"]["all_sum"] == 2 * facts["layers"] + 1, name
    assert facts["counts"]["all_gather"] == 1, name


def demo_jobs() -> list[Job]:
    if not demo_path().is_file():
        return []
    return [Job("demo", str(demo_path()), DEMO_PROMPT, greedy=16, alone=False)]


def check_demo(found: Results) -> None:
    for facts in found.facts if demo_path().is_file() else ():
        assert facts["demo"]["greedy"] == DEMO_TOKENS


def test_two_ranks(tmp_path: Path) -> None:
    """One test, so that no worker of pytest-xdist starts the ranks anew."""
    made = [job(tmp_path, case, **way) for case in ("llama-q4", "uneven") for way in WAYS]
    made += [job(tmp_path, case, **ALL) for case in FAMILIES]
    made += [checkpoint(tmp_path, case) for case in CHECKPOINTS]
    made.append(exported(tmp_path, "llama-q4"))
    made += [pipelined(tmp_path, case, way) for case, way in PIPELINES]
    how = {**ALL, "alone": False}
    made += [job(tmp_path, case, name=wrong, **how, wrong=wrong) for wrong, case in WRONG.items()]
    made += [adapted(tmp_path, case) for case in ADAPTED]
    made.append(adapted(tmp_path, "llama-q4", pipeline=True))
    made.append(job(tmp_path, "llama-q4", name="int8", **INT8))
    found = Results(tmp_path, 2, made + demo_jobs())
    check_ways(found, ("llama-q4", "uneven"))
    for case in FAMILIES:
        found.check(f"{case} all")
    for case in CHECKPOINTS:
        check_checkpoint(found, f"{case} checkpoint")
    found.check("llama-q4 exported")
    for case in ADAPTED:
        found.check(f"{case} adapted")
        assert found.error(f"{case} adapted", f"{case} all") > 100 * LIMIT, case
    found.check("llama-q4 adapted True")
    found.check("int8")
    assert found.facts[0]["int8"]["fused"]["int8"] == 2 * found.facts[0]["int8"]["layers"]
    assert found.error("int8", "llama-q4 all") > 100 * LIMIT
    for case, _ in PIPELINES:
        check_pipeline(found, f"{case} pipeline")
    for case in ("llama-q4", "qwen2moe", "gpt-oss"):
        check_sums(found, f"{case} all")
    for rank, facts in enumerate(found.facts):
        start = f"2 machines: this one, rank {rank}, has 1 to 2 of 3 key/value heads and "
        assert facts["uneven all"]["notes"][0].startswith(start)
    check_demo(found)
    for wrong, case in WRONG.items():  # what is wrong is seen
        assert found.error(wrong, f"{case} all") > 100 * LIMIT, wrong


def test_three_ranks(tmp_path: Path) -> None:
    made = [job(tmp_path, "uneven", **ALL), job(tmp_path, "gpt-oss", **ALL)]
    made.append(pipelined(tmp_path, "gemma3", ALL))
    found = Results(tmp_path, 3, made + demo_jobs())
    found.check("uneven all")
    found.check("gpt-oss all")
    check_pipeline(found, "gemma3 pipeline")
    check_demo(found)


def shared_by(folder: Path, ranks: int) -> list[str]:
    """Every tiny file, those that are too small for so many ranks wider."""
    found = []
    for case in (*tiny.CASES, "uneven"):
        path, _ = written(folder, case)
        with open_gguf(path) as file:
            try:
                shares(plan(file, read_config(file)), ranks)
            except UnsupportedError:
                wider = case in tiny.CASES and case != "lfm2"  # which names its heads' rows
                found.append(case + WIDE if wider else case)
            else:
                found.append(case)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_every_case_is_shared(ranks: int, tmp_path: Path) -> None:
    made = [job(tmp_path, case, **way) for case in shared_by(tmp_path, ranks) for way in WAYS]
    found = Results(tmp_path, ranks, made, 3600)
    for one in made:
        if not found.facts[0][one.name].get("refused"):
            found.check(one.name)
    assert sum(not f.get("refused") for f in found.facts[0].values()) > len(made) // 2
