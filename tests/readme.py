"""Writes what the documents show of the code, tables and a picture: ``python -m tests.readme``."""

from __future__ import annotations

import re
from pathlib import Path

from mlxfuse import env
from mlxfuse.formats import FORMATS
from mlxfuse.models import ARCHITECTURES
from tests.fusion.zoo import summary
from tests.picture import PICTURE, counts, draw

README = Path(__file__).parent.parent / "README.md"
CONTRIBUTING = README.parent / ".github" / "CONTRIBUTING.md"


def _table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def tables() -> dict[str, str]:
    """Name of a generated block -> its Markdown."""
    stored = [f for f in FORMATS.values() if f.name not in ("Q8_1", "Q8_K")]
    return {
        "models": _table(("models `in the file`",) * _ABREAST, _models()),
        "formats": _table(
            ("type", "bits a weight", "kernel"),
            [(f.name, f"{f.bits_per_weight:g}", "yes" if f.kernel else "") for f in stored],
        ),
        "zoo": _table(
            ("fusion", "classes with places for it", "fused", "partly", "places fused"), summary()
        ),
        "environment": _table(
            ("variable", "default", "meaning"),
            [(f"`{k}`", d or "unset", meaning) for k, (d, meaning) in env.VARIABLES.items()],
        ),
    }


_ABREAST = 4  # architectures in a row of the table


def _models() -> list[tuple[str, ...]]:
    """The architectures by the names of their models, which read on downwards."""
    cells = sorted(f"{a.models} `{a.name}`" for a in ARCHITECTURES.values())
    rows = -(-len(cells) // _ABREAST)
    cells += [""] * (rows * _ABREAST - len(cells))
    return [tuple(cells[row::rows]) for row in range(rows)]


def render(text: str) -> str:
    """``text`` with each generated block made anew; a block without a table is an error."""
    made = tables()

    def block(match: re.Match[str]) -> str:
        return f"{match[1]}\n{made[match[2]]}\n<!-- end -->"

    return re.sub(r"(<!-- generated: (\w+) -->).*?<!-- end -->", block, text, flags=re.S)


if __name__ == "__main__":
    for page in (README, CONTRIBUTING):
        page.write_text(render(page.read_text()))
    PICTURE.write_text(draw(counts()))
