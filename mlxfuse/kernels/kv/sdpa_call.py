"""The arguments of `compressed_sdpa`: which tokens are held, and how they are weighed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import mlx.core as mx

from .scheme import FLOATS, KVScheme

WHOLE_TOKENS = 256
"""Tokens of capacity up to which plain keys and values are not split, so that one dispatch gives
the result. Not measured on a Mac."""

HELD: dict[int, tuple[str, ...]] = {
    2: ("keys", "values"),
    6: ("keys", "key_scales", "key_biases", "values", "value_scales", "value_biases"),
}
"""Names of the arrays of `Call.held`, by their number."""


@dataclass(frozen=True, slots=True)
class Scores:
    """How much each key weighs for each query: capped, then masked, then one softmax.

    scale    finite; multiplies ``q k^T``.
    mask     boolean (True: seen) or floating point (added to the scores), of a shape that
             broadcasts to ``[B, Hq, L, keys]``, but for its last axis, which has an entry for each
             key. Keys beyond its end are not seen.
    causal   query ``i`` does not see keys after its own, which is the ``i - L``-th from the end.
    window   a query sees no key that is ``window`` or more before its own.
    softcap  scores become ``softcap * tanh(score / softcap)``.
    sinks    ``[Hq]``, logits that take part in the softmax without a value.
    """

    scale: float
    mask: mx.array | None = None
    causal: bool = True
    window: int | None = None
    softcap: float | None = None
    sinks: mx.array | None = None

    @classmethod
    def of(
        cls,
        mask: mx.array | str | None,
        scale: float,
        softcap: float | None = None,
        sinks: mx.array | None = None,
    ) -> Scores:
        """With a mask as mlx-lm's models have it: an array, ``"causal"`` or None."""
        if isinstance(mask, mx.array):
            return cls(scale, mask, False, None, softcap, sinks)
        if sinks is None:
            return _plain_scores(scale, mask is not None, softcap)
        return cls(scale, None, mask is not None, None, softcap, sinks)

    def check(self, shape: tuple[int, ...]) -> None:
        """ValueError: they do not fit queries of such a shape."""
        batch, heads, queries, _ = shape
        if self.sinks is not None and self.sinks.shape != (heads,):
            raise ValueError(f"sinks: expected ({heads},), found {self.sinks.shape}")
        if self.window is not None and self.window < 1:
            raise ValueError(f"window: expected at least 1, found {self.window}")
        if self.softcap is not None and not self.softcap > 0:
            raise ValueError(f"softcap: expected more than 0, found {self.softcap}")
        if self.mask is not None:
            found = self.mask.shape
            lead = (1,) * (4 - len(found)) + found[:-1]
            fits = all(m in (1, n) for m, n in zip(lead, shape[:3], strict=False))
            if not 1 <= len(found) <= 4 or not fits:
                raise ValueError(
                    f"mask: expected a shape that broadcasts to ({batch}, {heads}, {queries}, "
                    f"keys), found {found}"
                )
            if self.mask.dtype not in (mx.bool_, *FLOATS):
                raise ValueError(f"mask: expected bool or floating point, found {self.mask.dtype}")


@lru_cache(maxsize=256)
def _plain_scores(scale: float, causal: bool, softcap: float | None) -> Scores:
    """One object for equal ones, which every layer asks for at every token."""
    return Scores(scale, None, causal, None, softcap)


@dataclass(frozen=True, slots=True)
class Call:
    """The arguments of one attention.

    held  keys and values in arrays of their own, in the place of ``rows``: two plain ones,
          ``[B, Hkv, capacity, dim]``, or codes, scales and biases of each; see `HELD`.
    """

    q: mx.array
    scheme: KVScheme
    rows: tuple[mx.array, ...]
    counts: mx.array
    tail: mx.array | None
    sink: mx.array | None
    fresh: tuple[mx.array, mx.array] | None
    scores: Scores
    held: tuple[mx.array, ...] | None = None

    @property
    def kv_heads(self) -> int:
        held = (*self.rows, *(self.held or ()), self.tail, self.sink, *(self.fresh or ()))
        found: int = next(a.shape[1] for a in held if a is not None)
        return found

    @property
    def whole(self) -> bool:
        """Whether one dispatch gives the result."""
        held = self.held is not None and self.scores.sinks is None
        return held and max(self.capacities) <= WHOLE_TOKENS

    @property
    def capacities(self) -> list[int]:
        """Tokens that there is room for in what is split: one number, or one of each sequence."""
        keys = self.rows if self.held is None else self.held[:1]
        return [array.shape[2] for array in keys] or [0]

    def _held(self) -> Iterator[tuple[str, mx.array, mx.Dtype, int]]:
        """Name, array, type and last axis of each of ``held``."""
        scheme, held = self.scheme, self.held
        if held is None:
            return
        kinds = []
        for side in (scheme.k, scheme.v):
            words = side.code_words(scheme.dtype)
            plain, codes = (scheme.dtype, side.dim), (mx.uint32, words)
            kinds += [codes, *[(scheme.dtype, side.groups)] * 2] if side.quantized else [plain]
        for name, array, kind in zip(HELD[len(held)], held, kinds, strict=True):
            if array.ndim != 4:
                raise ValueError(f"{name}: expected four axes, found {array.shape}")
            yield name, array, *kind

    def check(self) -> None:
        """ValueError: shapes or types do not fit together."""
        scheme, q = self.scheme, self.q
        if q.ndim != 4 or q.shape[-1] != scheme.k.dim:
            raise ValueError(f"q: expected [B, Hq, L, {scheme.k.dim}], found {q.shape}")
        if q.dtype not in FLOATS:
            raise ValueError(f"q: expected float16, bfloat16 or float32, found {q.dtype}")
        batch, heads, queries, _ = q.shape
        plain = scheme.k.dim + scheme.v.dim
        k, v = self.fresh or (None, None)
        held = (
            *self._held(),
            *(("rows", rows, mx.uint32, scheme.row_words) for rows in self.rows),
            ("tail", self.tail, scheme.dtype, plain),
            ("sink", self.sink, scheme.dtype, plain),
            ("k", k, scheme.dtype, scheme.k.dim),
            ("v", v, scheme.dtype, scheme.v.dim),
        )
        if not any(array is not None and array.size for _, array, _, _ in held):
            raise ValueError("attention needs rows, a tail, a sink or fresh keys and values")
        for name, array, dtype, width in held:
            if array is None:
                continue
            many = queries if name in "kv" else array.shape[2] if array.ndim == 4 else "rows"
            if self.held is not None and name in HELD[len(self.held)]:
                many = self.held[0].shape[2]
            of = 1 if name == "rows" and len(self.rows) > 1 else batch
            expected = (of, self.kv_heads, many, width)
            if array.dtype != dtype or array.shape != expected:
                raise ValueError(
                    f"{name}: expected {dtype} {expected}, found {array.dtype} {array.shape}"
                )
        if heads % self.kv_heads:
            raise ValueError(f"{heads} heads of queries for {self.kv_heads} of keys")
        if len(self.rows) > 1 and len(self.rows) != batch:
            raise ValueError(f"rows: expected one array or {batch}, found {len(self.rows)}")
        if odd := [rows.shape[2] for rows in self.rows if rows.shape[2] % 4]:
            raise ValueError(f"rows: expected a capacity that is a multiple of 4, found {odd[0]}")
        self.scores.check(q.shape)
