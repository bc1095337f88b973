"""GPU dispatches of one decoded token, counted in the graph, so that it needs no GPU.

    python -m tests.dispatches          of a layer, by what they are
    python -m tests.dispatches --all    of a token, for each class of mlx-lm that is used much

With quantised weights.
"""

from __future__ import annotations

import sys
from collections import Counter

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import llama, qwen3
from mlx_lm.models.cache import make_prompt_cache

from mlxfuse import patch_model
from mlxfuse.fusion.dispatches import dispatches
from tests.fusion import zoo
from tests.fusion.configs import USED

SIZES = {
    "hidden_size": 128,
    "num_hidden_layers": 1,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "rms_norm_eps": 1e-5,
    "vocab_size": 128,
    "rope_theta": 10000.0,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
}


def stock(module: object, bits: int = 4, group_size: int = 64) -> nn.Module:
    """A small model of mlx-lm in float16 with MLX's quantised weights."""
    name = module.__name__.rpartition(".")[2]
    model = module.Model(module.ModelArgs.from_dict({"model_type": name, **SIZES}))
    model.set_dtype(mx.float16)
    nn.quantize(model, bits=bits, group_size=group_size)
    model.eval()
    return model


def of_layer(model: nn.Module) -> Counter[str]:
    """Dispatches of the first layer, for one token and a cache that has some."""
    cache = make_prompt_cache(model)
    for tokens in ([[1, 2, 3]], [[4]]):  # a sliding cache takes its memory with the first one
        mx.eval(model(mx.array(tokens), cache=cache), [c.state for c in cache])
    hidden = mx.zeros((1, 1, model.args.hidden_size), model(mx.array([[1]])).dtype)
    mx.eval(hidden)
    return dispatches(lambda: model.layers[0](hidden, None, cache[0]))


def of_class(name: str) -> tuple[int, int, int]:
    """Layers, dispatches of a token of mlx-lm's own code, and of the patched model."""
    model = zoo.build(name, "affine4")
    before, after = patch_model(model, fuse="all").dispatches or (0, 0)
    return len(model.layers), before, after


def every_class() -> None:
    print("| class | layers | stock | patched | a layer, stock | patched |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name in sorted(USED):
        layers, before, after = of_class(name)
        row = name, layers, before, after, f"{before / layers:.1f}", f"{after / layers:.1f}"
        print("|", " | ".join(map(str, row)), "|")


def main() -> None:
    print("| model | dispatches a layer | of these |\n| --- | --- | --- |")
    for module in (llama, qwen3):
        model = stock(module)
        for patched in (False, True):
            if patched:
                patch_model(model, fuse="all")
            found = of_layer(model)
            parts = ", ".join(f"{n} {name}" for name, n in sorted(found.items()))
            name = module.__name__.rpartition(".")[2] + (", patched" if patched else "")
            print(f"| {name} | {found.total()} | {parts} |")


if __name__ == "__main__":
    every_class() if "--all" in sys.argv else main()
