"""Products whose result is multiplied by what is given, in float32 before the one rounding."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlxfuse.kernels import launches
from mlxfuse.kernels.matmul.product import Epilogue
from mlxfuse.kernels.matmul.quantized_matmul import prepare, quantized_matmul
from mlxfuse.kernels.weight import QuantizedWeight
from tests.kernels.variants import segment

ROWS, COLUMNS = 40, 128


@pytest.mark.parametrize("name", ["Q8_0", "affine4"])
def test_times(name: str, kernels: str) -> None:
    rng = np.random.default_rng(0)
    weight = QuantizedWeight.whole(segment(name, ROWS, COLUMNS))
    for rows in (1, 3) if name == "affine4" else (1, 3, 11):  # MLX multiplies by its own
        x, factor = (
            mx.array(rng.standard_normal((1, rows, n), np.float32)) for n in (COLUMNS, ROWS)
        )
        (plain,) = quantized_matmul(x, weight, Epilogue(activation="gelu_tanh"))
        end = Epilogue(None, factor, "gelu_tanh", times=True)
        before = launches["quantized_matmul"]
        (got,) = quantized_matmul(x, weight, end)
        assert launches["quantized_matmul"] - before == 1
        assert mx.allclose(got, plain * factor, rtol=1e-5, atol=1e-6)
        # Control: it is not added.
        (added,) = quantized_matmul(x, weight, Epilogue(None, factor, "gelu_tanh"))
        assert mx.allclose(added, plain + factor, rtol=1e-5, atol=1e-6)
        assert not mx.allclose(got, added, atol=1e-2)
    prepared = prepare(x[:, :1], weight, Epilogue(None, factor[:, :1], "gelu_tanh", times=True))
    assert prepared is not None
    (again,) = prepared(x[:, 1:2], factor[:, 2:3])
    assert mx.allclose(again, plain[:, 1:2] * factor[:, 2:3], rtol=1e-5, atol=1e-6)
