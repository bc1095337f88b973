"""The CPU linear layers against float64, in and out of MLX's transformations."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlxfuse import blas
from mlxfuse.nn import cpu


@pytest.fixture(params=["numpy", "mlx"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to multiply, whatever BLAS this machine has."""
    monkeypatch.setattr(blas, "numpy_is_faster", lambda: request.param == "numpy")
    return request.param


def _case(n: int = 37, k: int = 24, shape: tuple[int, ...] = (2, 3)) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(5)
    x = rng.standard_normal((*shape, k)).astype(np.float32)
    w = rng.standard_normal((n, k)).astype(np.float32)
    return x, w, rng.standard_normal(n).astype(np.float32)


def _close(y: mx.array, want: np.ndarray) -> None:
    np.testing.assert_allclose(np.array(y, np.float64), want, rtol=0, atol=2e-5)


def test_numpy_path_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    x, w, _ = _case()
    calls = []
    monkeypatch.setattr(cpu, "_numpy_matmul", lambda a, b: calls.append(1) or a @ b.T)
    for faster in (True, False):
        monkeypatch.setattr(blas, "numpy_is_faster", lambda faster=faster: faster)
        with mx.stream(mx.cpu):
            cpu.matmul(mx.array(x), mx.array(w))
    expected = 1 if mx.default_device() == mx.cpu else 0
    assert len(calls) == expected


@pytest.mark.parametrize("shape", [(), (1,), (2, 3), (0,), (2, 0)])
def test_linear_matches_float64(path: str, shape: tuple[int, ...]) -> None:
    x, w, b = _case(shape=shape)
    want = x.astype(np.float64) @ w.T.astype(np.float64)
    _close(cpu.Linear(mx.array(w))(mx.array(x)), want)
    _close(cpu.Linear(mx.array(w), mx.array(b))(mx.array(x)), want + b)


def test_updated_weight_is_seen(path: str) -> None:
    x, w, _ = _case()
    layer = cpu.Linear(mx.array(w))
    layer(mx.array(x))
    layer.update({"weight": mx.array(2 * w)})
    _close(layer(mx.array(x)), 2 * (x.astype(np.float64) @ w.T))


def test_inside_compile_vmap_and_grad(path: str) -> None:
    x, w, _ = _case()
    layer, stock = cpu.Linear(mx.array(w)), nn.Linear(24, 37, bias=False)
    stock.update({"weight": mx.array(w)})
    a = mx.array(x)
    _close(mx.compile(layer)(a), np.array(stock(a)))
    _close(mx.vmap(layer)(a), np.array(stock(a)))

    def loss(module: nn.Module, value: mx.array) -> mx.array:
        return (module(value) ** 2).sum()

    for argnum in (0, 1):
        if argnum == 1:
            got = mx.grad(lambda v: loss(layer, v))(a)
            want = mx.grad(lambda v: loss(stock, v))(a)
        else:
            got = nn.value_and_grad(layer, loss)(layer, a)[1]["weight"]
            want = nn.value_and_grad(stock, loss)(stock, a)[1]["weight"]
        np.testing.assert_allclose(np.array(got), np.array(want), rtol=1e-4, atol=1e-3)


def test_wrong_shape_gets_mlx_message(path: str) -> None:
    with pytest.raises(ValueError, match="matmul"):
        mx.eval(cpu.matmul(mx.zeros((2, 5)), mx.zeros((3, 4))))


def test_streamed_matches_dense(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, w, b = _case()
    monkeypatch.setattr(cpu, "_CHUNK_BYTES", 5 * 4 * 24)  # 5 rows a chunk: ragged end
    asked = []

    def rows(start: int, stop: int) -> np.ndarray:
        asked.append((start, stop))
        return w[start:stop]

    want = x.astype(np.float64) @ w.T
    _close(cpu.StreamedLinear(rows, w.shape, mx.array(b))(mx.array(x)), want + b)
    assert asked[:2] == [(0, 5), (5, 10)]
    assert asked[-1] == (35, 37)
    embedding = cpu.StreamedEmbedding(rows, w.shape, mx.float32)
    _close(embedding.as_linear(mx.array(x)), want)
    ids = mx.array([[3, 36, 3], [0, 1, 36]])
    np.testing.assert_array_equal(np.array(embedding(ids)), w[np.array(ids)])


@pytest.mark.parametrize("shape", [(0,), (1, 0)])
def test_looking_up_no_rows_gives_none_as_in_mlx(shape: tuple[int, ...]) -> None:
    _, w, _ = _case()
    ids = mx.zeros(shape, mx.int32)
    stock = nn.Embedding(*w.shape)
    stock.set_dtype(mx.float16)
    embedding = cpu.StreamedEmbedding(lambda i, j: w[i:j], w.shape, mx.float16)
    made, wanted = embedding(ids), stock(ids)
    assert (made.shape, made.dtype) == (wanted.shape, wanted.dtype) == ((*shape, 24), mx.float16)


def test_switch_turns_numpy_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blas, "in_use", lambda: "reference")
    assert blas.numpy_is_faster()
    monkeypatch.setenv("MLXFUSE_CPU_BLAS", "0")
    assert not blas.numpy_is_faster()
    monkeypatch.delenv("MLXFUSE_CPU_BLAS")
    monkeypatch.setattr(blas, "in_use", lambda: "openblas")
    assert not blas.numpy_is_faster()


def test_streamed_layers_hold_one_chunk_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four layers of 4 chunks, 1 MB each: of 16 MB of floats no more than a few chunks live."""
    monkeypatch.setattr(cpu, "_CHUNK_BYTES", 1 << 20)
    rows = np.ones((512 * 4, 512), np.float32)
    layers = [cpu.StreamedLinear(lambda i, j: rows[i:j].copy(), (2048, 512)) for _ in range(4)]

    def peak() -> int:
        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        x = mx.ones((1, 512))
        with mx.stream(mx.cpu):
            for layer in layers:
                x = layer(x)[:, :512]
            mx.eval(x)
        assert float(x[0, 0]) == 512.0**4
        return mx.get_peak_memory() - before

    assert peak() < 3 << 20
    monkeypatch.setattr(cpu, "evaluated", lambda y: y)  # the control
    monkeypatch.setattr(blas, "numpy_is_faster", lambda: False)  # it evaluates, too
    assert peak() > 12 << 20


def test_streamed_layers_inside_compile_and_vmap() -> None:
    x, w, _ = _case()
    layer = cpu.StreamedLinear(lambda i, j: w[i:j], w.shape)
    want = x.astype(np.float64) @ w.T.astype(np.float64)
    _close(mx.compile(layer)(mx.array(x)), want)
    _close(mx.vmap(layer)(mx.array(x)), want)
