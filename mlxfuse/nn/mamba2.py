"""Mamba-2 mixers of mlx-lm's models with few dispatches for each decoded token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..kernels import Backend
from ..kernels.causal_conv import causal_conv
from ..kernels.norm.gated_norm import gated_norm
from ..kernels.ssm_step import ssm_step
from .fused import Form, FusedModule, Run
from .projection import Projection
from .snapshot import Snapshot


@dataclass
class Mamba2Form(Form):
    """A Mamba-2 mixer whose methods are known.

    eps, groups  of its norm.
    parts        its first linear, as the gate, the input of the convolution and the steps.
    steps        what the kernels read of the module.
    """

    eps: float
    groups: int
    parts: Projection | None = None
    steps: Snapshot | None = None
    pieces = ("parts", "steps")

    def renew(self) -> None:
        super().renew()
        held = [] if self.parts is None else [self.parts.snapshot]
        self.watched = Snapshot.joined([*held, *([] if self.steps is None else [self.steps])])


class FusedMamba2(FusedModule):
    """Mixed with the class of an mlx-lm Mamba-2 mixer; see `Mamba2Form`."""

    _fused: Mamba2Form

    def __call__(self, hidden_states: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        """hidden_states [B, L, hidden_size] -> the same shape."""
        form, run = self._fused, Run.of(hidden_states)
        if not (self._enters(hidden_states, mask, cache) and self._holds(run.on)):
            own: mx.array = form.original.__call__(self, hidden_states, mask, cache)
            return own
        y, conv, state = self.part(
            run, self.step, self.children_read, hidden_states, *self._states(cache, hidden_states)
        )
        cache[0], cache[1] = conv, state
        cache.advance(1)
        return y

    def _holds(self, on: Backend) -> bool:
        return self.fusible(on, self._fused.snapshot())

    def children_read(self) -> list[tuple[nn.Module, str]]:
        """The linears that are called, for `part`."""
        return [(self, name) for name in ("in_proj", "out_proj")]

    def _enters(self, x: mx.array, mask: Any, cache: Any) -> bool:
        """Whether it is a token of each sequence, with a state that the kernel takes."""
        if x.shape[1] != 1 or mask is not None or cache is None or cache.lengths is not None:
            return False
        conv, state = cache[0], cache[1]
        alike = conv is None or conv.dtype == x.dtype
        return alike and (state is None or state.dtype == mx.float32)

    def _states(self, cache: Any, x: mx.array) -> tuple[mx.array, mx.array]:
        """The last inputs of the convolution, and the state of each head."""
        conv, state = cache[0], cache[1]
        if conv is None:
            kept = self.conv_kernel_size - 1
            conv = mx.zeros((x.shape[0], kept, self.conv_dim), x.dtype)
        if state is None:
            shape = x.shape[0], self.num_heads, self.head_dim, self.ssm_state_size
            state = mx.zeros(shape, mx.float32)
        return conv, state

    def step(
        self, run: Run, x: mx.array, conv: mx.array, state: mx.array
    ) -> tuple[mx.array, mx.array, mx.array]:
        """x [B, 1, hidden_size] -> the same shape, and what `_states` gives next."""
        form = self._fused
        parts = None if form.parts is None else form.parts.split(x, run.on)
        ends = self.intermediate_size, self.intermediate_size + self.conv_dim
        gate, xbc, dt = parts or mx.split(self["in_proj"](x), ends, axis=-1)
        filters = self["conv1d"]
        xbc, conv = causal_conv(xbc, conv, filters.weight, filters.get("bias"))
        parameters = self.A_log, self.dt_bias, self.D
        y, state = ssm_step(xbc, dt, parameters, state, tuple(self.time_step_limit))
        y = gated_norm(y, gate, self["norm"].weight, form.eps, groups=form.groups)
        return self["out_proj"](y), conv, state
