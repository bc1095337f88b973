"""Decoder layers of mlx-lm's models that norm or multiply what attention and MLP give before they
add it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..env import switched_off
from .attention import FusedAttention
from .block import READERS, BlockForm, FusedBlock
from .fused import Run
from .mlp import FusedMLP
from .norm import FusedFactor, FusedNorm, Given, Normed, floats


@dataclass
class PostNormForm(BlockForm):
    """A decoder layer of two halves, each of which may norm, mixes, norms or multiplies, and adds.

    ``norms`` of `BlockForm` are empty where a half does not norm its input.

    posts   names of the norms of what the halves give, or empty.
    factor  names of the attributes that tell what multiplies it instead; see `FusedFactor`.
    clips   sums are clipped in float16, where the layer's own code is run instead.
    before  the norms of ``norms``, fused; None for those that are not there.
    after   the norms of ``posts``, fused; or the factor.
    """

    posts: tuple[str, str] = ("", "")
    factor: tuple[str, ...] = ()
    clips: bool = False
    before: tuple[FusedNorm | None, ...] = ()
    after: tuple[FusedNorm | FusedFactor, ...] = ()
    pieces = ("before", "after")

    def norms_hold(self) -> bool:
        return all(norm is None or norm.holds() for norm in (*self.before, *self.after))


class FusedPostNormBlock(FusedBlock):
    """Mixed with the class of an mlx-lm decoder layer; see `PostNormForm`."""

    _fused: PostNormForm

    def __call__(
        self, x: mx.array, mask: mx.array | str | None = None, cache: Any = None
    ) -> mx.array:
        """x [B, L, hidden_size] -> the same shape."""
        form = self._fused
        run = Run.of(x)
        clipped = form.clips and x.dtype == mx.float16
        if clipped or not self.fusible(run.on) or not form.norms_hold():
            own: mx.array = form.original.__call__(self, x, mask, cache)
            return own
        if form.int8 and not switched_off("int8"):
            run = run._replace(rounds=True)
        mixer, mlp = self[form.mixer], self[form.mlp]
        if isinstance(mixer, FusedAttention) and mixer.holds(run.on, counted=False):
            heads = self.part(
                mixer.entering(run), self.enter, self.children_read, x, mixer.place(run, cache)
            )
            output = mixer.attend(heads, mask, cache)
            if isinstance(mlp, FusedMLP) and mlp.holds(run.on, counted=False):
                return self.part(run, self.leave, self.children_read, output, x)
            h, normed = self.part(run, self.between, self.children_read, output, x)
        else:
            r = mixer(self._plain(0, x), mask, cache)
            h, normed = self.part(run, self.add_norm, self.children_read, r, x)
        y = mlp(normed if isinstance(mlp, READERS) else floats(normed))
        return self.part(run, self.add_last, self.children_read, y, h)

    def children_read(self) -> list[tuple[nn.Module, str]]:
        own = [(parent, name) for parent, name in super().children_read() if name]
        return [*own, *((self, name) for name in self._fused.posts if name)]

    def leave(self, run: Run, output: mx.array, x: mx.array) -> mx.array:
        h, normed = self.between(run, output, x)
        return self.add_last(run, self[self._fused.mlp].whole(run, normed), h)

    def between(
        self, run: Run, output: mx.array, x: mx.array
    ) -> tuple[mx.array, mx.array | Normed]:
        return self.add_norm(run, self[self._fused.mixer].leave(run, output), x)

    def add_norm(
        self, run: Run, x: mx.array, residual: mx.array | None = None
    ) -> tuple[mx.array, mx.array | Normed]:
        """h, which is x normed or multiplied with the residual, and what the MLP gets."""
        assert residual is not None
        norm, post = self._fused.before[1], self._fused.after[0]
        rounding = self._rounding(1, run)
        if rounding is not None:
            return rounding.normed(x, residual, post)
        if norm is None:
            h = post.added(x, residual)
            return h, h
        found = norm(x, residual, post=post)
        assert found.h is not None
        assert found.y is not None
        return found.h, Normed(found.y) if run.rounds else found.y

    def _for_one(self, which: int, run: Run, x: mx.array) -> Given:
        if self._rounding(which, run) is not None:
            return super()._for_one(which, run, x)
        return self._plain(which, x)

    def _plain(self, which: int, x: mx.array) -> mx.array:
        """A norm of x, or x."""
        norm = self._fused.before[which]
        if norm is None:
            return x
        y = norm(x).y
        assert y is not None
        return y

    def add_last(self, run: Run, y: mx.array, h: mx.array) -> mx.array:
        """h with what the MLP gives, normed or multiplied."""
        return self._fused.after[1].added(y, h)
