"""`mlxfuse tune`: which variants of the kernels, and which fusions, are the fastest here."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..fusion import unpatch_model
from ..fusion.candidates import Candidate, Tree, site
from ..fusion.patch import patch_model
from ..kernels.matmul.product import Experts
from ..kernels.matmul.quantized_matmul import KERNEL, run_call
from ..kernels.matmul.shapes import BUCKETS, tensors
from ..kernels.runtime import self_test, tuning
from ..kernels.runtime.tuning import FUSED, SEPARATE, Tuning
from .kernels import on_device
from .measure import alternate, seconds

# Rows of x that are measured, of every kind of call and of prompts of every length.
ROWS = (1, 4, *BUCKETS)
# What another variant must be faster by, and what the model's own code must: no noise.
MARGIN = 0.02
_LAYERS = 8  # of which the weights are more than a cache holds
_STEPS = 4  # tokens that are decoded in one run

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Result:
    """What was measured.

    winners  what is stored.
    times    (case or site) -> name -> seconds of one call; a variant whose result is wrong is
             absent.
    """

    winners: Tuning = field(default_factory=Tuning)
    times: dict[str, dict[str, float]] = field(default_factory=dict)


def tune(
    model: nn.Module, *, repetitions: int, pause: float = 0.0, say: Say = lambda text: None
) -> Result:
    """Measure for the shapes of a model and store the winners; the model is left as it was.

    Args:
        model: not patched.

    Raises:
        KernelError: there is no Metal device.
        OSError: the winners cannot be stored.
    """
    on_device("tune measures")
    try:
        patch_model(model, fuse="all")
        found = tune_kernels(model, repetitions, pause=pause, say=say)
        tuning.store(found.winners)
        unpatch_model(model)
        patch = patch_model(model, fuse="all")  # with the kernels' winners
        fusions = tune_fusions(model, patch.fused, repetitions, pause=pause, say=say)
        tuning.store(fusions.winners)
    finally:
        unpatch_model(model)
    winners = Tuning(found.winners.variants, fusions.winners.fusions)
    return Result(winners, {**found.times, **fusions.times})


def best(times: Mapping[str, float], usual: str, margin: float = MARGIN) -> str:
    """The fastest, or ``usual`` if none is faster than that by ``margin``."""
    name = min(times, key=lambda n: times[n])
    return name if times[name] < times[usual] * (1 - margin) else usual


def tune_kernels(
    model: nn.Module,
    repetitions: int,
    *,
    pause: float = 0.0,
    rows: Sequence[int] = ROWS,
    emulated: bool = False,
    clock: Callable[[], float] = time.perf_counter,
    say: Say = lambda text: None,
) -> Result:
    """Every variant of every case of the model's products.

    Weights of several layers are multiplied in one run, so that none waits in a cache.
    """
    result = Result()
    chosen = result.winners.variants.setdefault(KERNEL.name, {})
    for case, calls in cases(model, rows).items():
        say(f"timing {case}")
        names = _right(calls[0], calls[0].variants, emulated=emulated)
        turns = {
            name: partial(seconds, partial(_run, calls, name, emulated=emulated), clock)
            for name in names
        }
        for turn in turns.values():
            turn()
        taken = alternate(turns, repetitions, pause=pause)
        times = {n: statistics.median(t) / len(calls) for n, t in taken.items()}
        result.times[case] = times
        chosen[case] = best(times, names[0])
    return result


def cases(model: nn.Module, rows: Sequence[int] = ROWS) -> dict[str, list[Any]]:
    """The model's products by case, each with other numbers of rows of x."""
    recorded = self_test.calls(lambda: model(mx.zeros((1, 1), mx.int32)))
    found: dict[str, list[Any]] = {}
    for kernel, (call, *_) in recorded:
        if kernel is not KERNEL:
            continue
        # Of experts, what a decoded token runs; their prompts have two forms on an M5 only.
        lead = [(n,) for n in rows] if call.experts is None else [call.x.shape[:-1]]
        for shape in lead:
            made = _with_rows(call, *shape)
            found.setdefault(made.case, []).append(made)
        if call.experts is not None and tensors():
            made = _prompt_of(call)
            found.setdefault(made.case, []).append(made)
    return {case: calls[:_LAYERS] for case, calls in found.items()}


def _with_rows(call: Any, *lead: int) -> Any:
    """The call with random x and scores, and other experts for each row.

    What is recorded is zeros, of which every variant makes zeros, with one expert's weights.
    """
    x = mx.random.normal((*lead, call.weight.columns), key=mx.random.key(lead[0]))
    made = replace(call, x=x.astype(call.x.dtype), variant="")
    if call.experts is not None:
        made = replace(made, experts=_spread(call.experts, call.weight.experts))
    end = call.epilogue
    if end.residual is not None:
        zeros = mx.zeros((*made.lead, made.widths[0]), end.residual.dtype)
        made = replace(made, epilogue=replace(end, residual=zeros))
    return made


def _prompt_of(call: Any) -> Any:
    """As many random rows, sorted by expert, as are a tile for each expert."""
    count = call.weight.experts
    ids = mx.arange(32 * count, dtype=call.experts.ids.dtype) // 32
    x = mx.random.normal((ids.size, call.weight.columns), key=mx.random.key(count))
    return replace(
        call,
        x=x.astype(call.x.dtype),
        variant="",
        experts=Experts(ids, sorted=True),
        epilogue=replace(call.epilogue, residual=None),
    )


def _spread(experts: Experts, count: int) -> Experts:
    """Other experts of ``count`` for each row, with random scores if there are any."""
    ids = (mx.arange(experts.ids.size) % count).reshape(experts.ids.shape)
    scores = experts.scores
    if scores is not None:
        drawn = mx.random.uniform(0.1, 1, scores.shape, key=mx.random.key(1))
        scores = drawn.astype(scores.dtype)
    return replace(experts, ids=ids.astype(experts.ids.dtype), scores=scores)


def _right(call: Any, names: Sequence[str], *, emulated: bool) -> list[str]:
    """The variants whose results agree with the reference; the usual one is always among them."""
    return [
        name
        for name in names
        if name == names[0]
        or name == "dequantize"
        or not self_test.compare(KERNEL, (replace(call, variant=name),), emulated=emulated)
    ]


def _run(calls: Iterable[Any], name: str, *, emulated: bool) -> None:
    mx.eval([run_call(replace(call, variant=name), emulated=emulated) for call in calls])


def tune_fusions(
    model: nn.Module,
    fused: Sequence[Candidate],
    repetitions: int,
    *,
    pause: float = 0.0,
    clock: Callable[[], float] = time.perf_counter,
    say: Say = lambda text: None,
) -> Result:
    """Decoding with a fusion, and with the model's own code at all of its sites that are alike."""
    result = Result()
    modules = dict(Tree.of(model).modules)
    groups: dict[str, list[Candidate]] = {}
    for candidate in fused:
        groups.setdefault(site(candidate, modules), []).append(candidate)
    for name, group in groups.items():
        say(f"timing {name}")

        def run(form: str, group: list[Candidate] = group) -> float:
            for candidate in group:
                change = candidate.emit if form == FUSED else candidate.undo
                change()
            _decode(model, 1)
            return seconds(partial(_decode, model, _STEPS), clock)

        turns = {form: partial(run, form) for form in (FUSED, SEPARATE)}
        try:
            taken = alternate(turns, repetitions, pause=pause)
        finally:
            for candidate in group:
                candidate.emit()
        times = {form: statistics.median(t) / _STEPS for form, t in taken.items()}
        result.times[name] = times
        result.winners.fusions[name] = best(times, FUSED)
    return result


def _decode(model: Any, count: int) -> None:
    from mlx_lm.models.cache import make_prompt_cache

    cache = make_prompt_cache(model)
    for _ in range(count):
        mx.eval(model(mx.zeros((1, 1), mx.int32), cache=cache))
