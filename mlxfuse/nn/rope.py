"""Rotary position embedding with its own frequency for each pair."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn


class FrequencyRoPE(nn.Module):
    """Rotates the first ``dims`` components of the last axis; later ones pass unchanged.

    Args:
        periods: float32 [dims/2]; pair i turns by ``position / periods[i]`` radians.
        scale: rotated components are multiplied by this (YaRN's and longrope's magnitude).
        pairs: components 2i and 2i + 1 are rotated together, else i and i + dims/2.
    """

    def __init__(self, periods: mx.array, scale: float = 1.0, *, pairs: bool = False) -> None:
        super().__init__()
        self.dims = 2 * periods.size
        self.scale = scale
        self.traditional = pairs
        self._freqs = periods  # private, so that it is no parameter

    def _extra_repr(self) -> str:
        return f"{self.dims}, scale={self.scale}, traditional={self.traditional}"

    def __call__(self, x: mx.array, offset: int | mx.array = 0) -> mx.array:
        """x [..., L, D] of any float type -> the same shape and type."""
        if self.scale != 1.0:
            if self.dims == x.shape[-1]:
                x = x * self.scale
            else:
                x = x.at[..., : self.dims].multiply(self.scale)
        return mx.fast.rope(
            x,
            self.dims,
            traditional=self.traditional,
            base=None,
            scale=1.0,
            offset=offset,
            freqs=self._freqs,
        )


class NoRoPE(nn.Module):
    """What stands for a rotary embedding in a layer that rotates nothing."""

    def __call__(self, x: mx.array, offset: int | mx.array = 0) -> mx.array:
        return x
