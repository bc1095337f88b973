"""Decoder layers of mlx-lm's models that norm or multiply what attention and MLP give before they
add it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..env import switched_off
from ..kernels.norm.rms_norm import Post
from .attention import FusedAttention
from .block import READERS, BlockForm, FusedBlock
from .fused import Run
from .mlp import FusedMLP
from .norm import FusedFactor, FusedNorm, Given, Normed, added, floats
from .projection import KernelProjection
from .router import FusedRouter


@dataclass
class PostNormForm(BlockForm):
    """A decoder layer of two halves, each of which may norm, mixes, norms or multiplies, and adds.

    ``norms`` of `BlockForm` are empty where a half does not norm its input.

    posts      names of the norms of what the halves give, or empty.
    gated      of a `FusedGatedPostNormBlock`, names of the gate of what is given for each layer,
               of the linear behind it, of its norm, of what multiplies the layer, and of the flag
               that says that there are experts. Its norm is the third of ``after``, if it is there.
    factor     names of the attributes that tell what multiplies it instead; see `FusedFactor`.
    clips      sums are clipped in float16, where the layer's own code is run instead.
    before     the norms of ``norms``, fused; None for those that are not there.
    after      the norms of ``posts``, fused; or the factor.
    beside     of a layer with an MLP and experts side by side, names of the router, of the
               experts, of the norm of their input, and of the norms of what MLP and experts give.
    sides      these three norms, fused.
    gate       the gate of ``gated``, where it is multiplied with what is given.
    following  the next layer of the same kind, whose first norm is given along with the result.
    given      by the layer before: the result, and its norm. That layer cannot know who gets its
               result, so the norm is used by a layer that gets that very array, and by no other.
    """

    posts: tuple[str, str] = ("", "")
    gated: tuple[str, ...] = ()
    factor: tuple[str, ...] = ()
    clips: bool = False
    beside: tuple[str, ...] = ()
    before: tuple[FusedNorm | None, ...] = ()
    after: tuple[FusedNorm | FusedFactor, ...] = ()
    sides: tuple[FusedNorm, ...] = ()
    gate: KernelProjection | None = None
    following: nn.Module | None = field(default=None, repr=False, compare=False)
    given: tuple[mx.array, mx.array] | None = field(default=None, repr=False, compare=False)
    pieces = ("before", "after", "sides", "gate")

    def norms_hold(self) -> bool:
        norms = (*self.before, *self.after, *self.sides)
        return all(norm is None or norm.holds() for norm in norms)


class FusedPostNormBlock(FusedBlock):
    """Mixed with the class of an mlx-lm decoder layer; see `PostNormForm`."""

    _fused: PostNormForm

    def __call__(
        self, x: mx.array, mask: mx.array | str | None = None, cache: Any = None
    ) -> mx.array:
        """x [B, L, hidden_size] -> the same shape."""
        form = self._fused
        run, given = Run.of(x), self._given(x)
        clipped = form.clips and x.dtype == mx.float16
        if clipped or not self.fusible(run.on) or not form.norms_hold():
            own: mx.array = form.original.__call__(self, x, mask, cache)
            return own
        if form.int8 and not switched_off("int8"):
            run, given = run._replace(rounds=True), None
        mixer, mlp = self[form.mixer], self[form.mlp]
        if isinstance(mixer, FusedAttention) and mixer.holds(run.on, counted=False):
            entering, places = mixer.entering(run), mixer.places(run, x, cache)
            if given is None:
                heads = self.part(entering, self.enter, self.children_read, x, *places)
            else:
                heads = mixer.part(entering, mixer.enter, mixer.children_read, given, *places)
            output = mixer.attend(heads, mask, cache)
            if isinstance(mlp, FusedMLP) and mlp.holds(run.on, counted=False):
                return self._give(self.part(run, self.finish, self.children_read, output, x))
            h, normed = self.part(run, self.between, self.children_read, output, x)
        else:
            r = mixer(self._plain(0, x) if given is None else given, mask, cache)
            h, normed = self.part(run, self.add_norm, self.children_read, r, x)
        y = mlp(normed if isinstance(mlp, READERS) else floats(normed))
        return self._give(self.part(run, self.add_last, self.children_read, y, h))

    def children_read(self) -> list[tuple[nn.Module, str]]:
        form = self._fused
        own = [(parent, name) for parent, name in super().children_read() if name]
        posts = [(self, name) for name in (*form.posts, *form.beside[2:]) if name]
        following = form.following
        if isinstance(following, FusedPostNormBlock) and following._fused.norms[0]:
            posts.append((following, following._fused.norms[0]))
        return [*own, *posts]

    def finish(self, run: Run, output: mx.array, x: mx.array) -> tuple[mx.array, ...]:
        """All that comes after attention."""
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
        norm, post = self._fused.before[1], self._fused.after[0].before()
        rounding = self._rounding(1, run)
        if rounding is not None:
            return rounding.normed(x, residual, post)
        if norm is None:
            h = added(x, residual, post)
            return h, h
        found = norm(x, residual, post=post)
        assert found.h is not None
        assert found.y is not None
        return found.h, Normed(found.y) if run.rounds else found.y

    def add_last(self, run: Run, y: mx.array, h: mx.array) -> tuple[mx.array, ...]:
        """h with what the MLP gives, normed or multiplied; and its norm for the next layer."""
        return self._ended(run, y, h, self._fused.after[1].before())

    def _ended(
        self,
        run: Run,
        y: mx.array,
        h: mx.array,
        post: Post | float,
        beside: tuple[Post, mx.array] | None = None,
    ) -> tuple[mx.array, ...]:
        following = self._fused.following
        norm = None
        if isinstance(following, FusedPostNormBlock) and not run.rounds:
            norm = following._fused.before[0] if following._fused.before else None
        if norm is None or not norm.holds():
            return (added(y, h, post, beside),)
        found = norm(y, h, post=post, beside=beside)
        assert found.h is not None
        assert found.y is not None
        return found.h, found.y

    def _give(self, ended: tuple[mx.array, ...]) -> mx.array:
        """The layer's result; its norm, if it is there, is handed to the next layer."""
        following = self._fused.following
        if len(ended) == 2 and isinstance(following, FusedPostNormBlock):
            following._fused.given = ended[0], ended[1]
        return ended[0]

    def _given(self, x: mx.array) -> mx.array | None:
        """The norm of x, if the layer before has given it."""
        given, self._fused.given = self._fused.given, None
        return given[1] if given is not None and given[0] is x else None

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


class FusedGatedPostNormBlock(FusedPostNormBlock):
    """A layer that hands keys and values on and may have an input of its own (Gemma 4)."""

    def __call__(  # type: ignore[override]
        self,
        x: mx.array,
        mask: mx.array | str | None = None,
        cache: Any = None,
        per_layer_input: mx.array | None = None,
        shared_kv: tuple[Any, Any] | None = None,
        offset: Any = None,
    ) -> tuple[mx.array, tuple[Any, Any] | None, Any]:
        """x [B, L, hidden_size] -> the same shape; what its attention hands on.

        Args:
            per_layer_input: ``[B, L, size]``, is multiplied by a gate, and added.
        """
        form = self._fused
        run, given = Run.of(x), self._given(x)
        *gate, norm, scalar, experts = (getattr(self, name) for name in form.gated)
        alike = (norm is not None) == (len(form.after) == 3)
        alike = alike and bool(experts) == bool(form.sides)
        if not alike or not self.fusible(run.on, form.gate) or not form.norms_hold():
            own: Any = form.original.__call__(
                self, x, mask, cache, per_layer_input, shared_kv, offset
            )
            return own
        r, shared_kv, offset = self[form.mixer](
            self._plain(0, x) if given is None else given,
            *(mask, cache),
            shared_kv=shared_kv,
            offset=offset,
        )
        if form.sides:
            return self._give(self._side_by_side(run, r, x, scalar)), shared_kv, offset
        h, normed = self.part(run, self.add_norm, self.children_read, r, x)
        y, last = self[form.mlp](normed), self.multiply_last
        if None not in (*gate, norm) and per_layer_input is not None:
            h = added(y, h, form.after[1].before())
            y = gate[1](self._gated(run, h, per_layer_input))
            last = self.multiply_input
        arrays = (y, h) if scalar is None else (y, h, scalar)
        return self._give(self.part(run, last, self.children_read, *arrays)), shared_kv, offset

    def _side_by_side(
        self, run: Run, r: mx.array, x: mx.array, scalar: mx.array | None
    ) -> tuple[mx.array, ...]:
        """What comes after attention, with an MLP and experts that read the same sum."""
        form = self._fused
        router, experts = (self[name] for name in form.beside[:2])
        fused = isinstance(router, FusedRouter) and router.holds(run)
        weights = (router.weight(),) if fused else ()
        h, normed, of_experts, *routed = self.part(
            run, self.add_norms, self.children_read, r, x, *weights
        )
        y = self[form.mlp](normed)
        ids, scores = router.chosen(run, routed[0]) if fused else router(h)
        other = experts(of_experts, ids, scores)
        arrays = (y, other, h) if scalar is None else (y, other, h, scalar)
        found: tuple[mx.array, ...] = self.part(
            run, self.multiply_both, self.children_read, *arrays
        )
        return found

    def add_norms(
        self, run: Run, r: mx.array, x: mx.array, *weights: mx.array
    ) -> tuple[mx.array, ...]:
        """`add_norm`; and the norms of the same sum for the experts and by other weights."""
        norm, post = self._fused.before[1], self._fused.after[0].before()
        assert norm is not None
        others = (self._fused.sides[0].before().weight, *weights)
        found = norm(r, x, post=post, others=others)
        assert found.h is not None
        assert found.y is not None
        return found.h, found.y, *found.others

    def multiply_both(
        self, run: Run, y: mx.array, other: mx.array, h: mx.array, *scalar: mx.array
    ) -> tuple[mx.array, ...]:
        """`multiply_last` of the sum of the norms of what MLP and experts give."""
        _, of_mlp, of_experts = self._fused.sides
        normed = of_experts(other).y
        assert normed is not None
        return self._multiplied(run, y, h, 1, scalar, (of_mlp.before(), normed))

    def _gated(self, run: Run, h: mx.array, given: mx.array) -> mx.array:
        """What is given for the layer, times its gate."""
        form, y = self._fused, None
        if form.gate is not None:
            y = form.gate.multiplied(h, "gelu_tanh", given, run.on)
        return mx.multiply(nn.gelu_approx(self[form.gated[0]](h)), given) if y is None else y

    def multiply_last(
        self, run: Run, y: mx.array, h: mx.array, *scalar: mx.array
    ) -> tuple[mx.array, ...]:
        """`add_last`, times what multiplies the layer."""
        return self._multiplied(run, y, h, 1, scalar)

    def multiply_input(
        self, run: Run, y: mx.array, h: mx.array, *scalar: mx.array
    ) -> tuple[mx.array, ...]:
        """`multiply_last` where y is of the layer's own input."""
        return self._multiplied(run, y, h, 2, scalar)

    def _multiplied(
        self,
        run: Run,
        y: mx.array,
        h: mx.array,
        which: int,
        scalars: tuple[mx.array, ...],
        beside: tuple[Post, mx.array] | None = None,
    ) -> tuple[mx.array, ...]:
        norm = self._fused.after[which]
        assert isinstance(norm, FusedNorm)
        scalar = scalars[0] if scalars else None
        if scalar is None or scalar.shape == (1,):
            return self._ended(run, y, h, norm.before(scalar), beside)
        return (added(y, h, norm.before(), beside) * scalar,)
