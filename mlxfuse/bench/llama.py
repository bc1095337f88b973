"""llama.cpp's llama-bench beside ours: results of it, or the program itself."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..errors import MLXFuseError, ReportError
from ..terminal import one_line
from .measure import Test, speeds
from .run import row_of

NAME = "llama.cpp"
_LARGEST = 16 << 20  # bytes of a file of results
_HOUR = 3600


def read(path: Path, model: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of a file that ``llama-bench -o json`` or ``-o jsonl`` wrote for the same model.

    Args:
        model: what `about` tells of the GGUF file.

    Raises:
        ReportError: it is malformed, or its model has another size, count or architecture.
    """
    with path.open("rb") as file:
        data = file.read(_LARGEST + 1)
    if len(data) > _LARGEST:
        raise ReportError(f"{path}: expected what llama-bench writes, found more than 16 MiB")
    return parse(data, str(path), model)


def parse(data: bytes, source: str, model: dict[str, Any]) -> list[dict[str, Any]]:
    """`read`, of the bytes of a file."""
    results = _objects(data, source)
    rows = []
    for result in results:
        _check_model(result, source, model)
        rows.append(_row(result, source))
    if not rows:
        raise ReportError(f"{source}: llama-bench has no results in it")
    return rows


def _objects(data: bytes, source: str) -> list[dict[str, Any]]:
    try:
        text = data.decode("utf-8")
        try:
            found = json.loads(text)
        except ValueError:
            found = [json.loads(line) for line in text.splitlines() if line.strip()]
    except (ValueError, RecursionError):
        raise ReportError(f"{source}: expected JSON of llama-bench -o json") from None
    found = [found] if isinstance(found, dict) else found
    if not isinstance(found, list) or not all(isinstance(r, dict) for r in found):
        raise ReportError(f"{source}: expected llama-bench's list of results")
    return found


def _check_model(result: dict[str, Any], source: str, model: dict[str, Any]) -> None:
    for key in ("model_size", "model_n_params"):
        if result.get(key) != model[key]:
            raise ReportError(
                f"{source} is of another file: its {key} is {one_line(str(result.get(key)), 40)}, "
                f"that of {one_line(model['model_filename'])} is {model[key]}"
            )
    kind = str(result.get("model_type")).split(" ")[0]
    if kind != model["model_type"]:
        raise ReportError(
            f"{source} is of another model: {one_line(kind, 40)}, not {model['model_type']}"
        )


def _row(result: dict[str, Any], source: str) -> dict[str, Any]:
    def count(key: str) -> int:
        value = result.get(key, 0)
        if type(value) is not int or not 0 <= value < 1 << 31:
            raise ReportError(f"{source}: {key} is {one_line(str(value), 40)}, expected a count")
        return value

    test = Test(count("n_prompt"), count("n_gen"), count("n_depth"))
    if (test.prompt > 0) == (test.generated > 0):
        raise ReportError(f"{source}: a result is either of a prompt (-p) or of decoding (-n)")
    samples = result.get("samples_ns")
    if (
        not isinstance(samples, list)
        or not samples
        or not all(type(s) in (int, float) and math.isfinite(s) and s > 0 for s in samples)
    ):
        raise ReportError(f"{source}: samples_ns of {test.name} are not times")
    return row_of(NAME, test, speeds(test, [s / 1e9 for s in samples]))


def add(found: dict[str, Any], rows: Sequence[dict[str, Any]]) -> None:
    """Put rows of a file beside those of the same test, and say where they are from."""
    if not rows:
        return
    name = f"{NAME} (file)"
    found["arms"].append(
        {"name": name, "what": "from a file of llama-bench: not timed in turns with the others"}
        | {"match": "-", "error": None}
    )
    order = list(dict.fromkeys(row["test"] for row in [*found["rows"], *rows]))
    found["rows"] += [row | {"arm": name} for row in rows]
    found["rows"].sort(key=lambda row: order.index(row["test"]))


class LlamaBench:
    """The llama-bench of the PATH: each call is a process that loads, warms up and runs once.

    Raises:
        MLXFuseError: there is none.
    """

    name = NAME
    what = "llama-bench of llama.cpp, its own defaults, a process for each run"

    def __init__(self, path: Path, model: dict[str, Any]) -> None:
        program = shutil.which("llama-bench")
        if program is None:
            raise MLXFuseError("--llama-bench needs llama-bench, of llama.cpp, on the PATH")
        self._command = [program, "-m", str(path), "-r", "1", "-o", "json"]
        self._model = model

    def __call__(self, test: Test, run: Callable[..., Any] = subprocess.run) -> float:
        sizes = {"-p": test.prompt, "-n": test.generated, "-d": test.depth}
        arguments = [text for flag, n in sizes.items() for text in (flag, str(n))]
        try:
            done = run([*self._command, *arguments], capture_output=True, timeout=_HOUR)
        except subprocess.TimeoutExpired:
            raise MLXFuseError(f"llama-bench did not finish {test.name} in an hour") from None
        if done.returncode != 0:
            lines = done.stderr.decode("utf-8", "replace").strip().splitlines() or ["no message"]
            raise MLXFuseError(f"llama-bench failed: {one_line(lines[-1])}")
        (row, *more) = parse(done.stdout, "llama-bench", self._model)
        if more or row["test"] != test.name:
            raise MLXFuseError(f"llama-bench has run {row['test']}, not {test.name}")
        return float(row["samples_ns"][0] / 1e9)
