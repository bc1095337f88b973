"""The forms in which results are shown: Markdown, JSON, JSON lines, CSV."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from typing import Any

from ..terminal import one_line


def render(found: dict[str, Any], form: str) -> str:
    """``found``, as `bench` or `bench_kernels` gives it, as md, json, jsonl or csv."""
    if form == "json":
        return json.dumps(found, indent=1)
    if form == "md":
        return _kernels(found) if found["bench"] == "kernels" else _model(found)
    rows = [_flat(found) | row for row in found["rows"]]
    if form == "jsonl":
        refused = [_flat(found) | row for row in found.get("refused", [])]
        return "\n".join(json.dumps(row) for row in rows + refused)
    rows = [{k: v for k, v in row.items() if k != "programs"} for row in rows]
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue().rstrip("\n")


def _flat(found: dict[str, Any]) -> dict[str, Any]:
    """What llama-bench repeats in every row."""
    env = found["environment"]
    names = ("date", "system", "mlxfuse", "mlx", "mlx_lm", "bandwidth", "thermal")
    flat = {"device": env["device"]["name"], **{n: env[n] for n in names}}
    return flat | {"kernel_source": env["kernels"]["source"], **found.get("model", {})}


def _model(found: dict[str, Any]) -> str:
    model = found["model"]
    match = {a["name"]: _match(a) for a in found["arms"]}
    header = ("model", "arm", "test", "t/s", "min .. max", "GB/s", "% of copy", "memory")
    rows = [
        (
            one_line(str(model["model_filename"]), 40),
            one_line(row["arm"], 20),
            row["test"],
            f"{row['median_ts']:.2f} ± {row['stddev_ts']:.2f}",
            f"{row['min_ts']:.2f} .. {row['max_ts']:.2f}",
            _number(row["gb_s"], ".1f"),
            _share(row["share"]),
            "" if row["memory"] is None else f"{row['memory'] / 1e9:.2f} GB",
            _number(row["dispatches"], "d"),
            match.get(row["arm"], "-"),
        )
        for row in found["rows"]
    ]
    notes = [f"{a['name']}: {one_line(a['what'], 300)}" for a in found["arms"]]
    turns = f"{found['repetitions']} runs of each in turns; t/s: median ± standard deviation"
    table = _table((*header, "dispatches", "match"), rows)
    return "\n".join([*_machine(found), "", table, "", *notes, turns])


def _match(arm: dict[str, Any]) -> str:
    return f"yes, {arm['error']:.1e}" if arm["match"] == "yes" else str(arm["match"])


def _kernels(found: dict[str, Any]) -> str:
    header = ("kernel", "case", "variant", "us", "GB/s", "% of copy", "of floor", "of MLX")
    rows = [
        (
            row["kernel"],
            row["case"],
            row["variant"],
            f"{row['median_ns'] / 1e3:.1f}",
            _number(row["gb_s"], ".1f"),
            _share(row["share"]),
            _number(row["floor_ratio"], ".2f"),
            _number(row["mlx_ratio"], ".2f"),
            row["mlx"],
            row["estimate"],
        )
        for row in found["rows"]
    ]
    notes = [
        "of floor: time by that of a product's own loads without its arithmetic; of the others, by "
        "that of moving all their bytes once",
        "of MLX: time by that of the operation of MLX named beside it",
    ]
    table = _table((*header, "MLX's operation", "static figures"), rows)
    refused = [
        f"{row['kernel']}, {row['case']}, is not timed: {one_line(row['failure'], 2000)}"
        for row in found["refused"]
    ]
    return "\n".join([*_machine(found), "", table, "", *refused, *notes, *found["notes"]])


def _machine(found: dict[str, Any]) -> list[str]:
    env = found["environment"]
    device = env["device"]
    lines = [
        f"{one_line(str(device['name']))} ({device['kind']}), {one_line(env['system'])}, "
        f"{env['date']}",
        f"mlxfuse {env['mlxfuse']} (kernels {env['kernels']['source']}), mlx {env['mlx']}, "
        f"mlx-lm {env['mlx_lm']}; MLX's copy or sum: {env['bandwidth'] / 1e9:.1f} GB/s",
    ]
    if device["kind"] == "cpu":
        lines.append(
            f"On the CPU, every form with the same BLAS ({device.get('blas')}): no figure of a "
            "Mac, where nothing has been measured yet."
        )
    if env["thermal"]:
        lines.append(f"thermal: {one_line(env['thermal'])}")
    return lines


def _share(value: float | None) -> str:
    """More than MLX's copy moves is from the processor's caches, and no share of anything."""
    return "" if value is None or value > 1 else format(value, ".0%")


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    cells = [tuple(c.replace("|", "\\|") for c in row) for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |"
        for row in cells
    ]
    lines.insert(1, "| " + " | ".join("-" * w for w in widths) + " |")
    return "\n".join(lines)
