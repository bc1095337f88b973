"""Reports drawn as pictures: tokens a second of each arm, and the kernels' bytes a second.

One depth is drawn as bars, several as lines over depth. The same report gives the same bytes.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..errors import ReportError
from ..terminal import one_line

_LARGEST = 16 << 20
_COLOURS = ("#8a8f98", "#e8590c", "#1c7ed6", "#2f9e44", "#ae3ec9", "#0c8599", "#f08c00")
_MOST = 200  # rows that are drawn
SUFFIXES = (".svg", ".png")


def check(path: Path) -> None:
    """Refuse what cannot be drawn, before anything is timed for it.

    Raises:
        ReportError: the file's name has another suffix, or matplotlib is not installed.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise ReportError(f"{path}: expected a name that ends in {' or '.join(SUFFIXES)}")
    if find_spec("matplotlib") is None:
        raise ReportError(
            "a picture needs matplotlib, which is not installed: pip install 'mlxfuse[plot]'"
        )


def read(path: Path) -> dict[str, Any]:
    """A report of `mlxfuse bench`, checked as far as it is drawn.

    Raises:
        ReportError: it is none.
    """
    with path.open("rb") as file:
        data = file.read(_LARGEST + 1)
    try:
        found = json.loads(data.decode("utf-8")) if len(data) <= _LARGEST else None
    except (ValueError, RecursionError):
        found = None
    wanted = {"model": ("median_ts", "n_depth"), "kernels": ("gb_s",)}
    kind = found.get("bench") if isinstance(found, dict) else None
    numbers = wanted.get(kind) if isinstance(kind, str) else None
    rows = found.get("rows") if isinstance(found, dict) else None
    if numbers is None or not isinstance(rows, list) or not all(_is_row(r, numbers) for r in rows):
        raise ReportError(f"{path}: expected a report of mlxfuse bench --report")
    return {"bench": kind, "rows": rows, "title": _title(found)}


def _is_row(row: Any, numbers: Iterable[str]) -> bool:
    if not isinstance(row, dict):
        return False
    given = [row.get(n) for n in numbers]
    texts = ("arm", "test") if "median_ts" in numbers else ("kernel", "case")
    return all(isinstance(v, int | float) and 0 <= v < 1e15 for v in given) and all(
        isinstance(row.get(t), str) for t in texts
    )


def _title(found: Any) -> str:
    """Model and device, as far as they are there."""
    device = model = None
    if isinstance(env := found.get("environment"), dict) and isinstance(env.get("device"), dict):
        device = env["device"].get("name")
    if isinstance(found.get("model"), dict):
        model = found["model"].get("model_filename")
    return ", ".join(one_line(str(name), 60) for name in (model, device) if name)


def draw(found: dict[str, Any], suffix: str = ".svg") -> bytes:
    """A picture of what `bench`, `bench_kernels` or `read` give; ``suffix`` says of which kind."""
    import matplotlib
    from matplotlib.figure import Figure

    # Text stays text in an SVG, and nothing in it depends on the time or on chance.
    fixed = {"svg.fonttype": "none", "svg.hashsalt": "mlxfuse", "text.parse_math": False}
    title = found.get("title") or _title(found)
    with matplotlib.rc_context(fixed):
        if found["bench"] == "kernels":
            rows = found["rows"][:_MOST]
            figure = Figure((8, 1.2 + 0.25 * len(rows)), layout="constrained")
            labels = [one_line(f"{row['kernel']}, {row['case']}", 80) for row in rows]
            _bars(figure.subplots(), labels, [row["gb_s"] for row in rows], _COLOURS[1:2], "GB/s")
        else:
            groups = _groups(found["rows"][:_MOST])
            height = sum(_height(curves) for curves in groups.values())
            figure = Figure((8, 0.8 + height), layout="constrained")
            ratios = [_height(curves) for curves in groups.values()]
            axes = figure.subplots(len(groups), squeeze=False, height_ratios=ratios)[:, 0]
            for (test, curves), plot in zip(groups.items(), axes, strict=True):
                _compare(plot, test, curves)
        figure.suptitle(one_line(title, 120), fontsize=11)
        out = io.BytesIO()
        metadata = {"Date": None} if suffix == ".svg" else {}
        figure.savefig(out, format=suffix[1:], dpi=144, metadata=metadata)
    return out.getvalue()


Curves = dict[str, list[tuple[float, float]]]


def _groups(rows: Sequence[dict[str, Any]]) -> dict[str, Curves]:
    """Test -> arm -> (depth, tokens a second), prompts first."""
    groups: dict[str, Curves] = {}
    for row in sorted(rows, key=lambda row: not row["test"].startswith("pp")):
        test = str(row["test"]).split(" @ ")[0]
        curves = groups.setdefault(test, {})
        curves.setdefault(row["arm"], []).append((row["n_depth"], row["median_ts"]))
    return groups or {"nothing": {}}


def _depths(curves: Curves) -> set[float]:
    return {depth for points in curves.values() for depth, _ in points}


def _height(curves: Curves) -> float:
    """Inches."""
    return 2.8 if len(_depths(curves)) > 1 else 0.7 + 0.32 * len(curves)


def _compare(plot: Any, test: str, curves: Curves) -> None:
    """Bars of one depth, or a line for each arm."""
    kind = "prompt" if test.startswith("pp") else "decoding"
    names = [one_line(arm, 40) for arm in curves]
    colours = [_COLOURS[i % len(_COLOURS)] for i in range(len(curves))]
    plot.set_title(f"{one_line(test, 40)}: {kind}", loc="left", fontsize=10)
    if len(_depths(curves)) <= 1:
        values = [points[0][1] for points in curves.values()]
        _bars(plot, names, values, colours, "tokens a second")
        return
    for name, colour, points in zip(names, colours, curves.values(), strict=True):
        plot.plot(*zip(*sorted(points), strict=True), marker="o", color=colour, label=name)
    plot.margins(y=0.1)
    plot.set_ylim(bottom=0)
    plot.set_xlabel("tokens in the cache")
    plot.set_ylabel("tokens a second")
    plot.grid(alpha=0.3)
    plot.legend(fontsize=9)


def _bars(
    plot: Any, labels: Sequence[str], values: Sequence[float], colours: Sequence[str], unit: str
) -> None:
    places = range(len(labels))
    bars = plot.barh(places, values, color=colours, height=0.7)
    plot.bar_label(bars, fmt="%.1f", padding=3, fontsize=9)
    plot.set_yticks(places, labels, fontsize=9)
    plot.invert_yaxis()
    plot.margins(x=0.12)
    plot.set_xlabel(unit)
