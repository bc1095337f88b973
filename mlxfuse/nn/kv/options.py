"""Which compressed caches a model gets, or why it gets none."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import mlx.nn as nn
from mlx_lm.models.cache import ArraysCache, KVCache, RotatingKVCache

from ...errors import UnsupportedError
from .cache import CompressedKVCache

BITS = (4, 8, 16)
LAYERS = ("all", "full")

_SINKS = {"sinks", "attention_sink_bias"}  # names of mlx-lm's classes
_KNOWN = (KVCache, RotatingKVCache, ArraysCache)


@dataclass(frozen=True, slots=True)
class KVOptions:
    """How keys and values are to be compressed; see `CompressedKVCache`.

    layers  ``all``, or ``full``: layers with a sliding window, whose caches are short, stay plain.
    """

    k_bits: int = 8
    v_bits: int = 4
    group_size: int = 64
    rotate: bool = True
    keep: int = 4
    layers: str = "all"

    @classmethod
    def parse(
        cls,
        kv_bits: int | str,
        group_size: int = 64,
        rotate: bool = True,
        layers: str = "all",
    ) -> KVOptions:
        """Read ``8`` (keys and values) or ``k8v4``; 16 bits leave a side as it is.

        Raises:
            ValueError: nothing of that form, or nothing that compresses.
        """
        found = re.fullmatch(r"(?:(\d+)|k(\d+)v(\d+))", str(kv_bits).lower())
        both, k, v = found.groups() if found else (None, None, None)
        k_bits, v_bits = int(both or k or 0), int(both or v or 0)
        if k_bits not in BITS or v_bits not in BITS or k_bits == v_bits == 16:
            raise ValueError(
                f"kv_bits is 4 or 8, or for example k8v4 or k16v8 (4, 8 or 16 bits); found "
                f"{kv_bits!r}"
            )
        if group_size not in (32, 64, 128):
            raise ValueError(f"kv_group_size is 32, 64 or 128; found {group_size}")
        if layers not in LAYERS:
            raise ValueError(f"kv_layers is {' or '.join(LAYERS)}; found {layers!r}")
        return cls(k_bits, v_bits, group_size, rotate, layers=layers)

    @classmethod
    def asked(
        cls, kv_bits: int | str | None, group_size: int = 64, layers: str = "all"
    ) -> KVOptions | None:
        """`parse`, or None for plain caches.

        Raises:
            ValueError: as of `parse`, or layers are chosen although none is to be compressed.
        """
        if kv_bits is not None:
            return cls.parse(kv_bits, group_size, layers=layers)
        if layers != "all":
            raise ValueError(f"kv_layers={layers!r} is about compressed caches: give kv_bits too")
        return None

    def cache(self) -> dict[str, Any]:
        """The arguments of `CompressedKVCache`."""
        return {name: value for name, value in asdict(self).items() if name != "layers"}

    @property
    def name(self) -> str:
        """The short name, for example ``k8v4``."""
        return f"k{self.k_bits}v{self.v_bits}"

    def __str__(self) -> str:
        rotated = ", rotated" if self.rotate else ""
        return f"key-value cache {self.name} in groups of {self.group_size}{rotated}"


def check_model(model: nn.Module, options: KVOptions, *, force: bool = False) -> None:
    """Raise unless the model works with compressed keys and values.

    Args:
        force: compress keys although the model is known to suffer from it.

    Raises:
        UnsupportedError: it cannot, and why.
    """
    modules = [m for _, m in model.named_modules()]
    if any(hasattr(m, "kv_lora_rank") for m in modules):
        raise UnsupportedError(
            "kv_bits: this model caches a latent vector in place of keys and values; leave out "
            "kv_bits"
        )
    if any(getattr(m, "is_kv_shared_layer", False) for m in modules):
        raise UnsupportedError(
            "kv_bits: layers of this model read the cache of another layer; leave out kv_bits"
        )
    if options.k_bits < 16 and not force and any(_SINKS & m.keys() for m in modules):
        raise UnsupportedError(
            "kv_bits: models with learned attention sinks (gpt-oss, MiMo) lose their answers with "
            "compressed keys: 8-bit keys change one token in four. Compress values only (k16v8), "
            "or force it"
        )
    kinds = [type(c) for c in plain_caches(model)]
    if unknown := sorted({k.__name__ for k in kinds if k not in _KNOWN}):
        raise UnsupportedError(
            f"kv_bits: this model keeps {', '.join(unknown)}, which has no compressed form; leave "
            "out kv_bits"
        )
    if options.layers == "full" and not any(k is KVCache for k in kinds):
        raise UnsupportedError("kv_layers: every layer of this model has a sliding window")
    if all(k is ArraysCache for k in kinds):
        raise UnsupportedError("kv_bits: no layer of this model keeps keys and values")


def compressed(caches: Sequence[Any], options: KVOptions, start: int = 0) -> list[Any]:
    """mlx-lm's caches, empty or filled, in compressed form.

    Args:
        start: tokens up to which a cache stays as it is; see `compress_caches`.

    Raises:
        UnsupportedError: a cache is compressed in another way already.
    """
    return [_one(cache, options, start) for cache in caches]


def _one(cache: Any, options: KVOptions, start: int) -> Any:
    if isinstance(cache, ArraysCache):
        return cache  # the state of a recurrent layer
    if options.layers == "full" and isinstance(cache, RotatingKVCache):
        return cache
    if isinstance(cache, CompressedKVCache):
        found = KVOptions(cache.k_bits, cache.v_bits, cache.group_size, cache.rotate)
        if found.name != options.name:
            raise UnsupportedError(
                f"the prompt cache is compressed as {found.name}, not as {options.name}"
            )
        return cache
    if cache.offset >= start:
        return CompressedKVCache.from_cache(cache, **options.cache())
    later = _LaterRotating if isinstance(cache, RotatingKVCache) else _Later
    made = later.from_state(cache.state)
    made.options = options
    return made


class _Later(KVCache):
    """Becomes compressed when mlx-lm's ``quantized_kv_start`` tells it to."""

    options: KVOptions

    def to_quantized(self, group_size: int = 64, bits: int = 4) -> CompressedKVCache:
        return CompressedKVCache.from_cache(self, **self.options.cache())


class _LaterRotating(RotatingKVCache):
    options: KVOptions

    to_quantized = _Later.to_quantized


def plain_caches(model: nn.Module) -> list[Any]:
    """The model's own caches, whether or not it makes compressed ones."""
    own = getattr(type(model), "make_cache", None)
    made: list[Any] = own(model) if own else [KVCache() for _ in model.layers]
    return made


@dataclass(frozen=True)
class _CompressedCaches:
    """What makes a model's compressed caches; in a copy of the model, its own ones."""

    model: nn.Module
    options: KVOptions
    start: int

    def __call__(self) -> list[Any]:
        return compressed(plain_caches(self.model), self.options, self.start)

    def __reduce__(self) -> tuple[Any, ...]:
        return partial, (plain_caches, self.model)


def compress_caches(
    model: nn.Module, options: KVOptions, start: int = 0, *, force: bool = False
) -> None:
    """Let mlx-lm's ``make_prompt_cache``, and all that uses it, make compressed caches.

    ``del model.make_cache`` undoes it.

    Args:
        start: tokens up to which they stay plain, where mlx-lm is told the same number as
            ``quantized_kv_start``, and any ``kv_bits``.

    Raises:
        UnsupportedError: the model cannot do with them; see `check_model`.
    """
    check_model(model, options, force=force)
    model.make_cache = _CompressedCaches(model, options, start)


def describe(caches: Sequence[Any]) -> str | None:
    """How the used ones of ``caches`` are compressed, the bytes of a compressed token, and how many
    of them are slow.
    """
    ours = [c for c in caches if isinstance(c, CompressedKVCache) and c.scheme is not None]
    if not ours:
        return None
    sides = {"keys": ours[0].scheme.k, "values": ours[0].scheme.v}
    asked = ours[0].group_size
    how = [
        f"{name} {side.bits} bits"
        + (f" in groups of {side.group}" if side.quantized else "")
        + (f", as {asked} does not divide {side.dim}" if side.dim % asked else "")
        + (", rotated" if side.rotate else "")
        for name, side in sides.items()
    ]
    slow = sum(c.decompresses for c in ours)
    return f"KV cache: {'; '.join(how)}: {sum(c.token_bytes for c in ours):,} bytes a token" + (
        f"; {slow} of {len(ours)} layers decompress theirs at every step: slower" if slow else ""
    )
