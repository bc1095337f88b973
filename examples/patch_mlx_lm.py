"""Speed up a model of mlx-lm: python examples/patch_mlx_lm.py MODEL [PROMPT ...]"""

import sys

from mlx_lm import generate, load

from mlxfuse import patch_model

model, tokenizer = load(sys.argv[1])
print(patch_model(model), file=sys.stderr)  # what was fused, and why the rest was not
print(generate(model, tokenizer, " ".join(sys.argv[2:]) or "Why is the sky blue?", max_tokens=64))
