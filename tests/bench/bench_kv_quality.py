"""What compressing the key-value cache changes: KLD from the plain one, on Python's documentation.

    python -m tests.bench.bench_kv_quality [model.gguf] [--tokens N] [--schemes k8v8 ...] [--json]

One chunk of the text, processed as in generation, 8 tokens at a time; its second half is scored.
The command does the same with a text of yours: ``mlxfuse perplexity MODEL -f FILE -c 2000 --kld
--kv-bits k8v4``.
"""

from __future__ import annotations

import argparse
import json
from pydoc_data.topics import topics
from typing import Any

from mlxfuse import blas

TOPICS = ("class", "compound", "numeric-types", "exceptions", "dynamic-features")
SCHEMES = ("k8v8", "k8v4", "k4v8", "k4v4")


class Once:
    """A model and its caches: what it computes for the first pass over a text it says again."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._logits: list[Any] = []
        self._next = 0

    def caches(self) -> list[Any]:
        from mlxfuse.nn.kv.options import plain_caches

        self._next = 0
        return [] if self._logits else plain_caches(self._model)

    def __call__(self, inputs: Any, cache: list[Any]) -> Any:
        if cache:
            self._logits.append(self._model(inputs, cache=cache))
        self._next += 1
        return self._logits[self._next - 1]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", nargs="?", help="default: the demo model")
    parser.add_argument("--tokens", type=int, default=2000)
    parser.add_argument("--schemes", nargs="+", default=SCHEMES)
    parser.add_argument("--json", action="store_true", help="a line of JSON for each")
    arguments = parser.parse_args()
    blas.preload()  # before MLX is imported
    from mlxfuse import load
    from mlxfuse.generate.perplexity import Way, perplexity
    from mlxfuse.nn.kv.options import KVOptions, compressed, plain_caches

    model, tokenizer = load(arguments.model)
    ids = tokenizer.encode("\n".join(topics[name] for name in TOPICS))
    once = Once(model)
    plain = Way(once, once.caches)
    for bits in arguments.schemes:
        for rotate in (True, False):
            options = KVOptions.parse(bits, rotate=rotate)
            way = Way(model, lambda how=options: compressed(plain_caches(model), how))
            found = perplexity(ids, way, plain, context=arguments.tokens, chunks=1, step=8)
            if arguments.json:
                print(json.dumps({"bits": bits, "rotate": rotate, **found.as_dict()}), flush=True)
                continue
            assert found.base
            assert found.kld
            assert found.same_top
            print(
                f"{bits} {'rotated' if rotate else 'as it is':<9} perplexity "
                f"{found.perplexity.value:.4f} (plain {found.base.value:.4f})   KLD "
                f"{found.kld.value:.2e} ± {found.kld.error:.0e}   same top token "
                f"{100 * found.same_top.value:.1f} %",
                flush=True,
            )


if __name__ == "__main__":
    main()
