"""The README's picture of a decoded token's dispatches in one layer; `tests.readme` writes it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from mlx_lm.models import llama, qwen3

from mlxfuse import patch_model

from .dispatches import of_layer, stock

PICTURE = Path(__file__).parent.parent / "examples" / "dispatches.svg"

# Name in the graph -> (what it is called, colour on white and black), in the order drawn.
KINDS = {
    "rms_norm": ("norm", "#ae3ec9"),
    "QuantizedMatmul": ("matmul", "#1c7ed6"),
    "quantized_matmul": ("matmul and what follows it", "#e8590c"),
    "rope": ("rope", "#2f9e44"),
    "norm_rope": ("norm and rope of q and k", "#a9714b"),
    "SliceUpdate": ("cache", "#8a8f98"),
    "scaled_dot_product_attention": ("attention", "#0c8599"),
    "Add": ("add", "#f59f00"),
    "Compiled": ("SwiGLU", "#e64980"),
}
_BOX, _GAP, _LEFT = 26, 4, 130


def counts() -> list[tuple[str, Counter[str]]]:
    """(model, dispatches of a layer) for each row of the picture."""
    found = []
    for name, module in (("llama", llama), ("qwen3", qwen3)):
        model = stock(module)
        found.append((f"{name}, mlx-lm", of_layer(model)))
        patch_model(model, fuse="all")
        found.append((f"{name}, patched", of_layer(model)))
    return found


def draw(rows: list[tuple[str, Counter[str]]]) -> str:
    """SVG of one line of boxes a row, and what the colours are."""
    lines = []
    for i, (name, counted) in enumerate(rows):
        y = 10 + i * 36 + (i // 2) * 10
        lines.append(f'<text x="8" y="{y + 18}">{name}</text>')
        kinds = [kind for kind in KINDS for _ in range(counted[kind])]
        if len(kinds) != counted.total():
            raise ValueError(f"no colour for one of {sorted(counted)}")
        for j, kind in enumerate(kinds):
            x, colour = _LEFT + j * (_BOX + _GAP), KINDS[kind][1]
            lines.append(f'<rect x="{x}" y="{y}" width="{_BOX}" height="26" fill="{colour}"/>')
        end = _LEFT + len(kinds) * (_BOX + _GAP) + 6
        lines.append(f'<text x="{end}" y="{y + 18}">{len(kinds)}</text>')
    y += 52
    named = {
        label: colour for kind, (label, colour) in KINDS.items() if any(c[kind] for _, c in rows)
    }
    x = 8
    for label, colour in named.items():
        width = 34 + 7 * len(label)
        if x + width > 740:
            x, y = 8, y + 22
        lines.append(f'<rect x="{x}" y="{y - 11}" width="12" height="12" fill="{colour}"/>')
        lines.append(f'<text x="{x + 18}" y="{y}">{label}</text>')
        x += width
    style = "<style>text{font:13px system-ui,sans-serif;fill:#767c85}</style>"
    body = "\n".join(lines)
    size = f'width="750" height="{y + 14}" viewBox="0 0 750 {y + 14}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}>\n{style}\n{body}\n</svg>\n'
