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
SWIGLU = {"swiglu": _MODELS + "activations.swiglu"}
GEGLU = {"geglu": _MODELS + "gemma4_text.geglu"}
CLIPPED = {"swiglu_oai": _MODELS + "activations.swiglu_oai"}


@dataclass(frozen=True)
class Body:
    """One known body.

    kind      what stands for it: ``attention``, ``mlp``, ``block``, ``post_norm``, ``experts``,
              ``experts_sum``, ``moe``, ``router``, ``norm``, ``rope``, ``delta_net``,
              ``gated_norm``, ``activation``.
    source    the method.
    names     global name -> the module, or the object of a module, that it must be.
    form      what the fused class has to know about it.
    functions  global name -> kind of the known function that it must be; what is known of that is
              part of the form.
    fragment  it is a part of a method: these statements, one after the other, somewhere in it.
    """

    kind: str
    source: str
    names: Mapping[str, str] = field(default_factory=dict)
    form: Mapping[str, Any] = field(default_factory=dict)
    fragment: bool = False
    functions: Mapping[str, str] = field(default_factory=dict)


def _gated(source: str, activation: str, names: Mapping[str, str]) -> Body:
    call = f"def __call__(self, x):\n    return self.DOWN({source})\n"
    return Body("mlp", call, names, {"activation": activation})


def _call(value: str) -> str:
    return f"def __call__(self, x):\n    return {value}\n"


def _rope(options: str) -> Body:
    how = f"x, self.DIMS, traditional=self.TRADITIONAL, offset=offset, {options}"
    source = f"def __call__(self, x, offset=0):\n    return mx.fast.rope({how})\n"
    return Body("rope", source, MX)


_NORM_FIRST = """
def __call__(self, x, mask=None, cache=None):
    r = self.ATTENTION(self.NORM1(x), mask, cache)
    h = x + r
    r = self.MLP(self.NORM2(h))
    return h + r
"""
# ministral3
_SCALED = """
def __call__(self, x, attn_scale=None, mask=None, cache=None):
    r = self.ATTENTION(self.NORM1(x), attn_scale, mask, cache)
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
# cohere, cohere2
_AT_ONCE = """
def __call__(self, x, mask=None, cache=None):
    h = self.NORM1(x)
    attn_h = self.ATTENTION(h, mask, cache)
    ff_h = self.MLP(h)
    return attn_h + ff_h + x
"""
# olmoe, glm_moe_dsa
_OVERWRITTEN = """
def __call__(self, x, mask=None, cache=None):
    x = x + self.ATTENTION(self.NORM1(x), mask, cache)
    x = x + self.MLP(self.NORM2(x))
    return x
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

BODIES: tuple[Body, ...] = (
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
    Body("block", _SCALED, form={"scaled": True}),
    Body("block", _ADDED_AT_ONCE),
    Body("block", _REASSIGNED),
    Body("block", _OVERWRITTEN),
    Body("block", _AT_ONCE, form={"parallel": True}),
    Body("block", _AT_ONCE.replace("=None", ""), form={"parallel": True}),  # phi
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
    # gemma4_text's norm of values
    Body("plain_norm", _call("mx.fast.rms_norm(x, None, self.EPS)"), MX),
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
