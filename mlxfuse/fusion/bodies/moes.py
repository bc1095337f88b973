"""The blocks of experts, or parts of them, that a fused class may stand for: see `bodies`.

Where a block's own code goes on to run, what is known is only how it adds up the experts' results.
A fragment is a run of statements somewhere in a method, of which no other statement uses a
variable. Of a block of kind ``moe`` the whole method is known: how experts are chosen too.
"""

from __future__ import annotations

from .mlps import MX, Body

# mixtral, qwen3_moe and most others: called with ids, multiplied and added up.
_SUM = """
def __call__(self, x, ids, scores):
    y = self.EXPERTS(x, ids)
    return (y * scores[..., None]).sum(axis=-2)
"""
_CAST = _SUM.replace("(axis=-2)", "(axis=-2).astype(y.dtype)")
# gpt_oss
_EXPANDED = """
def __call__(self, x, ids, scores):
    x = self.EXPERTS(x, ids)
    x = x * mx.expand_dims(scores, axis=-1)
    return x.sum(axis=-2)
"""
# gemma4_text: the whole of a class
_WHOLE = """
def __call__(self, x, top_k_indices, top_k_weights):
    w = mx.expand_dims(top_k_weights, -1)
    y = self.EXPERTS(x, top_k_indices)
    return (w * y).sum(-2)
"""

# Where the weights are a softmax over all experts; they may be divided by their sum.
_SOFTMAX = """
    gates = self.GATE(x)
    gates = mx.softmax(gates, axis=-1, precise=True)
    k = self.COUNT
"""
_LAST = """
    inds = mx.argpartition(gates, kth=-k, axis=-1)[..., -k:]
    inds = mx.stop_gradient(inds)
    scores = mx.take_along_axis(gates, inds, axis=-1)
"""
_FIRST = """
    inds = mx.stop_gradient(mx.argpartition(-gates, kth=k - 1, axis=-1)[..., :k])
    scores = mx.take_along_axis(gates, inds, axis=-1)
"""
_CALL = """
def __call__(self, x):
"""
_SHARDED_CALL = """
def __call__(self, x):
    if self.sharding_group is not None:
        x = sum_gradients(self.sharding_group)(x)
"""
_SHARDED_SUM = """
    if self.sharding_group is not None:
        y = mx.distributed.all_sum(y, group=self.sharding_group)
    return y
"""
_ADDED_UP = """
    y = self.EXPERTS(x, inds)
    y = (y * scores[..., None]).sum(axis=-2)
"""
# qwen3_moe
_QWEN3 = (
    _SHARDED_CALL
    + _SOFTMAX
    + _LAST
    + """
    if self.NORM:
        scores /= mx.sum(scores, axis=-1, keepdims=True)
    y = self.EXPERTS(x, inds)
    y = (y * scores[..., None]).sum(axis=-2).astype(y.dtype)
"""
    + _SHARDED_SUM
)
# qwen3_next, qwen3_5_moe
_QWEN3_NEXT = (
    _SHARDED_CALL
    + _SOFTMAX
    + _LAST
    + """
    if self.NORM:
        scores = scores / scores.sum(axis=-1, keepdims=True)
"""
    + _ADDED_UP
    + """
    shared_y = self.SHARED(x)
    shared_y = mx.sigmoid(self.SHARED_GATE(x)) * shared_y
    y = y + shared_y
"""
    + _SHARDED_SUM
)
_QWEN2 = (
    _CALL
    + _SOFTMAX
    + _FIRST
    + _ADDED_UP
    + """
    shared_expert_output = self.SHARED(x)
    shared_expert_output = mx.sigmoid(self.SHARED_GATE(x)) * shared_expert_output
    return y + shared_expert_output
"""
)
_MIXTRAL = (
    _CALL
    + """
    gates = self.GATE(x)
    k = self.COUNT
"""
    + _FIRST
    + """
    scores = mx.softmax(scores, axis=-1, precise=True)
"""
    + _ADDED_UP
    + """
    return y
"""
)
# granitemoe, granitemoehybrid: a module of its own chooses
_ROUTED = """
def __call__(self, x):
    token_ids, gates = self.ROUTER(x)
    y = self.EXPERTS(x, token_ids)
    return (y * gates[..., None]).sum(axis=-2)
"""
_ROUTER = """
def __call__(self, hidden_states):
    logits = self.GATE(hidden_states)
    top_k_idx = mx.stop_gradient(
        mx.argpartition(logits, kth=-self.COUNT, axis=-1)[..., -self.COUNT :]
    )
    top_k_logits = mx.take_along_axis(logits, top_k_idx, axis=-1)
    top_k_gates = mx.softmax(top_k_logits, precise=True, axis=-1)
    return top_k_idx, top_k_gates
"""
_GPT_OSS = (
    _SHARDED_CALL
    + """
    g = self.GATE(x)
    experts, indices = mlx_topk(g, k=self.COUNT, axis=-1)
    expert_weights = mx.softmax(experts, axis=-1, precise=True)
    x = self.EXPERTS(x, indices)
    x = x * mx.expand_dims(expert_weights, axis=-1)
    y = x.sum(axis=-2)
"""
    + _SHARDED_SUM
)

# gemma4_text
_ROUTER = """
def __call__(self, x):
    x = mx.fast.rms_norm(x, self.SCALE * self.ROOT, self.EPS)
    expert_scores = self.PROJ(x)
    top_k_indices = mx.argpartition(expert_scores, kth=-self.CONFIG.top_k_experts, axis=-1)
    top_k_indices = mx.stop_gradient(top_k_indices[..., -self.CONFIG.top_k_experts :])
    top_k_weights = mx.take_along_axis(expert_scores, top_k_indices, axis=-1)
    top_k_weights = mx.softmax(top_k_weights, axis=-1)
    top_k_weights = top_k_weights * self.FACTORS[top_k_indices]
    return top_k_indices, top_k_weights
"""

MOES: tuple[Body, ...] = (
    Body("router", _ROUTER, MX),
    *(Body("moe", text, MX, {"whole": True}) for text in (_QWEN3, _QWEN3_NEXT, _QWEN2)),
    Body("moe", _MIXTRAL, MX),
    Body("moe", _GPT_OSS, {**MX, "mlx_topk": "mlx_lm.models.gpt_oss.mlx_topk"}),
    Body("moe", _ROUTED),
    Body("moe", _ROUTED.replace("(axis=-2)", "(axis=-2).astype(y.dtype)")),
    Body("router", _ROUTER, MX),
    Body("router", _ROUTER.replace("logits, precise=True", "logits.astype(mx.float32)"), MX),
    Body("experts_sum", _SUM, fragment=True),
    Body("experts_sum", _CAST, form={"cast": True}, fragment=True),
    Body("experts_sum", _SUM.replace("(x, ids)", "(y, ids)"), fragment=True),  # kimi_k3
    Body("experts_sum", _EXPANDED, MX, fragment=True),
    Body("experts_sum", _WHOLE, MX, {"whole": True}),
)
