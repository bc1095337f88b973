"""Run a GGUF file and print as it answers: python examples/quickstart.py [MODEL] [PROMPT ...]"""

import sys

from mlx_lm import stream_generate

from mlxfuse import load

model, tokenizer = load(sys.argv[1] if len(sys.argv) > 1 else None)  # None: the demo model
question = " ".join(sys.argv[2:]) or "What is the capital of France?"
prompt = tokenizer.apply_chat_template(
    [{"role": "user", "content": question}], add_generation_prompt=True
)
for piece in stream_generate(model, tokenizer, prompt, max_tokens=64):
    print(piece.text, end="", flush=True)
print()
