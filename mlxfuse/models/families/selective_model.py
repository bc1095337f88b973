"""Mamba whose mixers leave a batch's padding out of their states.

mlx-lm 0.32's ``mamba`` takes the padding of the shorter prompts of a batch for tokens, gives its
norms an epsilon of 1e-5 whatever the model says, and builds a graph of one step for each token of
a prompt. Here a piece of a prompt is a few steps on all its tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import mamba
from mlx_lm.models.activations import swiglu
from mlx_lm.models.mamba import ModelArgs

__all__ = ["Model", "ModelArgs"]

# Tokens whose states are there at once: 33 MB of 8192 channels of 16 states.
PIECE = 64


def scan(
    x: mx.array, dt: mx.array, A: mx.array, B: mx.array, C: mx.array, state: mx.array
) -> tuple[mx.array, mx.array]:
    """The states ``h[t] = exp(dt[t] A) h[t-1] + dt[t] x[t] B[t]``, read by ``C[t]``.

    Each round adds to a token's state what lies twice as far back as the round before
    (Hillis and Steele's scan), so that a piece takes log2 of its tokens.

    Args:
        x, dt: float32 [N, L, channels].
        A: float32 [channels, states].
        B, C: float32 [N, L, states].
        state: float32 [N, channels, states] before the first token.

    Returns:
        ``h[t] C[t]``, float32 [N, L, channels], and the state after the last token.
    """
    found = []
    for start in range(0, x.shape[1], PIECE):
        at = slice(start, start + PIECE)
        decay = mx.exp(dt[:, at, :, None] * A)
        h = (dt[:, at] * x[:, at])[..., None] * B[:, at, None]
        step = 1
        while step < h.shape[1]:
            later = h[:, step:] + decay[:, step:] * h[:, :-step]
            h = mx.concatenate([h[:, :step], later], axis=1)
            decay = mx.concatenate([decay[:, :step], decay[:, step:] * decay[:, :-step]], axis=1)
            step *= 2
        h = h + decay * state[:, None]
        found.append((h @ C[:, at, :, None]).squeeze(-1))
        state = h[:, -1]
    return mx.concatenate(found, axis=1), state


def mix(
    mixer: nn.Module,
    x: mx.array,
    cache: Any,
    norms: Callable[[mx.array, mx.array, mx.array], tuple[mx.array, mx.array, mx.array]],
) -> mx.array:
    """What a mixer of mlx-lm's ``mamba`` or ``jamba`` makes of ``x`` [N, L, hidden_size].

    Args:
        cache: the convolution's last inputs and the states; None for no context.
        norms: what becomes of a token's time step, ``B`` and ``C`` before they are used.
    """
    length, kept = x.shape[1], mixer.conv_kernel_size - 1
    mask = cache.make_mask(length) if cache is not None else None
    lengths = cache.lengths if cache is not None else None
    inputs, state = (cache[0], cache[1]) if cache is not None else (None, None)
    x, z = mx.split(mixer.in_proj(x), 2, axis=-1)
    if mask is not None:
        x = mx.where(mask[..., None], x, 0)
    if inputs is None:
        inputs = mx.zeros((x.shape[0], kept, x.shape[-1]), x.dtype)
    whole = mx.concatenate([inputs, x], axis=1)
    x = nn.silu(mixer.conv1d(whole))
    rank, states = mixer.time_step_rank, mixer.ssm_state_size
    dt, B, C = norms(*mx.split(mixer.x_proj(x), [rank, rank + states], axis=-1))
    dt = nn.softplus(mixer.dt_proj(dt).astype(mx.float32))
    if mask is not None:  # a time step of 0 changes no state
        dt = mx.where(mask[..., None], dt, 0)
    if state is None:
        state = mx.zeros((x.shape[0], x.shape[-1], states), mx.float32)
    exact = x.astype(mx.float32)
    A, B, C = -mx.exp(mixer.A_log), B.astype(mx.float32), C.astype(mx.float32)
    y, state = scan(exact, dt, A, B, C, state)
    if cache is not None:
        if lengths is None:
            cache[0] = mx.contiguous(whole[:, -kept:])
        else:
            ends = mx.clip(lengths, 0, length)
            positions = (ends[:, None] + mx.arange(kept))[..., None]
            cache[0] = mx.take_along_axis(whole, positions, axis=1)
        cache[1] = state
        cache.advance(length)
    y = (y + mixer.D * exact).astype(x.dtype)
    made: mx.array = mixer.out_proj(swiglu(z, y))
    return made


class Mixer(mamba.MambaBlock):
    def _norms(self, *parts: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        dt, B, C = parts
        if self.use_bcdt_rms:  # Falcon Mamba
            eps = self.args.mixer_rms_eps
            dt, B, C = (mx.fast.rms_norm(part, None, eps) for part in parts)
        return dt, B, C

    def __call__(self, x: mx.array, cache: Any) -> mx.array:
        """x [N, L, hidden_size] -> the same shape."""
        return mix(self, x, cache, self._norms)


class Model(mamba.Model):
    def __init__(self, args: ModelArgs) -> None:
        super().__init__(args)
        for layer in self.layers:
            layer.mixer = Mixer(args)
            layer.norm = nn.RMSNorm(args.hidden_size, args.mixer_rms_eps)
        self.backbone.norm_f = nn.RMSNorm(args.hidden_size, args.mixer_rms_eps)
