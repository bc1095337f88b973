"""Attention of mlx-lm's models with q, k and v in one dispatch and the residual in o's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.base import scaled_dot_product_attention

from ..kernels import Backend
from ..kernels.kv.sdpa_call import Scores
from .fused import Form, FusedModule, Run, plus, project, rounded, split
from .kv.quantized import attend, attends
from .norm import Given, floats
from .projection import Projection
from .rotation import Rotation, position
from .sdpa import capped_sdpa


@dataclass
class AttentionForm(Form):
    """The variant of attention that a module has, and what is fused of it.

    linears          names of q, k and v, or of the one that is all of them; of q and k where values
                     are the keys' product, of q where keys and values are another layer's; after
                     them that of the gate, if it has a linear of its own.
    output           name of o.
    rows             of each product.
    heads, kv_heads  how many there are of each.
    norms            names of q's and k's norm, or empty.
    norm             where they act: on each ``head``, on the whole ``width``, or on each head
                     when it is ``rotated``; or ``plain``, on each head without weights.
    rope             name of the rotary embedding, or empty.
    softcap          scores go through ``softcap * tanh(scores / softcap)``, unless it is 0.
    sinks            name of the attention sinks, or empty.
    gated            each head of q is followed by a gate, whose sigmoid multiplies its result.
    eps, q_scale     of plain norms, and what q is multiplied by behind its own.
    widened          types of queries that are cast to float32 for MLX's own attention.
    values_norm      name of the norm of values, or empty.
    shares           it is a `FusedSharedAttention`.
    scaled           it is a `FusedScaledAttention`.
    read             whether later layers may read its keys and values.
    qkv, o           the fused projections.
    rotation         norms and rotary embedding as one kernel.
    rounds           whether o takes int8 activations.
    """

    linears: tuple[str, ...]
    output: str
    rows: tuple[int, ...]
    heads: int
    kv_heads: int
    scale: float
    norms: tuple[str, ...] = ()
    norm: str = ""
    rope: str = ""
    softcap: float = 0.0
    sinks: str = ""
    gated: bool = False
    values_norm: str = ""
    shares: bool = False
    read: bool = False
    scaled: bool = False
    eps: float = 0.0
    q_scale: float = 1.0
    widened: tuple[mx.Dtype, ...] = ()
    qkv: Projection | None = None
    o: Projection | None = None
    rotation: Rotation | None = None
    rounds: bool = False
    pieces = ("qkv", "o", "rotation")


class FusedAttention(FusedModule):
    """Mixed with the class of an mlx-lm attention; see `AttentionForm`."""

    _fused: AttentionForm

    def __call__(
        self,
        x: mx.array,
        mask: mx.array | str | None = None,
        cache: Any = None,
        *,
        residual: mx.array | None = None,
    ) -> mx.array:
        """x [B, L, hidden_size] -> the same shape, with ``residual`` added."""
        run = Run.of(x)
        if not self.holds(run.on):
            return plus(self._fused.original.__call__(self, x, mask, cache), residual)
        return self._whole(run, x, mask, cache, residual)

    def _whole(
        self,
        run: Run,
        x: mx.array,
        mask: mx.array | str | None,
        cache: Any,
        residual: mx.array | None = None,
        scale: mx.array | None = None,
    ) -> mx.array:
        """The whole attention; ``scale`` multiplies the queries."""
        heads = self.part(
            self.entering(run), self.enter, self.children_read, x, self.place(run, cache)
        )
        output = self.attend(scaled(heads, scale), mask, cache)
        added = () if residual is None else (residual,)
        return self.part(run, self.leave, self.children_read, output, *added)

    def holds(self, on: Backend, *, counted: bool = True) -> bool:
        """`fusible`, with what is fused of it."""
        return self.fusible(on, self._fused.snapshot(), counted=counted)

    def children_read(self) -> list[tuple[nn.Module, str]]:
        """The norms of q and k and the linears that are not fused, for `part`."""
        form = self._fused
        linears = [*(form.linears if form.qkv is None else ()), *[form.output] * (form.o is None)]
        return [(self, name) for name in (*form.norms, *linears)]

    def entering(self, run: Run) -> Run:
        """How `enter` is run: modules that rotate may need the offset's value, but for MLX's."""
        form = self._fused
        if form.rotation or not form.rope or type(self[form.rope]) is nn.RoPE:
            return run
        return run._replace(kept=False)

    def enters(self, x: mx.array, mask: mx.array | str | None, cache: Any) -> bool:
        """Whether `enter` does what is to be done."""
        return True

    def places(self, run: Run, x: mx.array, cache: Any) -> tuple[int | mx.array, ...]:
        """What `enter` gets besides x."""
        return (self.place(run, cache),)

    def place(self, run: Run, cache: Any) -> int | mx.array:
        """The tokens before; as an array where a graph is kept, of which it is an input."""
        offset: int | mx.array = 0 if cache is None else cache.offset
        return position(offset) if self.entering(run).kept and isinstance(offset, int) else offset

    def enter(self, run: Run, x: Given, offset: int | mx.array) -> tuple[mx.array, ...]:
        """x [B, L, hidden_size] -> q, k, v and any gate, [B, heads, L, D], normed and rotated."""
        form = self._fused
        queries, keys, values, *gates = self._projected(x, run.on)
        if form.gated:
            heads = queries.reshape(*queries.shape[:2], form.heads, -1)
            queries, gate = mx.split(heads, 2, axis=-1)
            queries, gates = queries.flatten(2), [gate]
        rotated = None if form.rotation is None else form.rotation(queries, keys, offset, run.on)
        queries, keys = rotated or self._rotated(queries, keys, offset)
        values = values.reshape(*values.shape[:2], form.kv_heads, -1).transpose(0, 2, 1, 3)
        gates = [g.reshape(*g.shape[:2], form.heads, -1).transpose(0, 2, 1, 3) for g in gates]
        return queries, keys, values, *gates

    def leave(self, run: Run, output: mx.array, residual: mx.array | None = None) -> mx.array:
        """What `attend` gives -> [B, L, hidden_size], with ``residual`` added."""
        form = self._fused
        output = output.transpose(0, 2, 1, 3).flatten(2)
        x = rounded(form.o, output) if run.rounds and form.rounds else output
        return project(self, form.output, form.o, x, residual, run.on)

    def _projected(self, given: Given, on: Backend) -> Sequence[mx.array]:
        form = self._fused
        parts = None if form.qkv is None else split(form.qkv, given, on)
        if parts is not None:
            return parts
        x = floats(given)
        if len(form.linears) < len(form.rows):
            a, b, _ = form.rows
            return list(mx.split(self[form.linears[0]](x), (a, a + b), axis=-1))
        return [self[name](x) for name in form.linears]

    def _rotated(
        self, queries: mx.array, keys: mx.array, offset: int | mx.array
    ) -> tuple[mx.array, mx.array]:
        """[B, L, heads * D] each -> [B, heads, L, D], normed and rotated by the own modules."""
        form = self._fused
        if form.norm == "width":
            queries, keys = self[form.norms[0]](queries), self[form.norms[1]](keys)
        queries = queries.reshape(*queries.shape[:2], form.heads, -1)
        keys = keys.reshape(*keys.shape[:2], form.kv_heads, -1)
        if form.norm == "head":
            queries, keys = self[form.norms[0]](queries), self[form.norms[1]](keys)
        elif form.norm == "plain":
            queries = mx.fast.rms_norm(queries, None, form.eps) * form.q_scale
            keys = mx.fast.rms_norm(keys, None, form.eps)
        queries, keys = queries.transpose(0, 2, 1, 3), keys.transpose(0, 2, 1, 3)
        if form.rope:
            rope = self[form.rope]
            queries, keys = rope(queries, offset=offset), rope(keys, offset=offset)
        if form.norm == "rotated":
            queries, keys = self[form.norms[0]](queries), self[form.norms[1]](keys)
        return queries, keys

    def attend(
        self, heads: Sequence[mx.array], mask: mx.array | str | None, cache: Any
    ) -> mx.array:
        """What `enter` gives -> [B, heads, L, D]; this part changes with every token."""
        queries, keys, values, *gate = heads
        output = self._attend(queries, keys, values, mask, cache)
        return gated(output, gate[0]) if gate else output

    def _attend(
        self,
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        mask: mx.array | str | None,
        cache: Any,
    ) -> mx.array:
        form = self._fused
        sinks = self[form.sinks] if form.sinks else None
        if attends(cache):
            scores = Scores.of(mask, form.scale, form.softcap or None, sinks)
            return attend(queries, keys, values, cache, scores)
        if cache is not None:
            keys, values = cache.update_and_fetch(keys, values)
        if form.softcap:
            how: Any = {"scale": form.scale, "mask": mask, "softcap": form.softcap}
            return capped_sdpa(queries, keys, values, cache, **how)
        dtype = queries.dtype
        if dtype in form.widened:
            queries = queries.astype(mx.float32)
        return scaled_dot_product_attention(
            queries, keys, values, cache=cache, scale=form.scale, mask=mask, sinks=sinks
        ).astype(dtype)


@partial(mx.compile, shapeless=True)
def gated(output: mx.array, gate: mx.array) -> mx.array:
    """What attention gives, times the sigmoid of its gate, in one dispatch."""
    return output * mx.sigmoid(gate)


def scaled(heads: Sequence[mx.array], scale: mx.array | None) -> Sequence[mx.array]:
    """What `FusedAttention.enter` gives, with its queries multiplied by ``scale``."""
    return heads if scale is None else (heads[0] * scale, *heads[1:])


class FusedScaledAttention(FusedAttention):
    """Attention that is given what multiplies the queries of each position (Ministral 3)."""

    def __call__(  # type: ignore[override]
        self,
        x: mx.array,
        attn_scale: mx.array | None = None,
        mask: mx.array | str | None = None,
        cache: Any = None,
    ) -> mx.array:
        """x [B, L, hidden_size], attn_scale broadcasts to [B, heads, L, D] -> the shape of x."""
        run = Run.of(x)
        if attn_scale is None or not self.holds(run.on):
            own: mx.array = self._fused.original.__call__(self, x, attn_scale, mask, cache)
            return own
        return self._whole(run, x, mask, cache, scale=attn_scale)


class FusedSharedAttention(FusedAttention):
    """Attention that gives its keys and values to later layers, or has those of an earlier one."""

    def __call__(  # type: ignore[override]
        self,
        x: mx.array,
        mask: mx.array | str | None = None,
        cache: Any = None,
        shared_kv: tuple[Any, Any] | None = None,
        offset: Any = None,
    ) -> tuple[mx.array, tuple[Any, Any] | None, Any]:
        """x [B, L, hidden_size] -> the same shape; keys and values, or None if nothing reads them;
        the tokens before.
        """
        form = self._fused
        own = shared_kv is None
        run = Run.of(x)
        if not self.holds(run.on) or own != (len(form.rows) > 1) or not (own or cache is None):
            found: Any = form.original.__call__(self, x, mask, cache, shared_kv, offset)
            return found
        if own:
            offset = self.place(run, cache)
            # A cache advances an array in place.
            offset = mx.array(offset) if isinstance(offset, mx.array) else offset
        entering = self.entering(run)
        place = position(offset) if entering.kept and isinstance(offset, int) else offset
        queries, *both = self.part(entering, self.enter, self.children_read, x, place)
        keys, values = both if shared_kv is None else shared_kv
        kept = None
        if own and attends(cache) and not form.read:
            output = self._attend(queries, keys, values, mask, cache)
        else:
            if cache is not None:
                keys, values = cache.update_and_fetch(keys, values)
            kept = keys, values
            output = scaled_dot_product_attention(
                queries, keys, values, cache=cache, scale=form.scale, mask=mask
            )
        return self.part(run, self.leave, self.children_read, output), kept, offset

    def enter(self, run: Run, x: Given, offset: int | mx.array) -> tuple[mx.array, ...]:
        """x [B, L, hidden_size] -> q, or q, k and v, [B, heads, L, D], normed and rotated."""
        form = self._fused
        parts, rotated = self._projected(x, run.on), None
        # Of values that are the keys' product, the one before their norm.
        values = parts[-1] if parts[1:] else None
        if form.rotation is not None:
            keys = parts[1] if parts[1:] else None
            both = (values,) if form.rotation.values and values is not None else ()
            rotated = form.rotation(parts[0], keys, offset, run.on, *both)
            if rotated is not None and both:
                return tuple(rotated)
        if rotated is None:
            rotated = [
                self[form.rope](self._heads(x, name), offset=offset)
                for x, name in zip(parts, form.norms, strict=False)
            ]
        return *rotated, *([] if values is None else [self._heads(values, form.values_norm)])

    def _heads(self, x: mx.array, norm: str) -> mx.array:
        """[B, L, heads * D] -> [B, heads, L, D], normed."""
        size = self._fused.rows[0] // self._fused.heads
        y: mx.array = self[norm](x.reshape(*x.shape[:2], -1, size)).transpose(0, 2, 1, 3)
        return y
