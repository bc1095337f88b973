"""What this machine gives to mlxfuse: device, versions, kernels, and whether a model fits."""

from __future__ import annotations

import math
import platform
import re
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import mlx.core as mx

from .. import __version__, blas, env, memory
from ..errors import GGUFError, UnsupportedError
from ..gguf.exported import open_model
from ..gguf.reader import GGUFFile
from ..inspect.header import fit, verdict
from ..inspect.needs import PLAIN, KVBits, needs
from ..inspect.room import machine
from ..kernels import unavailable
from ..kernels.runtime import self_test, tuning
from ..models.config import read_config
from ..terminal import one_line
from .cases import SMALL, cases

PACKAGES = ("mlx", "mlx-lm", "numpy", "transformers", "huggingface_hub")
# applegpu_g13: M1, ...; from the architecture names that MLX reports.
_GENERATIONS = {"13": "M1", "14": "M2", "15": "M3", "16": "M4", "17": "M5"}


def diagnose(path: Path | None = None, context: int = 0, bits: KVBits = PLAIN) -> dict[str, Any]:
    """Everything as plain data, ready for JSON; sizes in bytes.

    Args:
        path: a GGUF file that is to be judged too; its weights are not read.
        context: tokens it is to be used with, by default all it was made for.
        bits: how keys and values are to be kept.

    Raises:
        GGUFError, UnsupportedError, ModelRefError: as for ``inspect``.
        KernelError: ``MLXFUSE_KERNELS`` has no such value, or is ``metal`` without a device.
    """
    found: dict[str, Any] = {
        "mlxfuse": __version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "packages": {name: version_of(name) for name in PACKAGES},
        "device": device(),
        "kernels": _kernels(),
    }
    if path is not None:
        found["model"] = _model(path, context, bits)
    return found


def version_of(package: str) -> str | None:
    """Of an installed package."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def device() -> dict[str, Any]:
    """``budget``: bytes that weights and cache may take together."""
    if not mx.metal.is_available():
        used = blas.in_use()
        hint = ""
        if used == "reference" and sys.platform == "linux":
            hint = "MLX's own BLAS is slow; a faster one: apt-get install libopenblas0-pthread"
        return {"name": platform.processor() or platform.machine(), "kind": "cpu"} | {
            "blas": used,
            "hint": hint,
            "budget": memory.available(),
        }
    info = mx.device_info()
    generation = re.fullmatch(r"applegpu_g(\d+)(\w?)", str(info["architecture"]))
    return {
        "name": info["device_name"],
        "kind": "metal",
        "architecture": info["architecture"],
        "generation": _GENERATIONS.get(generation[1], "newer than M5") if generation else "",
        "memory": info["memory_size"],
        "budget": info["max_recommended_working_set_size"],
    }


def _kernels() -> dict[str, Any]:
    """Whether kernels run, and the result of each variant's self-test where they do."""
    reason = unavailable()
    tuned = sum(len(cases) for cases in tuning.known().variants.values())
    return {
        "mode": env.get("MLXFUSE_KERNELS"),
        "unavailable": reason,
        "tuned": tuned,
        "variants": [] if reason else list(_variants()),
    }


def _variants() -> Iterator[dict[str, str]]:
    """The self-test of each kernel, for each format, on a small case."""
    emulated = env.get("MLXFUSE_KERNELS") == "emulated"
    for case in cases(SMALL):
        recorded = self_test.calls(case.ours[0])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # it is reported here
            failures = self_test.check(recorded, emulated=emulated)
        failure = "; ".join(failures.values())
        yield {"kernel": recorded[0][0].name, "variant": case.name, "failure": failure}


def _model(path: Path, context: int, bits: KVBits) -> dict[str, Any]:
    with open_model(path) as file:
        trained = file.get(f"{file.architecture}.context_length", int, default=0)
        found = fit(needs(file), machine(unavailable() is None), context, trained, bits)
        return {"file": str(path), **found, "advice": _advice(file)}


def _advice(file: GGUFFile) -> str:
    """What the type of a model's activations costs on this machine; empty if it is no matter.

    The two figures: github.com/raullenchai/Rapid-MLX/issues/3154 (an M2 Max) and
    github.com/jundot/omlx/pull/3277 (an M1 Ultra).
    """
    generation = device().get("generation")
    try:
        found = read_config(file).architecture
    except (GGUFError, UnsupportedError):
        return ""
    if generation not in ("M1", "M2") or found.metal_dtype != "bfloat16":
        return ""
    cost = (
        f"activations are bfloat16, which an {generation} emulates: in other MLX programs float16 "
        "read prompts a third faster there and wrote a seventh faster"
    )
    if found.float16 is False:
        return f"{cost}; --dtype float16 is no help, as {found.name} leaves the range of float16"
    return (
        f"{cost}; --dtype float16 avoids it, but nobody has shown that its range holds "
        f"{found.name}: compare mlxfuse perplexity with and without it first"
    )


def render(found: dict[str, Any]) -> str:
    """``diagnose``'s result for people, safe to print on a terminal."""
    device, kernels = found["device"], found["kernels"]
    rows = [
        ("mlxfuse", f"{found['mlxfuse']}, Python {found['python']}, {found['system']}"),
        ("packages", ", ".join(f"{n} {v or 'absent'}" for n, v in found["packages"].items())),
    ]
    if device["kind"] == "metal":
        rows += [
            ("device", f"{device['name']} ({device['generation'] or device['architecture']})"),
            ("memory", f"{_gb(device['memory'])}, of which MLX may use {_gb(device['budget'])}"),
        ]
    else:
        rows += [
            ("device", f"CPU ({device['name']}), BLAS: {device['blas']}"),
            ("memory", f"{_gb(device['budget'])} available"),
        ]
        if device["hint"]:
            rows.append(("hint", device["hint"]))
    failures = [v for v in kernels["variants"] if v["failure"]]
    if kernels["unavailable"]:
        rows.append(("kernels", f"not used: {kernels['unavailable']}"))
    else:
        tested = Counter(v["kernel"] for v in kernels["variants"])
        tested_and_wrong = Counter(v["kernel"] for v in failures)
        passed = (f"{k} {n - tested_and_wrong[k]} of {n}" for k, n in tested.items())
        rows.append(("kernels", f"self-tests passed: {', '.join(passed)}"))
        tuned = kernels["tuned"]
        rows.append(("tuning", f"{tuned} cases measured" if tuned else "none: built-in variants"))
    lines = [f"{label:<10}{one_line(str(value), 1000)}" for label, value in rows]
    lines += [
        f"          {v['kernel']}, {v['variant']} is not used: {one_line(v['failure'])}"
        for v in failures
    ]
    if model := found.get("model"):
        lines += ["", *_verdict(model)]
    return "\n".join(lines)


def _verdict(model: dict[str, Any]) -> list[str]:
    name = one_line(Path(model["file"]).name)
    first, *rest = verdict(model)
    read = f"{_gb(model['active'])} are read for each token"
    return [f"{name} {first}", *rest, read, *filter(None, [model["advice"]])]


def _gb(count: int) -> str:
    digits = 1 if count >= 10**10 else 2 if count >= 10**8 else 3
    return f"{math.ceil(count / 10 ** (9 - digits)) / 10**digits:.{digits}f} GB"
