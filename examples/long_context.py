"""Ask about a long text with a compressed cache: python examples/long_context.py TEXT [MODEL]"""

import sys
from pathlib import Path

from mlx_lm import generate
from mlx_lm.models.cache import make_prompt_cache

from mlxfuse import load

if len(sys.argv) < 2:
    raise SystemExit(__doc__)
model, tokenizer = load(sys.argv[2] if len(sys.argv) > 2 else None, kv_bits="k8v4")
question = "Sum up this text in one sentence.\n\n" + Path(sys.argv[1]).read_text("utf-8")
prompt = tokenizer.apply_chat_template(
    [{"role": "user", "content": question}], add_generation_prompt=True
)
cache = make_prompt_cache(model)  # compressed; any function of mlx-lm makes it so
print(generate(model, tokenizer, prompt, max_tokens=64, prompt_cache=cache))
print(f"{sum(c.nbytes for c in cache) / 1e6:.1f} MB hold {cache[0].offset} tokens", file=sys.stderr)
