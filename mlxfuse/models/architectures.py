"""The table of architectures: every row of every family, by its name.

An architecture that mlx-lm has and that needs nothing new is one entry in the file of the family
whose layers look like its own.
"""

from __future__ import annotations

from .families import (
    gemma,
    gemma4,
    glm4,
    gpt_oss,
    layer_norm,
    lfm2,
    llama,
    llama4,
    mamba,
    mla,
    moe,
    muse_glimmer,
    olmo,
    phi3,
    qwen35,
    qwen_moe,
    selective,
    uneven,
)
from .table import Architecture

_FAMILIES = (
    gemma,
    gemma4,
    glm4,
    gpt_oss,
    layer_norm,
    lfm2,
    llama,
    llama4,
    mamba,
    mla,
    moe,
    muse_glimmer,
    olmo,
    phi3,
    qwen35,
    qwen_moe,
    selective,
    uneven,
)

ARCHITECTURES: dict[str, Architecture] = {
    row.name: row for row in sorted((r for f in _FAMILIES for r in f.ROWS), key=lambda r: r.name)
}
