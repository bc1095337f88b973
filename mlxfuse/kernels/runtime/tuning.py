"""What `mlxfuse tune` has measured on this machine: variants of kernels, and fused or not.

The file in the user's cache names built-in variants and nothing else; it may be read, and it may
be deleted. It counts for one device, one version of MLX and one set of Metal sources.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx

from ... import env
from ...files import write_text
from .source import metal_dir

# op -> kind of call -> its variants, first the one that runs where nothing has been measured; what
# a prompt runs then follows from its rows.
VARIANTS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "quantized_matmul": {
        "vector": ("rows4", "rows8", "rows2"),
        "batch": ("rows2", "rows1"),
        "summed": ("rows4", "rows8", "rows2"),
        "prompt": ("tiles64", "tiles32", "dequantize", "batch", "tensor"),
        "grouped": ("tiles", "tensor"),
    }
}
FUSED, SEPARATE = "fused", "separate"
_LARGEST = 1 << 20  # bytes of the file


@dataclass(frozen=True, slots=True)
class Tuning:
    """Winners by name.

    variants  op -> case, of which the first word is the kind of call -> variant.
    fusions   site of a fusion -> ``fused`` or ``separate``.
    """

    variants: dict[str, dict[str, str]] = field(default_factory=dict)
    fusions: dict[str, str] = field(default_factory=dict)


def path() -> Path:
    """Where the winners are stored."""
    return env.cache_dir() / "tuning.json"


def machine() -> dict[str, str] | None:
    """What winners depend on; None where there is no Metal device to measure."""
    if not mx.metal.is_available():
        return None
    name = str(mx.device_info()["device_name"])
    return {"device": name, "mlx": version("mlx"), "kernels": source_hash()}


@cache
def source_hash() -> str:
    """12 digits that change when any of the Metal sources does."""
    found = hashlib.sha256()
    for file in sorted(metal_dir().iterdir()):
        found.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    return found.hexdigest()[:12]


def active() -> bool:
    """Whether something has been measured here."""
    return bool(known().variants)


def winner(op: str, case: str) -> str:
    """The variant for a case; the empty string where none has been measured."""
    return known().variants.get(op, {}).get(case, "")


def separate(site: str) -> bool:
    """Whether a fusion was slower than the model's own code at such a site."""
    return known().fusions.get(site) == SEPARATE


@cache
def known() -> Tuning:
    """The stored winners as far as they are for this machine and name what there is.

    The rest is ignored, which one warning says. The file is read once: this is asked in every
    call of a kernel.
    """
    file, here = path(), machine()
    if here is None:
        return Tuning()
    try:
        if file.stat().st_uid != os.getuid():
            return _ignored(file, "it is not yours")
        with file.open("rb") as opened:
            data = opened.read(_LARGEST + 1)
        found = json.loads(data.decode("utf-8")) if len(data) <= _LARGEST else None
    except FileNotFoundError:
        return Tuning()
    except (OSError, ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        return _ignored(file, "it is not what mlxfuse tune writes")
    other = [k for k, v in here.items() if found.get(k) != v]
    if other:
        return _ignored(file, f"it was measured with another {' and another '.join(other)}")
    variants: dict[str, dict[str, str]] = {}
    wrong = 0
    for op, case, name in _entries(found.get("variants")):
        if name in VARIANTS.get(op, {}).get(case.split(" ")[0], ()):
            variants.setdefault(op, {})[case] = name
        else:
            wrong += 1
    fusions = {}
    for _, site, name in _entries({"": found.get("fusions")}):
        if name in (FUSED, SEPARATE):
            fusions[site] = name
        else:
            wrong += 1
    if wrong:
        _ignored(file, f"{wrong} of its entries name no variant", "in part ")
    return Tuning(variants, fusions)


def _entries(table: Any) -> list[tuple[str, str, str]]:
    """(op, case, name) of nested objects of strings; what is none has the empty name."""
    if not isinstance(table, dict):
        return [] if table is None else [("", "", "")]
    found = []
    for op, cases in table.items():
        if not isinstance(cases, dict):
            found += [] if cases is None else [("", "", "")]
            continue
        found += [(op, case, name if isinstance(name, str) else "") for case, name in cases.items()]
    return found


def _ignored(file: Path, why: str, much: str = "") -> Tuning:
    warnings.warn(
        f"mlxfuse: {file} is {much}ignored: {why}; `mlxfuse tune` makes it anew",
        RuntimeWarning,
        stacklevel=2,
    )
    return Tuning()


def store(winners: Tuning) -> Path:
    """Add winners to those of this machine, and write them all in one step.

    Raises:
        OSError: the file cannot be written.
    """
    before, file = known(), path()
    variants = {op: dict(cases) for op, cases in before.variants.items()}
    for op, cases in winners.variants.items():
        variants.setdefault(op, {}).update(cases)
    content = {
        **(machine() or {}),
        "variants": variants,
        "fusions": {**before.fusions, **winners.fusions},
    }
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_text(file, json.dumps(content, indent=1, sort_keys=True) + "\n")
    known.cache_clear()
    return file
