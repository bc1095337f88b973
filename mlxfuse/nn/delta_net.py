"""Modules of mlx-lm's models with their input projections in one dispatch, and else as they are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.gated_delta import gated_delta_update, normalize_qk

from ..kernels import Backend
from ..kernels.causal_conv import causal_conv
from ..kernels.delta_step import delta_step
from .fused import Form, FusedModule, Run, plus, project, replacing, split
from .norm import Normed, floats
from .projection import Projection
from .snapshot import Snapshot


@dataclass
class DeltaNetForm(Form):
    """What is fused of a module whose own code goes on to run.

    linears  names of those of its input, together those that are computed together.
    joined   the fused projections, one for each of ``linears``.
    """

    linears: tuple[tuple[str, ...], ...]
    joined: tuple[Projection, ...] = ()
    pieces: ClassVar[tuple[str, ...]] = ("joined",)

    def holds(self) -> bool:
        return all(projection.holds() for projection in self.joined)


class FusedDeltaNet(FusedModule):
    """Mixed with the class of an mlx-lm gated delta net, or with that of another module whose own
    code calls linears with its input; see `DeltaNetForm`.
    """

    _fused: DeltaNetForm

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Inputs [B, L, hidden_size], the first argument -> what the class gives."""
        form = self._fused
        if not args:  # a block of mlx-lm's may name it
            name = form.original.__call__.__code__.co_varnames[1]
            args = (kwargs.pop(name),)
        inputs: mx.array | Normed = args[0]
        module: Any = self
        run = Run.of(inputs)
        # With a sharding group their own code changes the inputs' gradient first.
        whole = getattr(self, "sharding_group", None) is None
        if form.joined and whole and self.fusible(run.on, *form.joined):
            parts = self.part(run, self.project, list, inputs)
            names = [name for group in form.linears for name in group]
            module = replacing(self, {n: _constant(y) for n, y in zip(names, parts, strict=True)})
        return form.original.__call__(module, floats(inputs), *args[1:], **kwargs)

    def project(self, run: Run, x: mx.array | Normed) -> list[mx.array]:
        """x [B, L, hidden_size] -> the result of each of the linears; by its codes, if there are
        any and they take them.
        """
        found: list[mx.array] = []
        for names, projection in zip(self._fused.linears, self._fused.joined, strict=True):
            parts = split(projection, x, run.on)
            found += [self[name](floats(x)) for name in names] if parts is None else parts
        return found


@dataclass
class GatedDeltaForm(DeltaNetForm):
    """A gated delta net whose whole method is known.

    inputs   names of the linears of its input: q with k and v, z, b and a; or all but b and a
             interleaved by their key heads, and those two.
    output   name of its last linear.
    tiled    see `delta_step`: of its norm.
    steps    what the kernels read of the module.
    o        its last linear, where that adds the residual.
    """

    inputs: tuple[str, ...] = ()
    output: str = ""
    tiled: bool = False
    steps: Snapshot | None = None
    o: Projection | None = None
    pieces: ClassVar[tuple[str, ...]] = ("joined", "steps", "o")

    def renew(self) -> None:
        super().renew()
        projections = [*self.joined, *([] if self.o is None else [self.o])]
        held = [p.snapshot for p in projections] + ([] if self.steps is None else [self.steps])
        self.watched = Snapshot.joined(held)


class FusedGatedDelta(FusedDeltaNet):
    """Mixed with the class of an mlx-lm gated delta net; see `GatedDeltaForm`."""

    _fused: GatedDeltaForm

    def __call__(
        self,
        inputs: mx.array | Normed,
        mask: Any = None,
        cache: Any = None,
        *,
        residual: mx.array | None = None,
    ) -> mx.array:
        """inputs [B, L, hidden_size] -> the same shape, with ``residual`` added."""
        form, run = self._fused, Run.of(inputs)
        if form.steps is None or not self.holds(run.on):
            return plus(super().__call__(inputs, mask, cache), residual)
        if self.enters(inputs, mask, cache):
            places = self.places(run, inputs, cache)
            found = self.part(run, self.enter, self.children_read, inputs, *places)
            y = self.attend(found, mask, cache)
        else:
            y = self.prompt(run, inputs, mask, cache)
        added = () if residual is None else (residual,)
        return self.part(run, self.leave, self.children_read, y, *added)

    def holds(self, on: Backend, *, counted: bool = True) -> bool:
        """`fusible`, with what is fused of it, and not sharded by mlx-lm."""
        whole = getattr(self, "sharding_group", None) is None
        return whole and self.fusible(on, self._fused.snapshot(), counted=counted)

    def children_read(self) -> list[tuple[nn.Module, str]]:
        """The linears that are not fused, for `part`."""
        form = self._fused
        joined = [name for group in form.linears for name in group] if form.joined else []
        own = [name for name in form.inputs if name not in joined]
        return [(self, name) for name in (*own, *[form.output] * (form.o is None))]

    def enters(self, x: mx.array | Normed, mask: mx.array | None, cache: Any) -> bool:
        """Whether `enter` does what is to be done: a token of each sequence, of the same length."""
        steps = self._fused.steps is not None and x.shape[1] == 1
        return steps and mask is None and getattr(cache, "lengths", None) is None

    def places(self, run: Run, x: mx.array | Normed, cache: Any) -> tuple[mx.array, mx.array]:
        """The last inputs of the convolution, and the float32 state of each head."""
        conv, state = (None, None) if cache is None else (cache[0], cache[1])
        weight = self["conv1d"].weight
        if conv is None:
            kept = x.shape[0], weight.shape[1] - 1, weight.shape[0]
            conv = mx.zeros(kept, floats(x).dtype)
        if state is None:
            heads, size = self.A_log.size, self["norm"].weight.size
            keys = (weight.shape[0] - heads * size) // 2 // self.num_k_heads
            state = mx.zeros((x.shape[0], heads, size, keys), mx.float32)
        return conv, state

    # --- what `FusedAttention` has too ------------------------------------------------------

    def entering(self, run: Run) -> Run:
        return run

    def enter(
        self, run: Run, x: mx.array | Normed, conv: mx.array, state: mx.array
    ) -> tuple[mx.array, ...]:
        """x [B, 1, hidden_size] -> [B, 1, heads * Dv], and what `places` gives next."""
        qkv, z, a, b = self._inputs(run, x)
        y, conv = self._convolved(qkv, conv)
        norm = self["norm"]
        parameters = self.A_log, self.dt_bias, norm.weight
        how: Any = {"eps": norm.eps, "tiled": self._fused.tiled}
        y, state = delta_step(y, (z, a, b), parameters, state, **how)
        return y, conv, state

    def attend(self, found: tuple[mx.array, ...], mask: mx.array | None, cache: Any) -> mx.array:
        """The result of `enter`, of which the rest is kept."""
        y, conv, state = found
        if cache is not None:
            cache[0], cache[1] = conv, state
            cache.advance(y.shape[1])
        return y

    def leave(self, run: Run, y: mx.array, residual: mx.array | None = None) -> mx.array:
        """[B, L, heads * Dv] -> [B, L, hidden_size], with ``residual`` added."""
        form = self._fused
        return project(self, form.output, form.o, y, residual, run.on)

    # ----------------------------------------------------------------------------------------

    def prompt(self, run: Run, x: mx.array | Normed, mask: mx.array | None, cache: Any) -> mx.array:
        """As `enter` and `attend`, of any tokens, by mlx-lm's recurrence."""
        conv, state = self.places(run, x, cache)
        qkv, z, a, b = self._inputs(run, x)
        y, conv = self._convolved(qkv, conv, mask, getattr(cache, "lengths", None))
        heads, size, keys = state.shape[1:]
        of_keys = (y.shape[-1] - heads * size) // 2
        q, k, v = mx.split(y, [of_keys, 2 * of_keys], axis=-1)
        q, k, v = (t.reshape(*t.shape[:2], -1, n) for t, n in ((q, keys), (k, keys), (v, size)))
        q, k = normalize_qk(q, k, inv_scale=keys**-0.5, eps=1e-6)
        y, state = gated_delta_update(q, k, v, a, b, self.A_log, self.dt_bias, state, mask)
        y = self["norm"](y, z.reshape(v.shape)).flatten(2)
        return self.attend((y, conv, state), mask, cache)

    def _inputs(self, run: Run, x: mx.array | Normed) -> tuple[mx.array, ...]:
        """q with k and v, and z, a and b, [B, L, N] each."""
        form = self._fused
        found: dict[str, mx.array] = {}
        if form.joined:
            names = [name for group in form.linears for name in group]
            found = dict(zip(names, self.project(run, x), strict=True))
        parts = [found[n] if n in found else self[n](floats(x)) for n in form.inputs]
        if len(parts) == 4:
            qkv, z, b, a = parts
            return qkv, z, a, b
        q, k, v, z, b, a = self.fix_query_key_value_ordering(*parts)
        return mx.concatenate([t.flatten(2) for t in (q, k, v)], axis=-1), z.flatten(2), a, b

    def _convolved(
        self,
        qkv: mx.array,
        state: mx.array,
        mask: mx.array | None = None,
        lengths: mx.array | None = None,
    ) -> tuple[mx.array, mx.array]:
        conv = self["conv1d"]
        return causal_conv(qkv, state, conv.weight, conv.get("bias"), mask=mask, lengths=lengths)


def _constant(y: mx.array) -> Callable[[mx.array], mx.array]:
    return lambda _: y
