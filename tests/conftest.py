"""Where the kernel tests run: on Metal where there is one, else on the test bench (tests/msl)."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import pytest

from mlxfuse.hub.demo import demo_path
from tests import msl

METAL = mx.metal.is_available()

# A shell that starts the tests in the background has it ignored, by what the tests start as well.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# What kernels are held to is float32: on newer GPUs MLX's products are TF32 unless they are told.
os.environ["MLX_ENABLE_TF32"] = "0"


def pytest_report_header(config: pytest.Config) -> str:
    if METAL:
        return f"Metal kernels: run on {mx.device_info()['device_name']}"
    try:
        return f"Metal kernels: no device; emulated, compiled by {msl.compiler()}"
    except msl.MslSetupError as e:
        return f"Metal kernels: no device, and the emulation cannot run: {e}"


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("metal") and not METAL:
        pytest.skip("no Metal device; the tests with the `kernels` fixture ran emulated")


@pytest.fixture(params=["metal"] if METAL else msl.BUILDS)
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Run a test's Metal kernels on the device, or emulated in each build of the bench.

    The ``fast`` build runs each launch in three thread orders, which must agree; ``checked`` looks
    at every memory access. The value is ``"metal"`` or the build.
    """
    if request.param == "metal":
        monkeypatch.setenv("MLXFUSE_KERNELS", "metal")
        yield request.param
        return
    monkeypatch.setenv("MLXFUSE_KERNELS", "emulated")
    with msl.installed(build=request.param, orders=msl.ORDERS):
        yield request.param


@pytest.fixture
def fresh_buffers() -> Iterator[None]:
    """Every array gets a buffer of its size: MLX gives used ones again that are up to twice it.

    What a test measures of memory would else depend on the tests before it.
    """
    limit = mx.set_cache_limit(0)
    yield
    mx.set_cache_limit(limit)


@pytest.fixture(scope="session")
def demo() -> Path:
    """The demo model, which must have been fetched: tests never download."""
    path = demo_path()
    if not path.is_file():
        pytest.fail(f"the demo model is not at {path}: run `mlxfuse inspect` once to fetch it")
    return path
