"""MLX's quantised embedding, of which a look-up is one dispatch."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from ..kernels import backend
from ..kernels.matmul.dequantize import dequantize
from .fused import Form, FusedModule
from .projection import KernelProjection


@dataclass
class EmbeddingForm(Form):
    """An ``nn.QuantizedEmbedding``.

    dtype  of its rows, as MLX gives them.
    rows   its weight.
    """

    dtype: mx.Dtype
    rows: KernelProjection | None = None
    pieces = ("rows",)


class FusedEmbedding(FusedModule):
    """Mixed with ``nn.QuantizedEmbedding``, of which it keeps ``as_linear``."""

    _fused: EmbeddingForm

    def __call__(self, ids: mx.array) -> mx.array:
        """ids, integers of any shape -> ``[*ids.shape, K]``."""
        form, on = self._fused, backend()
        if form.rows is None or not self.fusible(on, form.rows) or not on.takes("dequantize", None):
            own: mx.array = form.original.__call__(self, ids)
            return own
        (segment,) = form.rows.weight.segments
        return dequantize(segment, ids, form.dtype)
