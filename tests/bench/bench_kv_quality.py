"""What compressing the key-value cache changes: KLD from the plain one, on Python's documentation.

    python -m tests.bench.bench_kv_quality [model.gguf] [--tokens 2000]

One chunk of the text, processed as in generation, 8 tokens at a time; its second half is scored.
The command does the same with a text of yours: ``mlxfuse perplexity MODEL -f FILE -c 2000 --kld
--kv-bits k8v4``.
"""

from __future__ import annotations

import argparse
from pydoc_data.topics import topics
from typing import Any

from mlxfuse.nn.kv import KVOptions, compressed, plain_caches
from mlxfuse.perplexity import Report, Way, perplexity

TOPICS = ("class", "compound", "numeric-types", "exceptions", "dynamic-features")
SCHEMES = ("k8v8", "k8v4", "k4v8", "k4v4")


def measure(model: Any, tokenizer: Any, bits: str, rotate: bool, tokens: int = 2000) -> Report:
    options = KVOptions.parse(bits, rotate=rotate)
    ids = tokenizer.encode("\n".join(topics[name] for name in TOPICS))
    plain = Way(model, lambda: plain_caches(model))
    way = Way(model, lambda: compressed(plain_caches(model), options))
    return perplexity(ids, way, plain, context=tokens, chunks=1, step=8)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", nargs="?", help="default: the demo model")
    parser.add_argument("--tokens", type=int, default=2000)
    arguments = parser.parse_args()
    from mlxfuse import load

    model, tokenizer = load(arguments.model)
    for bits in SCHEMES:
        for rotate in (True, False):
            found = measure(model, tokenizer, bits, rotate, arguments.tokens)
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
