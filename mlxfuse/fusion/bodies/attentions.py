"""The `__call__` bodies of attention: see `bodies`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .mlps import MX, Body

_SDPA = {"scaled_dot_product_attention": "mlx_lm.models.base.scaled_dot_product_attention"}

_HEADS = """
    queries = queries.reshape(B, L, self.HEADS, -1).transpose(0, 2, 1, 3)
    keys = keys.reshape(B, L, self.KV_HEADS, -1).transpose(0, 2, 1, 3)
"""
_VALUES = """
    values = values.reshape(B, L, self.KV_HEADS, -1).transpose(0, 2, 1, 3)
"""
_ROPE = """
    if cache is not None:
        queries = self.ROPE(queries, offset=cache.offset)
        keys = self.ROPE(keys, offset=cache.offset)
        keys, values = cache.update_and_fetch(keys, values)
    else:
        queries = self.ROPE(queries)
        keys = self.ROPE(keys)
"""
_ATTEND = """
    output = scaled_dot_product_attention(
        queries, keys, values, cache=cache, scale=self.SCALE, mask=mask
    )
    output = output.transpose(0, 2, 1, 3).reshape(B, L, -1)
    return self.O(output)
"""
_CALL = """
def __call__(self, x, mask=None, cache=None):
    B, L, D = x.shape
"""
_QKV = """
    queries, keys, values = self.Q(x), self.K(x), self.V(x)
"""
_NORMED_HEADS = """
    queries = self.Q_NORM(queries.reshape(B, L, self.HEADS, -1)).transpose(0, 2, 1, 3)
    keys = self.K_NORM(keys.reshape(B, L, self.KV_HEADS, -1)).transpose(0, 2, 1, 3)
"""
_NORM = """
    queries = self.Q_NORM(queries)
    keys = self.K_NORM(keys)
"""
_PHI3_SPLIT = """
    qkv = self.QKV(x)
    query_pos = self.HEADS * self.HEAD_DIM
    queries, keys, values = mx.split(
        qkv, [query_pos, query_pos + self.KV_HEADS * self.HEAD_DIM], axis=-1
    )
"""
_SOFTCAP_ATTEND = """
    queries = queries * self.SCALE
    if self.REPEATS > 1:
        queries = queries.reshape(B, self.KV_HEADS, self.REPEATS, L, self.HEAD_DIM)
        keys = mx.expand_dims(keys, 2)
        values = mx.expand_dims(values, 2)
    scores = queries @ keys.swapaxes(-1, -2)
    scores = mx.tanh(scores / self.SOFTCAP)
    scores *= self.SOFTCAP
    if mask is not None:
        if mask.dtype == mx.bool_:
            scores = mx.where(mask, scores, mx.array(mx.finfo(scores.dtype).min, scores.dtype))
        else:
            scores = scores + mask
    scores = mx.softmax(scores, precise=True, axis=-1)
    output = scores @ values
    if self.REPEATS > 1:
        output = output.reshape(B, self.HEADS, L, self.HEAD_DIM)
    output = output.transpose(0, 2, 1, 3).reshape(B, L, -1)
    return self.O(output)
"""
_SDPA_WITH_SOFTCAP = """
    output = sdpa(
        queries, keys, values, scale=self.SCALE, mask=mask, softcap=self.SOFTCAP
    )
    output = output.transpose(0, 2, 1, 3).reshape(B, L, -1)
    return self.O(output)
"""
_ROPE_OR_NOT = """
    if cache is not None:
        if self.USE_ROPE:
            queries = self.ROPE(queries, offset=cache.offset)
            keys = self.ROPE(keys, offset=cache.offset)
        keys, values = cache.update_and_fetch(keys, values)
    elif self.USE_ROPE:
        queries = self.ROPE(queries)
        keys = self.ROPE(keys)
"""
# olmo3
_NORMED_AT_ONCE = """
    queries = self.Q_NORM(self.Q(x))
    keys = self.K_NORM(self.K(x))
    values = self.V(x)
"""
# cohere2
_ROPE_IN_WINDOWS = """
    if self.USE_ROPE:
        if cache is None:
            queries = self.ROPE(queries)
            keys = self.ROPE(keys)
        else:
            queries = self.ROPE(queries, offset=cache.offset)
            keys = self.ROPE(keys, offset=cache.offset)
    if cache is not None:
        keys, values = cache.update_and_fetch(keys, values)
"""
_ATTEND_IN_FLOAT32 = """
    sdpa_type = mx.float32 if queries.dtype == mx.float16 else queries.dtype
    output = scaled_dot_product_attention(
        queries.astype(sdpa_type), keys, values, cache=cache, scale=self.SCALE, mask=mask
    ).astype(queries.dtype)
    output = output.transpose(0, 2, 1, 3).reshape(B, L, -1)
    return self.O(output)
"""
_PHI = (
    """
def __call__(self, x, mask=None, cache=None):
    queries, keys, values = self.Q(x), self.K(x), self.V(x)
    B, L, D = queries.shape
    n_heads, n_kv_heads = self.HEADS, self.KV_HEADS
    queries = queries.reshape(B, L, n_heads, -1).moveaxis(1, 2)
    keys = keys.reshape(B, L, n_kv_heads, -1).moveaxis(1, 2)
    values = values.reshape(B, L, n_kv_heads, -1).moveaxis(1, 2)
"""
    + _ROPE
    + """
    scale = math.sqrt(1 / queries.shape[-1])
    output = scaled_dot_product_attention(
        queries.astype(mx.float32), keys, values, cache=cache, scale=scale, mask=mask
    ).astype(values.dtype)
    output = output.moveaxis(2, 1).reshape(B, L, -1)
    return self.O(output)
"""
)
_MUSE_GLIMMER = """
def __call__(self, x, mask=None, cache=None):
    B, L, _ = x.shape
    q = self.Q(x).reshape(B, L, self.HEADS, self.HEAD_DIM)
    k = self.K(x).reshape(B, L, self.KV_HEADS, self.HEAD_DIM)
    v = self.V(x).reshape(B, L, self.KV_HEADS, self.HEAD_DIM)
    q = mx.fast.rms_norm(q, None, self.EPS) * self.Q_SCALE
    k = mx.fast.rms_norm(k, None, self.EPS)
    q = q.transpose(0, 2, 1, 3)
    k = k.transpose(0, 2, 1, 3)
    v = v.transpose(0, 2, 1, 3)
    if self.USE_ROPE:
        offset = cache.offset if cache is not None else 0
        q = self.ROPE(q, offset=offset)
        k = self.ROPE(k, offset=offset)
    if cache is not None:
        k, v = cache.update_and_fetch(k, v)
    out = scaled_dot_product_attention(q, k, v, cache=cache, scale=self.SCALE, mask=mask)
    out = out.transpose(0, 2, 1, 3).reshape(B, L, -1)
    out = out * mx.sigmoid(self.GATE(x))
    return self.O(out)
"""
_ROPE_THEN_NORM = """
    queries = queries.reshape(B, L, self.HEADS, self.HEAD_DIM).transpose(0, 2, 1, 3)
    keys = keys.reshape(B, L, self.KV_HEADS, self.HEAD_DIM).transpose(0, 2, 1, 3)
    values = values.reshape(B, L, self.KV_HEADS, self.HEAD_DIM).transpose(0, 2, 1, 3)
    if cache is not None:
        queries = self.ROPE(queries, offset=cache.offset)
        keys = self.ROPE(keys, offset=cache.offset)
    else:
        queries = self.ROPE(queries)
        keys = self.ROPE(keys)
    if self.USE_NORM:
        queries = self.Q_NORM(queries)
        keys = self.K_NORM(keys)
    if cache is not None:
        keys, values = cache.update_and_fetch(keys, values)
"""
# Ministral 3: queries of each position are multiplied by a number, which the model hands down.
_SCALED_CALL = _CALL.replace("x, mask", "x, attn_scale=None, mask")
_SCALED_ROPE = """
    offset = 0
    if cache is not None:
        offset = cache.offset
        queries = self.ROPE(queries, offset=offset)
        keys = self.ROPE(keys, offset=offset)
        keys, values = cache.update_and_fetch(keys, values)
    else:
        queries = self.ROPE(queries)
        keys = self.ROPE(keys)
    if attn_scale is None:
        attn_scale = _get_llama_4_attn_scale(L, offset, self.BETA, self.TRAINED).astype(x.dtype)
    queries = queries * attn_scale
"""
_SINKS = """
def __call__(self, x, mask, cache=None):
    B, L, _ = x.shape
    D = self.HEAD_DIM
    q = self.Q(x).reshape(B, L, -1, D).swapaxes(1, 2)
    k = self.K(x).reshape(B, L, -1, D).swapaxes(1, 2)
    v = self.V(x).reshape(B, L, -1, D).swapaxes(1, 2)
    if cache is not None:
        q = self.ROPE(q, offset=cache.offset)
        k = self.ROPE(k, offset=cache.offset)
        k, v = cache.update_and_fetch(k, v)
    else:
        q = self.ROPE(q)
        k = self.ROPE(k)
    v_hat = scaled_dot_product_attention(
        q, k, v, cache, self.SCALE, mask=mask, sinks=self.SINKS
    )
    return self.O(v_hat.swapaxes(1, 2).reshape(B, L, -1))
"""
_SHARED = """
def __call__(self, x, mask=None, cache=None, shared_kv=None, offset=None):
    B, L, _ = x.shape
    queries = self.Q(x).reshape(B, L, self.HEADS, self.HEAD_DIM)
    queries = self.Q_NORM(queries)
    if shared_kv is not None:
        keys, values = shared_kv
    elif not self.HAS_KV:
        raise ValueError(f"Layer {self.LAYER} is a KV-shared layer but received no shared_kv")
    else:
        keys = self.K(x).reshape(B, L, self.KV_HEADS, self.HEAD_DIM)
        values = keys
        if not self.K_IS_V:
            values = self.V(x).reshape(B, L, self.KV_HEADS, self.HEAD_DIM)
        offset = mx.array(cache.offset) if cache is not None else 0
        keys = self.K_NORM(keys)
        keys = keys.transpose(0, 2, 1, 3)
        keys = self.ROPE(keys, offset=offset)
        values = self.V_NORM(values)
        values = values.transpose(0, 2, 1, 3)
    queries = queries.transpose(0, 2, 1, 3)
    queries = self.ROPE(queries, offset=offset)
    if cache is not None:
        keys, values = cache.update_and_fetch(keys, values)
    output = scaled_dot_product_attention(
        queries, keys, values, cache=cache, scale=self.SCALE, mask=mask
    )
    output = output.transpose(0, 2, 1, 3).reshape(B, L, -1)
    return self.O(output), (keys, values), offset
"""
_COHERE_HEADS = """
    queries = queries.reshape(B, L, self.HEADS, -1)
    keys = keys.reshape(B, L, self.KV_HEADS, -1)
    if self.USE_NORM:
        queries = self.Q_NORM(queries)
        keys = self.K_NORM(keys)
    queries = queries.transpose(0, 2, 1, 3)
    keys = keys.transpose(0, 2, 1, 3)
"""
# Each head of q is followed by a gate.
_GATED_HEADS = """
    q_proj_output = self.Q(x)
    queries, gate = mx.split(q_proj_output.reshape(B, L, self.HEADS, -1), 2, axis=-1)
    gate = gate.reshape(B, L, -1)
    keys, values = self.K(x), self.V(x)
    queries = self.Q_NORM(queries).transpose(0, 2, 1, 3)
    keys = self.K_NORM(keys.reshape(B, L, self.KV_HEADS, -1)).transpose(0, 2, 1, 3)
"""
_GATED_ATTEND = _ATTEND.replace("self.O(output)", "self.O(output * mx.sigmoid(gate))")


def _attention(*parts: str, names: Mapping[str, str] = _SDPA, **form: Any) -> Body:
    return Body("attention", "".join(parts), names, form)


ATTENTIONS: tuple[Body, ...] = (
    # llama, qwen2, granite, mixtral, nemotron and most others
    _attention(_CALL, _QKV, _HEADS, _VALUES, _ROPE, _ATTEND),
    # qwen3, qwen3_moe, olmoe's successors
    _attention(_CALL, _QKV, _NORMED_HEADS, _VALUES, _ROPE, _ATTEND, norm="head"),
    # gemma3_text
    _attention(_CALL, _QKV, _HEADS, _VALUES, _NORM, _ROPE, _ATTEND, norm="head"),
    # cohere, glm4_moe
    _attention(_CALL, _QKV, _COHERE_HEADS, _VALUES, _ROPE, _ATTEND, norm="head"),
    # exaone4, exaone_moe
    _attention(_CALL, _QKV, _NORMED_HEADS, _VALUES, _ROPE_OR_NOT, _ATTEND, norm="head"),
    # olmo2, olmoe
    _attention(_CALL, _QKV, _NORM, _HEADS, _VALUES, _ROPE, _ATTEND, norm="width"),
    # olmo3
    _attention(_CALL, _NORMED_AT_ONCE, _HEADS, _VALUES, _ROPE, _ATTEND, norm="width"),
    # cohere2
    _attention(
        *(_CALL, _QKV, _HEADS, _VALUES, _ROPE_IN_WINDOWS, _ATTEND_IN_FLOAT32),
        names=MX | _SDPA,
        widened=("float16",),
    ),
    # phi
    _attention(_PHI, names=MX | _SDPA | {"math": "math"}, widened=("float16", "bfloat16")),
    # muse_glimmer
    _attention(_MUSE_GLIMMER, names=MX | _SDPA, norm="plain"),
    # hunyuan_v1_dense
    _attention(_CALL, _QKV, _ROPE_THEN_NORM, _ATTEND, norm="rotated"),
    # phi3
    _attention(_CALL, _PHI3_SPLIT, _HEADS, _VALUES, _ROPE, _ATTEND, names={**MX, **_SDPA}),
    # gemma2
    _attention(_CALL, _QKV, _HEADS, _VALUES, _ROPE, _SOFTCAP_ATTEND, names=MX),
    # our gemma2, for batches
    _attention(
        *(_CALL, _QKV, _HEADS, _VALUES, _ROPE, _SDPA_WITH_SOFTCAP),
        names={"sdpa": "mlxfuse.nn.sdpa.sdpa"},
    ),
    # ministral3
    _attention(
        *(_SCALED_CALL, _QKV, _HEADS, _VALUES, _SCALED_ROPE, _ATTEND),
        names=_SDPA
        | {"_get_llama_4_attn_scale": "mlx_lm.models.ministral3._get_llama_4_attn_scale"},
        scaled=True,
    ),
    # gpt_oss
    _attention(_SINKS),
    # gemma4_text
    _attention(_SHARED, names={**MX, **_SDPA}, norm="head"),
    # qwen3_next, qwen3_5
    _attention(
        *(_CALL, _GATED_HEADS, _VALUES, _ROPE, _GATED_ATTEND),
        names=MX | _SDPA,
        norm="head",
        gated=True,
    ),
)
