"""Which layers do what: windows, recurrences and rotary embeddings in turns; numpy only."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np

from ..errors import GGUFError, UnsupportedError
from .keys import Keys
from .rope import Rope
from .table import Config

FULL, SLIDING = "full_attention", "sliding_attention"


def layer_types(slides: Iterable[bool]) -> list[str]:
    """mlx-lm's names for layers with a window and without."""
    return [SLIDING if slide else FULL for slide in slides]


def with_router(key: Keys, layers: int) -> list[bool]:
    """For each layer, whether it has experts: a router among its tensors."""
    return [f"blk.{i}.ffn_gate_inp.weight" in key.file.tensors for i in range(layers)]


def windows(key: Keys, layers: int, default: int | None = None) -> list[bool]:
    """For each layer, whether it sees a window of the context only.

    The file gives a flag for each layer, or the number of layers of which the last one sees
    everything.

    Args:
        default: the period of a file that gives neither; None if the file must have it.
    """
    name = "attention.sliding_window_pattern"
    if isinstance(key.file.metadata.get(f"{key.name}.{name}"), np.ndarray):
        return [bool(flag) for flag in key.each(name, layers, listed=True)]
    period = key.count(name, default)
    return [i % period < period - 1 for i in range(layers)]


def period(key: Keys, slides: Sequence[bool], name: str) -> int:
    """The p for which layer i is set exactly if ``i % p < p - 1``.

    Raises:
        UnsupportedError: there is none; ``name`` is the key that it names.
    """
    found = slides.index(False) + 1 if False in slides else len(slides) + 1
    if found > len(slides) or list(slides) != [i % found < found - 1 for i in range(len(slides))]:
        raise UnsupportedError(
            f"an irregular {key.name}.{name}: expected a number p such that of the {len(slides)} "
            f"layers each p-th is 0 and the others 1, found {[int(flag) for flag in slides[:12]]}"
        )
    return found


def with_windows(
    config: Config, slides: Sequence[bool], window: int, sliding: Rope | None, full: Rope | None
) -> Config:
    """The configuration of a model whose layers in turns see ``window`` tokens or all of them.

    Args:
        sliding, full: their rotary embeddings; None if such layers have none.
    """
    given = config.by_layer or ({},) * config.layers
    return replace(
        config,
        ropes=tuple(sliding if slide else full for slide in slides),
        by_layer=tuple(
            {**sizes, "window": window if slide else 0}
            for sizes, slide in zip(given, slides, strict=True)
        ),
    )


def without_rope(config: Config, layers: Iterable[int]) -> Config:
    """The configuration of a model that does not rotate positions in some layers."""
    bare = frozenset(layers)
    ropes = [None if i in bare else config.rope_of(i) for i in range(config.layers)]
    return replace(config, ropes=tuple(ropes))


def check_kv_heads(key: Keys, heads: int, kv_heads: int) -> None:
    """Attention heads share key and value heads evenly."""
    if kv_heads < 1 or heads % kv_heads:
        raise GGUFError(
            key.file.path, f"{heads} attention heads cannot share {kv_heads} key/value heads"
        )
