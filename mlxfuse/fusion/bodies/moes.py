"""The parts of blocks of experts that a fused class may stand for: see `bodies`.

Their own code goes on to run: what is known is only how it adds up the experts' results. A
fragment is a run of statements somewhere in a method, of which no other statement uses a variable.
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

MOES: tuple[Body, ...] = (
    Body("experts_sum", _SUM, fragment=True),
    Body("experts_sum", _CAST, form={"cast": True}, fragment=True),
    Body("experts_sum", _SUM.replace("(x, ids)", "(y, ids)"), fragment=True),  # kimi_k3
    Body("experts_sum", _EXPANDED, MX, fragment=True),
    Body("experts_sum", _WHOLE, MX, {"whole": True}),
)
