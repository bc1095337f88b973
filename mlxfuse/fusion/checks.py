"""Patched against unpatched logits, and where they part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..errors import PatchError
from ..nn.quantized import QuantizedEmbedding
from .candidates import Candidate
from .report import Check

# Tokens of each call: a batch that the kernels take, one token at a time, more than they take.
_SCHEDULE = (6, 1, 1, 1, 40)
_KINDS = (slice(0, 6), slice(6, 9), slice(9, 49))
_SEED = 7
# Largest error, in float32, or a typical token's, of the largest logit: sums in another order,
# rounded once a layer and operation.
BOUNDS = {mx.float32: 1e-4, mx.float16: 2e-2, mx.bfloat16: 1e-1}


def logits(model: nn.Module, before: int = 0) -> mx.array:
    """The logits of a random prompt in a few calls, [tokens, vocabulary] in the model's type.

    Args:
        before: tokens that come first and have no logits.
    """
    from mlx_lm.models.cache import make_prompt_cache

    words = min(_vocabulary(model), 1 << 16)
    tokens = mx.array(np.random.default_rng(_SEED).integers(0, words, (1, sum(_SCHEDULE) + before)))
    rows, start, cache = [], before, make_prompt_cache(model)
    if before:
        mx.eval(model(tokens[:, :before], cache=cache))
    for count in _SCHEDULE:
        rows.append(model(tokens[:, start : start + count], cache=cache)[0])
        mx.eval(rows[-1])
        start += count
    return mx.concatenate(rows)


def _vocabulary(model: nn.Module) -> int:
    for module in model.modules():
        if isinstance(module, QuantizedEmbedding):
            return module.weight.rows
        if isinstance(module, nn.Embedding | nn.QuantizedEmbedding):
            return int(module.weight.shape[0])
    return 1


@dataclass(frozen=True)
class Reference:
    """The unpatched model's logits, to which the patched one's are held; see `logits`."""

    logits: mx.array
    before: int = 0

    def compare(self, model: nn.Module) -> Check:
        """How far the model is from them."""
        want, got = (
            np.array(v.astype(mx.float32), np.float64)
            for v in (self.logits, logits(model, self.before))
        )
        apart = np.abs(got - want).max(-1) / np.abs(want).max()
        # Near-equal experts change places by a rounding: a few tokens may be far off.
        typical = max(np.median(apart[kind]) for kind in _KINDS)
        cosine = (got * want).sum() / (np.linalg.norm(got) * np.linalg.norm(want))
        top1 = (got.argmax(-1) == want.argmax(-1)).mean()
        return Check(float(apart.max()), float(typical), float(cosine), float(top1))

    def within(self, check: Check) -> bool:
        """Whether it is near enough; not if there is a NaN."""
        exact = self.logits.dtype == mx.float32
        return (check.error if exact else check.typical) <= BOUNDS[self.logits.dtype]

    def verify(self, model: nn.Module, fused: Sequence[Candidate]) -> Check:
        """`compare`; if they are too far apart, undo everything and find out where.

        Raises:
            PatchError: with the first fusion that, made alone, is too far off.
        """
        bound = BOUNDS[self.logits.dtype]
        whole = self.compare(model)
        if self.within(whole):
            return whole
        for candidate in reversed(fused):
            candidate.undo()
        for candidate in sorted(fused, key=lambda c: c.path):
            candidate.emit()
            alone = self.compare(model)
            candidate.undo()
            if not self.within(alone):
                raise PatchError(
                    f"{candidate.name} of {candidate.path} changes the logits by {alone.error:.3g} "
                    f"of the largest (at most {bound:g}); the model is not patched"
                )
        raise PatchError(
            f"all fusions together change the logits by {whole.error:.3g} of the largest "
            f"(at most {bound:g}); the model is not patched"
        )


def check_logits(model: nn.Module) -> Reference:
    """The logits of the model as it is."""
    return Reference(logits(model))
