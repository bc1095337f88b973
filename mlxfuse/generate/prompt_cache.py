"""Prompt-cache files, as ``mlx_lm.cache_prompt`` writes them, read without trusting them.

A cache file names classes, shapes and positions that end up in attention. Each is compared
with what the model itself would make, before the cache is used.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import ArraysCache, KVCache, RotatingKVCache, load_prompt_cache
from safetensors import SafetensorError, safe_open

from ..errors import ModelRefError, PromptCacheError
from ..nn.kv.cache import CompressedKVCache
from ..nn.kv.options import plain_caches
from ..terminal import one_line

CLASSES = (KVCache, RotatingKVCache, CompressedKVCache, ArraysCache)


def expect_model(path: Path, ref: str | None) -> None:
    """Refuse a file that says it was made with another model than ``ref``.

    Raises:
        ModelRefError: another model, or there is no such file.
        PromptCacheError: it is not a prompt-cache file.
    """
    made_with = _metadata(path).get("model")
    if made_with is not None and made_with != ref:
        raise ModelRefError(
            f"{path} was made with the model {one_line(made_with)!r}; name the same model"
        )


def _metadata(path: Path) -> dict[str, str]:
    """The file's own metadata.

    Raises:
        ModelRefError: there is no such file.
        PromptCacheError: it is no safetensors file, or holds classes that are not known.
    """
    if not path.is_file():
        raise ModelRefError(f"{path}: no such prompt-cache file")
    try:
        with safe_open(path, framework="numpy") as file:
            flat: dict[str, str] = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise PromptCacheError(f"{path}: not a prompt-cache file: {error}") from error
    # mlx-lm flattens [metadata, class names, scalars] to keys such as 0.model and 1.3.
    known = {c.__name__ for c in CLASSES}
    names = {value for key, value in flat.items() if key.startswith("1.")}
    if not names or not names <= known:
        unknown = ", ".join(sorted(names - known)) or "none"
        raise PromptCacheError(
            f"{path}: expected caches of the classes {', '.join(sorted(known))}, found {unknown}"
        )
    return {key[2:]: value for key, value in flat.items() if key.startswith("0.")}


def read(path: Path, *models: Any) -> list[Any]:
    """The caches of ``models``, one a layer, the models one after the other.

    Raises:
        PromptCacheError: malformed, or its layers, heads or positions are not the models'.
    """
    try:
        caches: list[Any] = load_prompt_cache(str(path))
    except (
        ValueError,
        RuntimeError,
        LookupError,
        TypeError,
        AttributeError,
        ArithmeticError,
    ) as error:
        raise PromptCacheError(f"{path}: not a prompt-cache file: {error}") from error
    fresh = [cache for model in models for cache in _fresh(model)]
    if len(caches) != len(fresh):
        raise PromptCacheError(
            f"{path}: expected {len(fresh)} layers, found {len(caches)}; "
            "it was made with another model"
        )
    for layer, (found, expected) in enumerate(zip(caches, fresh, strict=True)):
        if problem := _problem(found, expected):
            raise PromptCacheError(f"{path}: layer {layer}: {problem}")
    return caches


def _fresh(model: Any) -> list[Any]:
    """The model's own caches after one token: they have the shapes to expect."""
    caches = plain_caches(model)
    model(mx.zeros((1, 1), mx.int32), cache=caches)
    return caches


def _problem(found: Any, expected: Any) -> str | None:
    if isinstance(found, ArraysCache) or isinstance(expected, ArraysCache):
        return _state_problem(found, expected)
    if isinstance(found, CompressedKVCache):
        return _compressed_problem(found, expected)
    for name in ("keys", "values"):
        array, like = getattr(found, name), getattr(expected, name)
        if not isinstance(array, mx.array) or not mx.issubdtype(array.dtype, mx.floating):
            return f"its {name} are not an array of a floating type"
        # Axis 2 counts positions; the others are the model's own.
        if array.ndim != 4 or array.shape[:2] + array.shape[3:] != like.shape[:2] + like.shape[3:]:
            return f"expected {name} of shape {like.shape} but for axis 2, found {array.shape}"
    positions = found.keys.shape[2]
    if found.values.shape[2] != positions:
        return f"{positions} positions of keys, {found.values.shape[2]} of values"
    if isinstance(expected, RotatingKVCache) and (
        not isinstance(found, RotatingKVCache) or found.max_size != expected.max_size
    ):
        return f"expected a sliding window of {expected.max_size}"
    rotating = isinstance(found, RotatingKVCache)
    fields = ("offset", "keep", "max_size", "_idx") if rotating else ("offset",)
    if not all(type(getattr(found, name)) is int for name in fields):
        return f"{', '.join(fields)} must be integers"
    if rotating:
        fits = 0 <= found.keep < found.max_size and 0 <= found._idx <= positions
        fits = fits and found._idx <= found.offset
    else:
        fits = 0 <= found.offset <= positions
    return None if fits else f"its state does not fit its {positions} positions"


def _state_problem(found: Any, expected: Any) -> str | None:
    """Of a recurrent layer, whose arrays have one shape however many tokens there were."""
    if type(found) is not type(expected):
        return f"expected {type(expected).__name__}, found {type(found).__name__}"
    arrays, like = found.cache, expected.cache
    if found.left_padding is not None or found.lengths is not None:
        return "it is that of a batch"
    if not isinstance(arrays, list) or len(arrays) != len(like):
        return f"expected {len(like)} arrays"
    for array, other in zip(arrays, like, strict=True):
        if not isinstance(array, mx.array) or (array.shape, array.dtype) != (
            other.shape,
            other.dtype,
        ):
            return f"expected an array of {other.dtype} {other.shape}"
    return None


def _compressed_problem(found: CompressedKVCache, expected: Any) -> str | None:
    keep, window = found.keep, None
    if isinstance(expected, RotatingKVCache):
        keep, window = expected.keep, expected.max_size - expected.keep
    counts = (found.offset, found._first, found._sealed, found.keep)
    if not all(type(n) is int and 0 <= n < 2**31 for n in counts):
        return "its positions must be whole numbers"
    if (found.keep, found.window) != (keep, window) or isinstance(found.window, float):
        return f"expected a sliding window of {window} after {keep} tokens"
    if found.scheme is None:
        return "it has positions and no tokens" if found.offset else None
    dims, heads = (expected.keys.shape[3], expected.values.shape[3]), expected.keys.shape[:2]
    scheme, plain = found.scheme, sum(dims)
    if (scheme.k.dim, scheme.v.dim) != dims:
        return f"expected heads of {dims}, found {(scheme.k.dim, scheme.v.dim)}"
    capacity = {}
    for name, length, width, dtype in (
        ("sink", keep, plain, scheme.dtype),
        ("rows", None, scheme.row_words, mx.uint32),
        ("tail", found.CAPACITY, plain, scheme.dtype),
    ):
        array = getattr(found, name)
        if array is None:
            capacity[name] = 0
            continue
        if not isinstance(array, mx.array):
            return f"its {name} are no array"
        shape = array.shape
        capacity[name] = length = shape[2] if length is None and len(shape) == 4 else length or 0
        if (
            array.dtype != dtype
            or shape != (*heads, length, width)
            or (name == "rows" and length % 4)
        ):
            return f"expected {name} of {dtype} {(*heads, length, width)}, found {shape}"
    held = found.offset - found._first - found._sealed
    fits = min(found.offset, keep) <= capacity["sink"] and found._sealed <= capacity["rows"]
    fits = fits and held <= capacity["tail"] and (held >= 0 or not found._sealed)
    fits = fits and (
        found._first == keep or (window is not None and keep < found._first <= found.offset)
    )
    return None if fits else f"its state does not fit its {capacity['rows']} positions"
