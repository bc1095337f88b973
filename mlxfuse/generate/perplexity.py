"""Perplexity of a text, and how far one way to compute it is from another, as llama.cpp has it.

The text is cut into chunks of ``context`` tokens, each of which begins anew, with BOS where the
model has it there; the second half of each is scored. KLD is the Kullback-Leibler divergence of
the next token's distribution from the plain one, or from that of the same model in other types.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import mlx.core as mx

from ..errors import MLXFuseError

Model = Callable[..., mx.array]


@dataclass(frozen=True, slots=True)
class Way:
    """A way to compute logits: a model, and what makes its caches."""

    model: Model
    make_caches: Callable[[], list[Any]]


@dataclass(frozen=True, slots=True)
class Mean:
    """A mean and its standard error."""

    value: float
    error: float

    @classmethod
    def of(cls, values: mx.array) -> Mean:
        """float32 [n]; the error of a single value is 0."""
        count = max(values.size - 1, 1)
        return cls(float(values.mean()), float((mx.var(values) / count).sqrt()))


@dataclass(frozen=True, slots=True)
class Report:
    """What was found.

    tokens       scored.
    perplexity   exp of the mean negative log-likelihood.
    base         the plain way's perplexity; this and what follows only where two are compared.
    kld          mean KLD in nats; kld_99 and kld_max its 99th percentile and greatest.
    same_top     share of tokens after which both find the same next one most likely.
    rms_dp       root mean square of the change of the true token's probability.
    """

    tokens: int
    chunks: int
    context: int
    step: int
    perplexity: Mean
    base: Mean | None = None
    kld: Mean | None = None
    kld_99: float | None = None
    kld_max: float | None = None
    same_top: Mean | None = None
    rms_dp: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def perplexity(
    ids: Sequence[int],
    way: Way,
    base: Way | None = None,
    *,
    bos: int | None = None,
    context: int = 512,
    chunks: int | None = None,
    step: int = 512,
    on_chunk: Callable[[int, int], None] | None = None,
) -> Report:
    """Score a text.

    Args:
        ids: its tokens.
        base: the plain way, to compare with.
        bos: the token that replaces the first of each chunk.
        chunks: score at most so many.
        step: tokens processed at a time; a compressed cache is read as in generation with 8 at
            most, a longer step sees its own tokens as they were before they are compressed.
        on_chunk: called as (chunks done, chunks).

    Raises:
        MLXFuseError: the text has not one chunk of tokens.
    """
    count = min(len(ids) // context, chunks or len(ids))
    if context < 4 or count < 1:
        raise MLXFuseError(
            f"expected a text of at least one context ({context:,} tokens, at least 4), found "
            f"{len(ids):,} tokens: give a longer text or a shorter context"
        )
    found: list[list[mx.array]] = []
    for chunk in range(count):
        tokens = list(ids[chunk * context : (chunk + 1) * context])
        if bos is not None:
            tokens[0] = bos
        found += _scores(tokens, way, base, step)
        if on_chunk:
            on_chunk(chunk + 1, count)
    columns = [mx.concatenate(list(column)) for column in zip(*found, strict=True)]
    scored = Report(columns[0].size, count, context, step, _exp(columns[0]))
    if base is None:
        return scored
    nll, plain, kld, same = columns
    ordered = mx.sort(kld)
    change = mx.exp(-nll) - mx.exp(-plain)
    return replace(
        scored,
        base=_exp(plain),
        kld=Mean.of(kld),
        kld_99=float(ordered[math.ceil(0.99 * kld.size) - 1]),
        kld_max=float(ordered[-1]),
        same_top=Mean.of(same),
        rms_dp=float(mx.mean(change**2).sqrt()),
    )


def _exp(nll: mx.array) -> Mean:
    mean = Mean.of(nll)
    return Mean(math.exp(mean.value), math.exp(mean.value) * mean.error)


def _scores(tokens: list[int], way: Way, base: Way | None, step: int) -> Iterator[list[mx.array]]:
    """For each step of a chunk's second half: negative log-likelihoods [n], and for two ways
    also the plain ones, KLD and whether the most likely tokens are the same.
    """
    ways = [way] if base is None else [way, base]
    caches = [w.make_caches() for w in ways]
    half, last = len(tokens) // 2, len(tokens) - 1
    for start in range(0, last, step):
        stop = min(start + step, last)
        inputs = mx.array([tokens[start:stop]])
        logits = [w.model(inputs, cache=c) for w, c in zip(ways, caches, strict=True)]
        skip = max(0, half - start)
        if skip >= stop - start:
            mx.eval([c.state for cache in caches for c in cache])
            continue
        targets = mx.array(tokens[start + skip + 1 : stop + 1])[:, None]
        if len({x.shape for x in logits}) > 1:
            shapes = " and ".join(str(x.shape[-1]) for x in logits)
            raise MLXFuseError(f"expected two models with the same tokens, found {shapes} of them")
        scored = [_log_softmax(x[0, skip:].astype(mx.float32)) for x in logits]
        results = [-mx.take_along_axis(x, targets, axis=-1)[:, 0] for x in scored]
        if base is not None:
            q, p = scored
            results.append((mx.exp(p) * (p - q)).sum(-1))
            results.append((q.argmax(-1) == p.argmax(-1)).astype(mx.float32))
        mx.eval(results)
        yield results


def _log_softmax(logits: mx.array) -> mx.array:
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def render(report: Report, name: str, base: str = "plain") -> str:
    """A table for people; ``name`` and ``base`` are what the two ways are called."""

    def cell(mean: Mean | None, unit: str = "", scale: float = 1) -> str:
        digits = ".3e" if mean is not None and 0 < scale * mean.value < 0.01 else ".4f"
        return (
            ""
            if mean is None
            else f"{scale * mean.value:{digits}} ± {scale * mean.error:.1e}{unit}"
        )

    rows = [("", base if report.base else "", name)]
    rows.append(("perplexity", cell(report.base), cell(report.perplexity)))
    if report.kld:
        rows.append(("mean KLD", "", cell(report.kld)))
        rows.append(("KLD, 99 % and most", "", f"{report.kld_99:.2e}, {report.kld_max:.2e}"))
        rows.append(("same top token", "", cell(report.same_top, " %", 100)))
        rows.append(("RMS of Δp", "", f"{100 * (report.rms_dp or 0):.3f} %"))
    lines = [f"{label:<20}{plain:<24}{scored}".rstrip() for label, plain, scored in rows]
    what = f"{report.tokens:,} tokens scored, in {report.chunks} x {report.context:,}"
    return "\n".join([*lines, "", f"{what}, {report.step} at a time"])
