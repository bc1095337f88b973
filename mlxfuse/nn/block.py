"""Decoder layers of mlx-lm's models with fewer dispatches."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import mlx.core as mx
import mlx.nn as nn

from ..env import switched_off
from .attention import FusedAttention, scaled
from .delta_net import FusedDeltaNet, FusedGatedDelta
from .fused import Form, FusedModule, Run, plus
from .mlp import FusedMLP
from .moe import FusedExperts, FusedMoE
from .norm import FusedNorm, Given, Normed, floats

READERS = FusedAttention | FusedDeltaNet | FusedMLP | FusedMoE | FusedExperts


@dataclass
class BlockForm(Form):
    """A decoder layer that norms, mixes and adds, then norms, multiplies and adds.

    norms          names of both; of one, if it is a `FusedParallelBlock`.
    mixer          name of the attention or of what is in its place.
    mlp            name of the MLP or of what is in its place.
    keywords       whether the mixer gets mask and cache by name.
    mixer_adds     whether the mixer is a `FusedAttention` or `FusedGatedDelta` that adds the
                   residual.
    mlp_adds       whether the MLP is a `FusedMLP` whose down adds the residual.
    scaled         it is a `FusedScaledBlock`.
    parallel       it is a `FusedParallelBlock`.
    second         the first addition together with the second norm.
    int8           its norms and last linears, by path, that give or take int8 activations; the
                   latter say so themselves too.
    """

    norms: tuple[str, ...]
    mixer: str
    mlp: str
    keywords: bool = False
    scaled: bool = False
    parallel: bool = False
    mixer_adds: bool = False
    mlp_adds: bool = False
    second: FusedNorm | None = None
    int8: dict[str, FusedNorm | None] = field(default_factory=dict)
    pieces: ClassVar[tuple[str, ...]] = ("mixer_adds", "mlp_adds", "second")


class FusedBlock(FusedModule):
    """Mixed with the class of an mlx-lm decoder layer; see `BlockForm`."""

    _fused: BlockForm

    def __call__(
        self, x: mx.array, mask: mx.array | str | None = None, cache: Any = None
    ) -> mx.array:
        """x [B, L, hidden_size] -> the same shape."""
        form = self._fused
        run = self._run(x)
        if not self.fusible(run.on):
            own: mx.array = form.original.__call__(self, x, mask, cache)
            return own
        mixer = self[form.mixer]
        if not (self._adds(mixer, form.mixer_adds, run) and mixer.enters(x, mask, cache)):
            return self._add_mlp(*self._add_mixer(run, x, mask, cache))
        return self._attended(run, x, mask, cache)

    def _run(self, x: mx.array) -> Run:
        run = Run.of(x)
        rounds = self._fused.int8 and not switched_off("int8")
        return run._replace(rounds=True) if rounds else run

    def _attended(
        self,
        run: Run,
        x: mx.array,
        mask: mx.array | str | None,
        cache: Any,
        scale: mx.array | None = None,
    ) -> mx.array:
        """The whole layer, where the mixer adds the residual.

        Args:
            scale: multiplies the queries.
        """
        form, mixer = self._fused, self[self._fused.mixer]
        places = mixer.places(run, x, cache)
        heads = self.part(mixer.entering(run), self.enter, self.children_read, x, *places)
        output = mixer.attend(scaled(heads, scale), mask, cache)
        if self._adds(self[form.mlp], form.mlp_adds, run):
            return self.part(run, self.leave, self.children_read, output, x)
        return self._add_mlp(*self.part(run, self.between, self.children_read, output, x))

    def _adds(self, child: nn.Module, adds: bool, run: Run) -> bool:
        """Whether a mixer or an MLP adds the residual now."""
        fused = isinstance(child, FusedAttention | FusedGatedDelta | FusedMLP)
        return adds and fused and child.holds(run.on, counted=False)

    def children_read(self) -> list[tuple[nn.Module, str]]:
        """Its norms and what the mixer and the MLP read, for `part`."""
        own: list[tuple[nn.Module, str]] = [(self, name) for name in self._fused.norms]
        for child in (self[self._fused.mixer], self[self._fused.mlp]):
            if isinstance(child, FusedAttention | FusedGatedDelta | FusedMLP):
                own += child.children_read()
        return own

    # --- parts that are kept: before attention, after it, and what lies between it and the MLP

    def enter(self, run: Run, x: mx.array, *places: int | mx.array) -> tuple[mx.array, ...]:
        mixer = self[self._fused.mixer]
        one = isinstance(mixer, FusedAttention)
        given = self._for_one(0, run, x) if one else self._for_several(run, x)
        found: tuple[mx.array, ...] = mixer.enter(run, given, *places)
        return found

    def leave(self, run: Run, output: mx.array, x: mx.array) -> mx.array:
        form = self._fused
        h = self[form.mixer].leave(run, output, x)
        y: mx.array = self[form.mlp].whole(run, self._for_one(1, run, h), h)
        return y

    def between(
        self, run: Run, output: mx.array, x: mx.array
    ) -> tuple[mx.array, mx.array | Normed]:
        return self.add_norm(run, self[self._fused.mixer].leave(run, output, x))

    def add_norm(
        self, run: Run, x: mx.array, residual: mx.array | None = None
    ) -> tuple[mx.array, mx.array | Normed]:
        """h, which is x with the residual, and its norm."""
        form = self._fused
        norm = self._rounding(1, run)
        if norm is not None:
            return norm.normed(x, residual)
        if residual is not None and form.second and form.second.holds():
            found = form.second(x, residual)
            assert found.h is not None
            assert found.y is not None
            h, y = found.h, found.y
        else:
            h = plus(x, residual)
            y = self[form.norms[1]](h)
        return h, Normed(y) if run.rounds else y

    # --- a mixer or an MLP that does not add -------------------------------------------------

    def _add_mixer(
        self, run: Run, x: mx.array, mask: mx.array | str | None, cache: Any
    ) -> tuple[mx.array, mx.array | Normed]:
        """h, and its norm, with the mixer as a module of its own."""
        form, mixer = self._fused, self[self._fused.mixer]
        normed = self._for_several(run, x)
        if form.mixer_adds and isinstance(mixer, FusedGatedDelta):
            return self.add_norm(run, mixer(normed, mask, cache, residual=x))
        if form.mixer_adds and isinstance(mixer, FusedAttention):
            return self.add_norm(run, mixer(floats(normed), mask, cache, residual=x))
        normed = normed if isinstance(mixer, FusedDeltaNet) else floats(normed)
        how = {"mask": mask, "cache": cache}
        r = mixer(normed, **how) if form.keywords else mixer(normed, mask, cache)
        h: tuple[mx.array, mx.array | Normed] = self.part(
            run, self.add_norm, self.children_read, r, x
        )
        return h

    def _add_mlp(self, h: mx.array, normed: mx.array | Normed) -> mx.array:
        form, mlp = self._fused, self[self._fused.mlp]
        if isinstance(mlp, FusedMoE) or (form.mlp_adds and isinstance(mlp, FusedMLP)):
            return mlp(normed, residual=h)
        y: mx.array = mlp(normed if isinstance(mlp, READERS) else floats(normed))
        return h + y

    def _for_one(self, which: int, run: Run, x: mx.array) -> Given:
        """A norm of x for one reader: its codes alone, if that takes them."""
        norm = self._rounding(which, run)
        codes = None if norm is None else norm(x, outputs=("int8",)).int8
        y: Given = codes or self[self._fused.norms[which]](x)
        return y

    def _for_several(self, run: Run, x: mx.array) -> mx.array | Normed:
        """The first norm of x for readers of which some may take codes."""
        norm = self._rounding(0, run)
        y: mx.array | Normed = self[self._fused.norms[0]](x) if norm is None else norm.normed(x)[1]
        return y

    def _rounding(self, which: int, run: Run) -> FusedNorm | None:
        """A norm that gives int8 activations, if it does."""
        norm = self._fused.int8.get(self._fused.norms[which]) if run.rounds else None
        return norm if norm is not None and norm.holds() else None


class FusedScaledBlock(FusedBlock):
    """A `FusedBlock` that is given what multiplies the queries of each position."""

    def __call__(  # type: ignore[override]
        self,
        x: mx.array,
        attn_scale: mx.array | None = None,
        mask: mx.array | str | None = None,
        cache: Any = None,
    ) -> mx.array:
        """x [B, L, hidden_size] -> the same shape."""
        form = self._fused
        run = self._run(x)
        adds = self.fusible(run.on) and self._adds(self[form.mixer], form.mixer_adds, run)
        if attn_scale is None or not adds:
            own: mx.array = form.original.__call__(self, x, attn_scale, mask, cache)
            return own
        return self._attended(run, x, mask, cache, attn_scale)


class FusedParallelBlock(FusedBlock):
    """A layer that adds what attention and MLP give of one norm: both add, one after the other.

    mlx-lm's code adds the two to each other first.
    """

    def __call__(
        self, x: mx.array, mask: mx.array | str | None = None, cache: Any = None
    ) -> mx.array:
        """x [B, L, hidden_size] -> the same shape."""
        form, run = self._fused, Run.of(x)
        mixer, mlp = self[form.mixer], self[form.mlp]
        adds = self._adds(mixer, form.mixer_adds, run) and self._adds(mlp, form.mlp_adds, run)
        if not adds or not self.fusible(run.on):
            own: mx.array = form.original.__call__(self, x, mask, cache)
            return own
        *heads, normed = self.part(
            mixer.entering(run), self.enter, self.children_read, x, *mixer.places(run, x, cache)
        )
        output = mixer.attend(heads, mask, cache)
        found: mx.array = self.part(run, self.leave, self.children_read, output, x, normed)
        return found

    def enter(self, run: Run, x: mx.array, *places: int | mx.array) -> tuple[mx.array, ...]:
        form = self._fused
        normed = self[form.norms[0]](x)
        return *self[form.mixer].enter(run, normed, *places), normed

    def leave(  # type: ignore[override]
        self, run: Run, output: mx.array, x: mx.array, normed: mx.array
    ) -> mx.array:
        form = self._fused
        y: mx.array = self[form.mlp].whole(run, normed, self[form.mixer].leave(run, output, x))
        return y
