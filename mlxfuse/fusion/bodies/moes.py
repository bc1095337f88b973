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

# glm4_moe, deepseek_v3 and others: a router of its own, and a shared expert or none
_SHARING_SUM = """
    inds, scores = self.GATE(x)
    y = self.EXPERTS(x, inds)
    y = (y * scores[..., None]).sum(axis=-2).astype(y.dtype)
    if self.{} is not None:
        y = y + self.SHARED(x)
"""
_OWN, _SETTING, _CONFIG = "shared_experts", "n_shared_experts", "config.n_shared_experts"
_RETURN = "    return y\n"
_SHARING = tuple(
    Body("routed", before + _SHARING_SUM.format(shares) + after, MX, {"shares": shares})
    for before, shares, after in (
        (_SHARDED_CALL, _CONFIG, _SHARDED_SUM),
        (_SHARDED_CALL, _OWN, _SHARDED_SUM),
        (_CALL, _CONFIG, _RETURN),
        (_CALL, _SETTING, _RETURN),
    )
)
_SIGMOIDS = """
def __call__(self, x):
    return group_expert_select(
        x @ self.weight.T,
        self.e_score_correction_bias,
        self.top_k,
        self.n_group,
        self.topk_group,
        self.routed_scaling_factor,
        self.norm_topk_prob,
    )
"""
_SELECT_CALL = """
def group_expert_select(
    gates,
    e_score_correction_bias,
    top_k,
    n_group,
    topk_group,
    routed_scaling_factor,
    norm_topk_prob,
):
"""
_SELECTED = """
    k = top_k
    inds = mx.argpartition(-scores, kth=k - 1, axis=-1)[..., :k]
    inds = mx.stop_gradient(inds)
    scores = mx.take_along_axis(orig_scores, inds, axis=-1)
    if top_k > 1 and norm_topk_prob:
        denominator = scores.sum(axis=-1, keepdims=True)
        scores = scores / denominator
    scores = scores * routed_scaling_factor
    return inds, scores
"""
_SELECT = (
    _SELECT_CALL
    + """
    scores = mx.sigmoid(gates.astype(mx.float32))
    orig_scores = scores
    scores = scores + e_score_correction_bias
    if n_group > 1:
        scores = mx.unflatten(scores, axis=-1, shape=(n_group, -1))
        group_scores = mx.topk(scores, 2, axis=-1).sum(axis=-1, keepdims=True)
        k = n_group - topk_group
        group_idx = mx.argpartition(group_scores, kth=k - 1, axis=-2)[..., :k, :]
        scores = mx.put_along_axis(
            scores, mx.stop_gradient(group_idx), mx.array(0.0), axis=-2
        )
        scores = mx.flatten(scores, -2, -1)
"""
    + _SELECTED
)
_WITH_EPS = _SELECT.replace("/ denominator", "/ (denominator + 1e-20)")
# nemotron_h
_AT_ONCE = _WITH_EPS.replace(
    "    scores = mx.sigmoid(gates.astype(mx.float32))\n    orig_scores = scores\n",
    "    orig_scores = scores = mx.sigmoid(gates.astype(mx.float32))\n",
)
# dots1
_DOTS1 = (
    _SELECT_CALL
    + """
    k = top_k
    scores = mx.sigmoid(gates.astype(mx.float32))
    orig_scores = scores
    scores = scores + e_score_correction_bias
    k = n_group - topk_group
    if k != 0:
        scores = mx.unflatten(scores, axis=-1, shape=(n_group, -1))
        group_scores = mx.topk(scores, 2, axis=-1).sum(axis=-1, keepdims=True)
        group_idx = mx.argpartition(group_scores, kth=k - 1, axis=-2)[..., :k, :]
        group_idx = mx.stop_gradient(group_idx)
        scores = mx.put_along_axis(scores, group_idx, mx.array(0.0), axis=-2)
        scores = mx.flatten(scores, -2, -1)
"""
    + _SELECTED
)
# gemma4_text
_NORMED_ROUTER = """
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
    Body("normed_router", _NORMED_ROUTER, MX),
    *(Body("moe", text, MX, {"whole": True}) for text in (_QWEN3, _QWEN3_NEXT, _QWEN2)),
    Body("moe", _MIXTRAL, MX),
    Body("moe", _GPT_OSS, {**MX, "mlx_topk": "mlx_lm.models.gpt_oss.mlx_topk"}),
    *_SHARING,
    Body("sigmoid_router", _SIGMOIDS, functions={"group_expert_select": "select"}),
    Body("select", _SELECT, form={"eps": 0.0}),
    Body("select", _WITH_EPS, form={"eps": 1e-20}),
    Body("select", _AT_ONCE, form={"eps": 1e-20}),
    Body("select", _DOTS1, form={"eps": 0.0}),
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
