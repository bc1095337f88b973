"""What a result depends on: the machine, the versions, the kernels' source, the heat."""

from __future__ import annotations

import platform
import statistics
import subprocess
from datetime import UTC, datetime
from typing import Any

import mlx.core as mx

from .. import __version__, env
from ..kernels import unavailable
from ..kernels.runtime.tuning import source_hash
from .doctor import device, version_of
from .measure import seconds

_BYTES = {"cpu": 64 << 20, "metal": 256 << 20}


def environment() -> dict[str, Any]:
    """For a report; nothing in it names the user or a path."""
    found = device()
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": {k: found[k] for k in ("name", "kind", "architecture", "blas") if k in found},
        "system": platform.platform(),
        "python": platform.python_version(),
        "mlxfuse": __version__,
        "mlx": version_of("mlx"),
        "mlx_lm": version_of("mlx-lm"),
        "kernels": {
            "mode": env.get("MLXFUSE_KERNELS"),
            "unavailable": unavailable(),
            "source": source_hash(),
        },
        "bandwidth": bandwidth(found["kind"]),
        "thermal": thermal(),
    }


def bandwidth(kind: str) -> float:
    """Bytes a second of the faster of MLX's own copy and sum of a large array; each the median."""
    x = mx.arange(_BYTES[kind] // 4, dtype=mx.float32)
    mx.eval(x)

    def rate(moved: int, operation: Any) -> float:
        taken = [seconds(lambda: mx.eval(operation())) for _ in range(6)]
        return moved / statistics.median(taken[1:])

    return max(rate(2 * x.nbytes, lambda: x + 1), rate(x.nbytes, lambda: x.sum()))


def thermal() -> str | None:
    """What macOS says of its heat, on one line; None elsewhere."""
    if platform.system() != "Darwin":
        return None
    try:
        done = subprocess.run(
            ["/usr/bin/pmset", "-g", "therm"], capture_output=True, text=True, timeout=5
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return "; ".join(line.strip() for line in done.stdout.splitlines() if line.strip()) or None
