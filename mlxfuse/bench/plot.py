"""Reports drawn as SVG: tokens a second over depth, and the kernels' bytes a second by format.

The same report gives the same bytes: nothing but its numbers is drawn, with fixed digits.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from ..errors import ReportError
from ..terminal import one_line

_LARGEST = 16 << 20
_COLOURS = ("#8a8f98", "#e8590c", "#1c7ed6", "#2f9e44", "#ae3ec9")  # readable on white and black
_WIDTH, _LEFT, _RIGHT, _HEIGHT = 640, 64, 16, 200
_MOST = 200  # rows of kernels, points of a curve
_STYLE = (
    "text{font:12px system-ui,sans-serif;fill:#767c85}.t{font-size:14px}"
    ".g{stroke:#8a8f98;stroke-opacity:.3}.l{fill:none;stroke-width:2}"
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


def draw(found: dict[str, Any]) -> str:
    """SVG of what `bench`, `bench_kernels` or `read` give."""
    title = found.get("title") or _title(found)
    if found["bench"] == "kernels":
        return _bars(title, found["rows"])
    charts = []
    for kind, label in (("pp", "prompt"), ("tg", "decoding")):
        rows = [r for r in found["rows"] if r["test"].startswith(kind)]
        for test in dict.fromkeys(_base(r) for r in rows):
            mine = [r for r in rows if _base(r) == test]
            charts.append((f"{test}: {label}, tokens/s over depth", _curves(mine)))
    parts, y = [], 30.0
    for label, curves in charts:
        parts.append(_chart(label, curves, y))
        y += _HEIGHT + 80
    return _page(title, parts, y)


def _base(row: dict[str, Any]) -> str:
    return str(row["test"]).split(" @ ")[0]


def _curves(rows: Sequence[dict[str, Any]]) -> dict[str, list[tuple[float, float]]]:
    curves: dict[str, list[tuple[float, float]]] = {}
    for row in rows[: _MOST * len(_COLOURS)]:
        curves.setdefault(row["arm"], []).append((row["n_depth"], row["median_ts"]))
    return {arm: sorted(points) for arm, points in list(curves.items())[: len(_COLOURS)]}


def _chart(label: str, curves: dict[str, list[tuple[float, float]]], top: float) -> str:
    deepest = max((x for points in curves.values() for x, _ in points), default=0)
    most = _nice(max((y for points in curves.values() for _, y in points), default=0))
    bottom, span = top + 24 + _HEIGHT, _WIDTH - _LEFT - _RIGHT

    def at(x: float, y: float) -> tuple[float, float]:
        return _LEFT + (span * x / deepest if deepest else 0), bottom - _HEIGHT * y / most

    out = [_text(_LEFT, top + 10, label, "t")]
    for i in range(5):
        y = bottom - _HEIGHT * i / 4
        out.append(f'<path class="g" d="M{_LEFT} {y:.1f}H{_WIDTH - _RIGHT}"/>')
        out.append(_text(_LEFT - 6, y + 4, f"{most * i / 4:g}", anchor="end"))
    for depth in sorted({x for points in curves.values() for x, _ in points})[:12]:
        out.append(_text(at(depth, 0)[0], bottom + 16, f"{depth:g}", anchor="middle"))
    for i, (arm, points) in enumerate(curves.items()):
        colour = _COLOURS[i]
        places = [at(x, y) for x, y in points]
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
        out.append(f'<path class="l" stroke="{colour}" d="M{path}"/>')
        out += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in places]
        out.append(_key(_LEFT + 150 * i, bottom + 36, colour, arm))
    return "".join(out)


def _bars(title: str, rows: Sequence[dict[str, Any]]) -> str:
    shown = rows[:_MOST]
    most = _nice(max((r["gb_s"] for r in shown), default=0))
    left = 300
    parts = [_text(_LEFT, 40, "GB/s of each kernel", "t")]
    for i, row in enumerate(shown):
        y = 54 + 18 * i
        width = (_WIDTH - left - 60) * row["gb_s"] / most
        parts.append(_text(left - 6, y + 11, f"{row['kernel']}, {row['case']}", anchor="end"))
        parts.append(
            f'<rect x="{left}" y="{y}" width="{width:.1f}" height="13" fill="{_COLOURS[1]}"/>'
        )
        parts.append(_text(left + width + 5, y + 11, f"{row['gb_s']:.1f}"))
    return _page(title, parts, 64 + 18 * len(shown))


def _page(title: str, parts: Sequence[str], height: float) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height:.0f}" '
        f'width="{_WIDTH}" height="{height:.0f}"><title>{escape(title)}</title>'
        f"<style>{_STYLE}</style>{_text(_LEFT, 18, title)}{''.join(parts)}</svg>\n"
    )


def _text(x: float, y: float, text: str, kind: str = "", anchor: str = "start") -> str:
    extra = f' class="{kind}"' if kind else ""
    shown = escape(one_line(text, 80))
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{extra}>{shown}</text>'


def _key(x: float, y: float, colour: str, label: str) -> str:
    return f'<rect x="{x}" y="{y - 9}" width="10" height="10" fill="{colour}"/>' + _text(
        x + 15, y, one_line(label, 18)
    )


def _nice(most: float) -> float:
    """The next of 1, 2, 4 or 10 times a power of ten; 1 for nothing."""
    if most <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(most))
    return next(f * power for f in (1, 2, 4, 10) if f * power >= most * (1 - 1e-9))
