"""The host spends no more on the graph of a patched model's token than on stock's."""

import pytest

from mlxfuse.kernels.runtime.backend import METAL
from mlxfuse.nn.fused import Run
from tests.bench import bench_host

LAYERS, PAIRS = 12, 30


@pytest.mark.parametrize("name", bench_host.CLASSES)
def test_host_time_of_a_token(name: str) -> None:
    stock, ours = bench_host.subjects(name, LAYERS)
    assert bench_host.compare(stock, ours, PAIRS)[2] <= 1.0


def test_what_kernels_would_cost_without_kept_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Control: each kernel is called for each token."""
    stock, ours = bench_host.subjects("llama", LAYERS)
    opaque = bench_host.Opaque()
    with opaque.installed():
        for _ in range(3):
            ours.seconds(opaque, 0.0)
        assert opaque.calls == 0
        monkeypatch.setattr(Run, "of", lambda x: Run(METAL, False))
        ours.seconds(opaque, 0.0)
        assert opaque.calls == 5 * LAYERS
    assert bench_host.compare(stock, ours, PAIRS)[2] > 1.1
