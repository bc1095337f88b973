"""The `__call__` bodies that a fused class may stand for, as text to be reviewed.

Names of attributes in capitals stand for any name, the same one everywhere; local variables may
have other names too. ``names`` is what the global names of the text must be.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

_MODELS = "mlx_lm.models."
MX = {"mx": "mlx.core"}
NN = {"nn": "mlx.nn"}
SDPA = {"scaled_dot_product_attention": _MODELS + "base.scaled_dot_product_attention"}
SWIGLU = {"swiglu": _MODELS + "activations.swiglu"}
GEGLU = {"geglu": _MODELS + "gemma4_text.geglu"}
CLIPPED = {"swiglu_oai": _MODELS + "activations.swiglu_oai"}


@dataclass(frozen=True)
class Body:
    """One known body.

    kind    what stands for it: ``attention``, ``mlp``, ``block``, ``experts``, ``norm``, ``rope``,
            ``delta_net``.
    source  the method.
    names   global name -> the module, or the object of a module, that it must be.
    form    what the fused class has to know about it.
    """

    kind: str
    source: str
    names: Mapping[str, str] = field(default_factory=dict)
    form: Mapping[str, Any] = field(default_factory=dict)


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


def _attention(*parts: str, names: Mapping[str, str] = SDPA, **form: Any) -> Body:
    return Body("attention", "".join(parts), names, form)


def _gated(source: str, activation: str, names: Mapping[str, str]) -> Body:
    call = f"def __call__(self, x):\n    return self.DOWN({source})\n"
    return Body("mlp", call, names, {"activation": activation})


def _call(value: str) -> str:
    return f"def __call__(self, x):\n    return {value}\n"


def _rope(options: str) -> Body:
    how = f"x, self.DIMS, traditional=self.TRADITIONAL, offset=offset, {options}"
    source = f"def __call__(self, x, offset=0):\n    return mx.fast.rope({how})\n"
    return Body("rope", source, MX)


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

_NORM_FIRST = """
def __call__(self, x, mask=None, cache=None):
    r = self.ATTENTION(self.NORM1(x), mask, cache)
    h = x + r
    r = self.MLP(self.NORM2(h))
    return h + r
"""
_ADDED_AT_ONCE = """
def __call__(self, x, mask=None, cache=None):
    h = x + self.ATTENTION(self.NORM1(x), mask, cache)
    return h + self.MLP(self.NORM2(h))
"""
_REASSIGNED = """
def __call__(self, x, mask, cache=None):
    residual = x
    x = self.NORM1(x)
    x = self.ATTENTION(x, mask, cache)
    x = residual + x
    residual = x
    x = self.NORM2(x)
    x = self.MLP(x)
    return residual + x
"""
_CONV_OR_ATTENTION = """
def __call__(self, x, mask=None, cache=None):
    if self.IS_ATTENTION:
        r = self.ATTENTION(self.NORM1(x), mask=mask, cache=cache)
    else:
        r = self.OTHER(self.NORM1(x), mask=mask, cache=cache)
    h = x + r
    return h + self.MLP(self.NORM2(h))
"""
_LINEAR_OR_ATTENTION = """
def __call__(self, x, mask=None, cache=None):
    if self.IS_OTHER:
        r = self.OTHER(self.NORM1(x), mask, cache)
    else:
        r = self.ATTENTION(self.NORM1(x), mask, cache)
    h = x + r
    return h + self.MLP(self.NORM2(h))
"""
_EXPERTS = """
def __call__(self, x, indices):
    x = mx.expand_dims(x, (-2, -3))
    indices = mx.stop_gradient(indices)
    do_sort = indices.size >= 64
    idx = indices
    inv_order = None
    if do_sort:
        x, idx, inv_order = _gather_sort(x, indices)
    x_up = self.UP(x, idx, sorted_indices=do_sort)
    x_gate = self.GATE(x, idx, sorted_indices=do_sort)
    x = self.DOWN(self.ACTIVATION(x_up, x_gate), idx, sorted_indices=do_sort)
    if do_sort:
        x = _scatter_unsort(x, inv_order, indices.shape)
    return x.squeeze(-2)
"""

# Lines of a method, as patterns of its normalised text: experts are called and their results added
# up by scores, which the experts are to do themselves.
_EXPERTS_CALL = r"^(?P<indent> +)(?P<y>\w+) = self\.(?P<experts>\w+)\((?P<x>\w+), (?P<ids>\w+)\)\n"
WEIGHTED_SUMS = (
    # mixtral, qwen3_moe and most others
    _EXPERTS_CALL
    + r"(?P=indent)(?P<sum>\w+) = \((?P=y) \* (?P<scores>\w+)\[\.\.\., None\]\)\.sum\(axis=-2\)"
    r"(?P<cast>\.astype\((?P=y)\.dtype\))?\n",
    # gpt_oss
    _EXPERTS_CALL + r"(?P=indent)(?P=y) = (?P=y) \* mx\.expand_dims\((?P<scores>\w+), axis=-1\)\n"
    r"(?P=indent)(?P<sum>\w+) = (?P=y)\.sum\(axis=-2\)(?P<cast>)\n",
)

BODIES: tuple[Body, ...] = (
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
    # hunyuan_v1_dense
    _attention(_CALL, _QKV, _ROPE_THEN_NORM, _ATTEND, norm="rotated"),
    # phi3
    _attention(_CALL, _PHI3_SPLIT, _HEADS, _VALUES, _ROPE, _ATTEND, names={**MX, **SDPA}),
    # gemma2
    _attention(_CALL, _QKV, _HEADS, _VALUES, _ROPE, _SOFTCAP_ATTEND, names=MX),
    # gpt_oss
    _attention(_SINKS),
    # gemma4_text
    _attention(_SHARED, names={**MX, **SDPA}, norm="head"),
    # qwen3_next, qwen3_5
    _attention(
        *(_CALL, _GATED_HEADS, _VALUES, _ROPE, _GATED_ATTEND),
        names=MX | SDPA,
        norm="head",
        gated=True,
    ),
    _gated("swiglu(self.GATE(x), self.UP(x))", "swiglu", SWIGLU),
    _gated("nn.silu(self.GATE(x)) * self.UP(x)", "swiglu", NN),
    _gated("nn.gelu(self.GATE(x)) * self.UP(x)", "geglu", NN),
    _gated("nn.gelu_approx(self.GATE(x)) * self.UP(x)", "geglu_tanh", NN),
    _gated("geglu(self.GATE(x), self.UP(x))", "geglu_tanh", GEGLU),
    _gated("nn.gelu(self.UP(x))", "gelu", NN),
    _gated("nn.gelu_approx(self.UP(x))", "gelu_tanh", NN),
    _gated("nn.relu2(self.UP(x))", "relu2", NN),
    Body(
        "mlp",
        """
def __call__(self, x):
    x = self.GATE_UP(x)
    gate, x = mx.split(x, 2, axis=-1)
    return self.DOWN(swiglu(gate, x))
""",
        {**MX, **SWIGLU},
        {"activation": "swiglu"},
    ),
    Body(
        "mlp",
        """
def __call__(self, x):
    x = self.GATE_UP(x)
    gate, up = mx.split(x, 2, axis=-1)
    return self.DOWN(swiglu(gate, up))
""",
        {**MX, **SWIGLU},
        {"activation": "swiglu"},
    ),
    # minimax_m3_vl
    Body(
        "mlp",
        """
def __call__(self, x):
    x_up = self.UP(x)
    x_gate = self.GATE(x)
    return self.DOWN(self.ACTIVATION(x_up, x_gate))
""",
    ),
    Body("block", _NORM_FIRST),
    Body("block", _ADDED_AT_ONCE),
    Body("block", _REASSIGNED),
    Body("block", _CONV_OR_ATTENTION, form={"keywords": True}),
    Body("block", _LINEAR_OR_ATTENTION),
    Body(
        "experts",
        _EXPERTS,
        {
            **MX,
            "_gather_sort": _MODELS + "switch_layers._gather_sort",
            "_scatter_unsort": _MODELS + "switch_layers._scatter_unsort",
        },
    ),
    Body(
        "activation",
        "def __call__(self, x, gate):\n    return swiglu(gate, x)\n",
        SWIGLU,
        {"activation": "swiglu"},
    ),
    Body(
        "activation",
        "def __call__(self, x, gate):\n    return geglu(gate, x)\n",
        GEGLU,
        {"activation": "geglu_tanh"},
    ),
    Body(
        "activation",
        """
def __call__(self, x, gate):
    return swiglu_oai(gate, x, alpha=self.ALPHA, limit=self.LIMIT)
""",
        CLIPPED,
        {"activation": "swiglu_clipped", "values": {"ALPHA": 1.702, "LIMIT": 7.0}},
    ),
    Body("norm", _call("mx.fast.rms_norm(x, self['weight'], self.EPS)"), MX, {"offset": 0.0}),
    # gemma, gemma2, gemma3_text
    Body("norm", _call("mx.fast.rms_norm(x, 1.0 + self.weight, self.EPS)"), MX, {"offset": 1.0}),
    # mlx.nn
    _rope("base=self.BASE, scale=self.SCALE"),
    # llama3, proportional
    _rope("base=None, scale=1.0, freqs=self.FREQS"),
    # longrope
    Body(
        "rope",
        """
def __call__(self, x, offset=0):
    return mx.fast.rope(
        x.at[..., : self.DIMS].multiply(self.MSCALE),
        self.DIMS,
        traditional=False,
        base=None,
        scale=1.0,
        offset=offset,
        freqs=self.FREQS,
    )
""",
        MX,
    ),
    # yarn
    Body(
        "rope",
        """
def __call__(self, x, offset=0, scale=1.0, inverse=False):
    if self.MSCALE != 1.0:
        input_scale = 1.0 / self.MSCALE if inverse else self.MSCALE
        x = x.at[..., : self.DIMS].multiply(input_scale)
    freqs = -self.FREQS if inverse else self.FREQS
    return mx.fast.rope(
        x,
        self.DIMS,
        traditional=self.TRADITIONAL,
        base=None,
        scale=scale,
        offset=offset,
        freqs=freqs,
    )
""",
        MX,
    ),
)
