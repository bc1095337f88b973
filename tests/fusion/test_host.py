"""What kept graphs spare the host when it builds the graph of a patched model's token.

Against stock's own token the figure depends on the machine: `python -m tests.bench.bench_host`
prints it. The same model with and without kept graphs is compared here.
"""

import pytest

from mlxfuse.kernels.runtime.backend import METAL
from mlxfuse.nn.fused import Run
from tests.bench import bench_host

LAYERS, PAIRS = 12, 30


@pytest.mark.parametrize("name", bench_host.CLASSES)
def test_host_time_of_a_token(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Medians of the ratio to stock, which is measured in turns with each."""
    stock, ours = bench_host.subjects(name, LAYERS)
    kept = min(bench_host.compare(stock, ours, PAIRS)[2] for _ in range(3))
    monkeypatch.setattr(Run, "of", lambda x: Run(METAL, False))
    without = min(bench_host.compare(stock, ours, PAIRS)[2] for _ in range(3))
    assert kept <= 0.85 * without
    assert kept <= 1.3


def test_kernels_are_called_for_each_token_without_kept_graphs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Control: what the other test compares with is another way to run."""
    _, ours = bench_host.subjects("llama", LAYERS)
    opaque = bench_host.Opaque()
    with opaque.installed():
        for _ in range(3):
            ours.seconds(opaque, 0.0)
        assert opaque.calls == 1  # the embedding's rows
        monkeypatch.setattr(Run, "of", lambda x: Run(METAL, False))
        ours.seconds(opaque, 0.0)
        assert opaque.calls == 1 + 5 * LAYERS
