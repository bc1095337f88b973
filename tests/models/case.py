"""What a tiny random model is like: a `Case`, and the tensors that follow from it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.models.tiny import Tiny

VOCABULARY = 259  # 256 bytes, two control tokens, one merge: the least llama.cpp accepts

QKV = ("attn_q", "attn_k", "attn_v")
MLP = ("ffn_gate", "ffn_up", "ffn_down")
Q4_MIX = {"": "Q4_0", "attn_v": "Q8_0", "ffn_down": "Q5_0", "token_embd": "Q8_0"}
K_MIX = {"": "Q4_K", "attn_v": "Q6_K", "ffn_down": "Q6_K", "token_embd": "Q6_K"}
IQ4_MIX = {"": "IQ4_NL", "attn_v": "Q8_0", "ffn_down": "Q5_0", "token_embd": "Q8_0"}
YARN = {
    "rope.scaling.type": "yarn",
    "rope.scaling.factor": 4.0,
    "rope.scaling.original_context_length": 64,
}
EXPERT_BIASES = tuple(f"ffn_{name}" for name in ("gate_inp", "gate_exps", "up_exps", "down_exps"))
EXPERT_Q4 = {"": "Q4_0", "attn_v": "Q8_0", "ffn_down_exps": "Q5_0", "token_embd": "Q8_0"}

SPREAD: tuple[Mapping[str, str], ...] = ({"": "F32"}, {"": "Q8_0"}, IQ4_MIX)
"""The formats of a case that has none of its own, one for each seed."""

Shape = tuple[int, ...]
Change = Callable[["Tiny"], None]


@dataclass(frozen=True)
class Case:
    """One model. `keys` are metadata under the architecture's prefix and override the usual ones;
    one that is None is left out.

    `formats` maps a tensor's short name (`attn_q`) or, first, its whole one without `.weight`
    (`blk.0.attn_q`) to a GGUF type, "" being the default; vectors
    and routers are always F32. Without a default each seed has a format of `SPREAD`. `prompt` is a
    number of tokens. With `experts`, the MLP is that many experts of `expert_ffn`, of which each
    token uses `used`, beside a shared one of `shared_ffn`.

    What else an architecture has is said by these:

    others    metadata under their full names.
    extra     tensors of every layer in addition or in place of the usual ones -> their shapes,
              of numbers and of names of this class's attributes; None leaves a usual one out.
    outside   likewise for tensors outside the layers.
    only      the tensors of one layer, called with the case and the layer's number: of the
              given usual ones and extras those that it keeps, or others.
    ranges    vector (`attn_q_norm`, `attn_q.bias`) -> the range of its random values.
    controls  what a loader could get wrong beside what `test_golden.controls` knows.
    no_rope   no layer rotates positions.
    """

    arch: str
    layers: int = 3
    hidden: int = 64
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    ffn: int = 96
    prompt: int = 24
    fused_qkv: bool = False
    fused_gate: bool = False
    untied: bool = False
    biases: tuple[str, ...] = ()
    head_norms: bool = False
    wide_norms: bool = False  # of q and k, over all heads together
    post_norms: bool = False
    post_attention_norm: bool = False  # in the place of ffn_norm
    layer_norm: bool = False
    sinks: bool = False
    experts: int = 0
    used: int = 0
    expert_ffn: int = 0
    shared_ffn: int = 0
    k_is_v: bool = False  # gemma4 without attn_v where there is no window
    unused_kv: bool = False  # gemma4's layers that share keys and values have tensors for own ones
    no_rope: bool = False
    factors: Mapping[str, int] = field(default_factory=dict)  # rope factor tensor -> length
    unrotated: int = 0  # of the factors the last ones, which are so large that nothing turns
    keys: Mapping[str, object] = field(default_factory=dict)
    formats: Mapping[str, str] = field(default_factory=dict)
    others: Mapping[str, object] = field(default_factory=dict)
    extra: Mapping[str, tuple[int | str, ...] | None] = field(default_factory=dict)
    outside: Mapping[str, tuple[int | str, ...] | None] = field(default_factory=dict)
    only: Callable[[Case, int, dict[str, Shape]], dict[str, Shape]] | None = None
    ranges: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    controls: Mapping[str, Change] = field(default_factory=dict)

    @property
    def q(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv(self) -> int:
        return self.kv_heads * self.head_dim

    def formats_of(self, seed: int) -> Mapping[str, str]:
        spread = () if "" in self.formats else SPREAD
        return {**(spread[seed] if spread else {}), **self.formats}

    def sized(self, shape: tuple[int | str, ...]) -> Shape:
        return tuple(getattr(self, n) if isinstance(n, str) else n for n in shape)


def whole(name: str) -> str:
    """The full name of a tensor: `.weight` is not written unless there is no suffix at all."""
    bare = name.endswith((".bias", ".scale", "ssm_a", "ssm_d", ".input_scale"))
    return name if bare else f"{name}.weight"


def shapes(case: Case, vocabulary: int = VOCABULARY) -> Iterator[tuple[str, Shape]]:
    """Every tensor with its shape, rows first."""
    outer: dict[str, Shape | None] = {
        "token_embd": (vocabulary, case.hidden),
        "output_norm": (case.hidden,),
    }
    if case.untied:
        outer["output"] = (vocabulary, case.hidden)
    outer |= {name: (length,) for name, length in case.factors.items()}
    outer |= {name: shape and case.sized(shape) for name, shape in case.outside.items()}
    for name, shape in outer.items():
        if shape is not None:
            yield whole(name), shape
    layer = _layer(case)
    for i in range(case.layers):
        for name, shape in (case.only(case, i, dict(layer)) if case.only else layer).items():
            bare = case.arch == "falcon-h1" and name == "ffn_norm"
            yield f"blk.{i}.{name if bare else whole(name)}", shape


def _layer(case: Case) -> dict[str, Shape]:
    """The tensors of a layer with attention and an MLP or experts."""
    hidden, ffn, q, kv = case.hidden, case.ffn, case.q, case.kv
    rows = {"attn_q": q, "attn_k": kv, "attn_v": kv, "attn_qkv": q + 2 * kv}
    made: dict[str, Shape] = {
        name: (rows[name], hidden) for name in (("attn_qkv",) if case.fused_qkv else QKV)
    }
    made["attn_output"] = (hidden, q)
    if case.experts:
        made |= expert_shapes(case)
    else:
        if not case.fused_gate:
            made["ffn_gate"] = (ffn, hidden)
        made["ffn_up"] = (ffn * (2 if case.fused_gate else 1), hidden)
        made["ffn_down"] = (hidden, ffn)
    matrices = dict(made)
    second = "post_attention_norm" if case.post_attention_norm else "ffn_norm"
    norms: dict[str, Shape] = {"attn_norm": (hidden,), second: (hidden,)}
    if case.head_norms:
        norms |= dict.fromkeys(("attn_q_norm", "attn_k_norm"), (case.head_dim,))
    if case.wide_norms:
        norms |= {"attn_q_norm": (q,), "attn_k_norm": (kv,)}
    if case.post_norms:
        norms |= dict.fromkeys(("post_attention_norm", "post_ffw_norm"), (hidden,))
    for name in case.biases:  # fused weights may have separate biases
        known = norms | matrices | {n: (r, hidden) for n, r in rows.items()}
        made[f"{name}.bias"] = known[name][:-1] or known[name]
    made |= norms
    if case.sinks:
        made["attn_sinks"] = (case.heads,)
    changed = {**made, **{n: shape and case.sized(shape) for n, shape in case.extra.items()}}
    return {name: shape for name, shape in changed.items() if shape is not None}


def expert_shapes(case: Case) -> dict[str, Shape]:
    hidden, experts, width, shared = case.hidden, case.experts, case.expert_ffn, case.shared_ffn
    made: dict[str, Shape] = {"ffn_gate_inp": (experts, hidden)}
    if case.fused_gate:
        made["ffn_gate_up_exps"] = (experts, 2 * width, hidden)
    else:
        made |= dict.fromkeys(("ffn_gate_exps", "ffn_up_exps"), (experts, width, hidden))
    made["ffn_down_exps"] = (experts, hidden, width)
    if shared:
        made |= {
            "ffn_gate_inp_shexp": (hidden,),
            "ffn_gate_shexp": (shared, hidden),
            "ffn_up_shexp": (shared, hidden),
            "ffn_down_shexp": (hidden, shared),
        }
    return made
