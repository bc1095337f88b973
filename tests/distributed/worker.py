"""One rank of a test: see `launch`, whose argument is a folder.

The folder has ``jobs.json``, a list of `Job`; the rank writes ``RANK.npz`` and ``RANK.json`` with
the logits of each and what else is to be known.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import mlx.core as mx
import numpy as np
from mlx_lm.generate import generate_step, generation_stream
from mlx_lm.models.cache import make_prompt_cache

from mlxfuse.errors import UnsupportedError
from mlxfuse.loader import load
from mlxfuse.nn.summed import SummedNorm, SummedProjection
from tests.distributed.launch import wait_for_others_quietly
from tests.models import tiny

DECODED = 3
"""Tokens of a prompt that are given one by one."""


@dataclass(frozen=True)
class Job:
    """A model to be loaded and asked.

    name    of the results.
    dtype   of an MLX-LM checkpoint's activations.
    wrong   what is done wrong on purpose: ``sum``, ``residual``, ``token``, ``norm`` or nothing.
    adapter the folder of one, or None.
    greedy  so many tokens are generated after the prompt.
    alone   whether one process is to be asked too.
    """

    name: str
    path: str
    prompt: list[int]
    fuse: str = "off"
    kv_bits: str | None = None
    dtype: str | None = None
    act_quant: str = "auto"
    pipeline: bool = False
    adapter: str | None = None
    wrong: str = ""
    greedy: int = 0
    alone: bool = True


def loaded(job: Job, group: mx.distributed.Group | None = None) -> Any:
    """The model of a job."""
    how = {"fuse": job.fuse, "kv_bits": job.kv_bits, "dtype": job.dtype}
    how |= {"act_quant": job.act_quant, "adapter_path": job.adapter}
    return load(job.path, **how, group=group, pipeline=job.pipeline and group is not None)[0]


def logits(model: Any, prompt: list[int]) -> np.ndarray:
    """Of each token of a prompt, [tokens, vocabulary], of which the last ones are decoded."""
    cache = make_prompt_cache(model)
    steps = [prompt[:-DECODED], *([token] for token in prompt[-DECODED:])]
    found = []
    for step in steps:
        y = model(mx.array([step]), cache=cache)
        mx.eval(y)
        found.append(np.array(y[0].astype(mx.float32)))
    return np.concatenate(found)


def greedy(model: Any, prompt: list[int], count: int) -> list[int]:
    """The likeliest tokens after a prompt, of which mlx-lm reads some tokens at a time."""
    steps = generate_step(mx.array(prompt), model, max_tokens=count, prefill_step_size=8)
    found = [int(token) for token, _ in steps]
    mx.synchronize(generation_stream)  # a step more than asked for is under way, with its sums
    return found


@contextmanager
def counting(counts: Counter[str]) -> Iterator[None]:
    """Counts what is said between ranks, and the values of it."""
    own = {name: getattr(mx.distributed, name) for name in ("all_sum", "all_gather")}

    def counted(name: str) -> Any:
        def call(x: mx.array, **how: Any) -> mx.array:
            counts[name] += 1
            counts[f"{name} values"] += x.size
            return own[name](x, **how)

        return call

    with patch.multiple(mx.distributed, **{name: counted(name) for name in own}):
        yield


@contextmanager
def made_wrong(what: str) -> Iterator[None]:
    if what == "sum":
        with patch.object(mx.distributed, "all_sum", lambda x, **_: x):
            yield
    elif what == "residual":
        added = SummedProjection.added

        def twice(self: Any, x: mx.array, residual: mx.array, on: Any) -> mx.array:
            first = self._linear.group.rank() == 0
            y = added(self, x, residual, on)
            return y if first and self._linear.group.size() < 2 else y + residual

        with patch.object(SummedProjection, "added", twice):
            yield
    elif what == "norm":  # of a rank's own heads alone
        with patch.object(SummedNorm, "squares", lambda self, own: own):
            yield
    else:
        yield


def run(job: Job, group: mx.distributed.Group) -> tuple[np.ndarray, dict[str, Any]]:
    """A rank's logits, and what it knows."""
    try:
        model = loaded(job, group)
    except UnsupportedError as error:  # as on every rank
        return np.zeros(1), {"refused": str(error)}
    report = model.load_report
    prompt = list(job.prompt)
    if job.wrong == "token" and group.rank() == 1:
        prompt[-2] = 0 if prompt[-2] > tiny.VOCABULARY // 2 else 255  # in another rank's rows
    with made_wrong(job.wrong):
        found = logits(model, prompt)
    counts: Counter[str] = Counter()
    with counting(counts):
        mx.eval(model(mx.array([prompt[:1]]), cache=make_prompt_cache(model)))
    facts = {
        "fused": Counter(c.name for c in report.patch.fused),
        "notes": report.notes,
        "counts": counts,
        "layers": len(model.layers),
        "greedy": greedy(model, prompt, job.greedy) if job.greedy else [],
    }
    return found, facts


def main(name: str) -> None:
    folder = Path(name)
    group = mx.distributed.init(strict=True, backend="ring")
    wait_for_others_quietly()
    arrays, facts = {}, {}
    for job in json.loads((folder / "jobs.json").read_text()):
        made = Job(**job)
        arrays[made.name], facts[made.name] = run(made, group)
    np.savez(folder / f"{group.rank()}.npz", **arrays)
    (folder / f"{group.rank()}.json").write_text(json.dumps(facts))


def write_jobs(folder: Path, jobs: list[Job]) -> None:
    (folder / "jobs.json").write_text(json.dumps([asdict(job) for job in jobs]))
