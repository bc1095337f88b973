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

# Known, and not supported: what is missing.
REFUSED = {
    "bailingmoe3": "delta nets whose decay has a lower bound, beside latent attention with gates",
    "deepseek4": "MLX-LM has no class of it",
    "gemma3n": "streams that predict each other (AltUp) and low-rank residuals (LAuReL)",
    "glm5-next": "MLX-LM has no class of it",
    "hy_v3": "MLX-LM has no class of it",
    "hy_v4": "MLX-LM has no class of it",
    "kimi-k3": "delta nets beside latent attention over several residual streams",
    "minimax-m3": "attention to chosen blocks of the context, with indexers of its own",
    "phimoe": "llama.cpp's norms and choice of experts are not those of the published model, so "
    "that nothing shows whether a file is read right",
    "qwen4exp": "MLX-LM has no class of it",
    "rwkv6": "MLX-LM has no class of it",
    "rwkv7": "its recurrence, and its tokenizer",
    "t5": "an encoder, and its tokenizer",
}

ARCHITECTURES: dict[str, Architecture] = {
    row.name: row for row in sorted((r for f in _FAMILIES for r in f.ROWS), key=lambda r: r.name)
}
