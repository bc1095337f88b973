"""The products with the fields of `Epilogue` and `Experts` as keywords, as tests vary them."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import mlx.core as mx

from mlxfuse.kernels.matmul.product import Call, Epilogue, Experts


def flat(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` of x, a weight, `Epilogue` and `Experts`."""

    @wraps(function)
    def call(
        x: Any,
        weight: Any,
        *,
        bias: mx.array | None = None,
        residual: mx.array | None = None,
        activation: str | None = None,
        experts: mx.array | None = None,
        scores: mx.array | None = None,
        sorted_experts: bool = False,
        **more: Any,
    ) -> Any:
        of = None if experts is None else Experts(experts, scores, sorted_experts)
        return function(x, weight, Epilogue(bias, residual, activation), of, **more)

    return call


call_of = flat(Call)
