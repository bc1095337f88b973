"""Models in the form of Llama."""

from tests.models.case import K_MIX, Q4_MIX, QKV, YARN, Case
from tests.models.changes import set_key

GRANITE = {
    "logit_scale": 0.5,
    "residual_scale": 0.6,
    "embedding_scale": 3.0,
    "attention.scale": 0.5,
}

CASES = {
    "llama": Case("llama", formats={"": "Q8_0"}),
    "llama-q4": Case("llama", untied=True, formats=Q4_MIX),
    "llama-rope-freqs": Case("llama", factors={"rope_freqs": 8}, formats={"": "F16"}),
    "llama-rope-linear": Case(
        "llama", keys={"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}
    ),
    "llama-fused-qkv": Case(
        "llama",
        fused_qkv=True,
        biases=("attn_qkv",),
        formats={"": "Q4_1", "token_embd": "Q5_1"},
    ),
    # The K-quants need rows of 256; head_dim is not hidden / heads, as in Mistral Nemo.
    "llama-k-quants": Case(
        "llama", layers=2, hidden=256, head_dim=32, heads=8, ffn=256, untied=True, formats=K_MIX
    ),
    "llama-biases": Case("llama", biases=(*QKV, "attn_output")),
    "qwen2": Case("qwen2", biases=QKV, formats=Q4_MIX),
    "qwen2-fused-qkv": Case("qwen2", biases=QKV, fused_qkv=True, untied=True),
    "qwen2-yarn": Case(
        "qwen2",
        biases=QKV,
        keys={**YARN, "rope.scaling.yarn_beta_fast": 8.0, "rope.scaling.yarn_beta_slow": 0.5},
    ),
    "llama-yarn": Case("llama", keys={**YARN, "rope.scaling.attn_factor": 0.8}),
    "qwen3": Case("qwen3", head_dim=32, head_norms=True, formats={"": "Q8_0"}),
    "qwen2-without-biases": Case("qwen2"),
    "granite": Case(
        "granite",
        keys=GRANITE,
        controls={f"no-{key}": set_key(key, 1.0) for key in GRANITE},
    ),
    "granite-without-rope": Case(
        "granite",
        keys={**GRANITE, "rope.scaling.finetuned": False},
        no_rope=True,
        controls={"rope": set_key("rope.scaling.finetuned", True)},
    ),
    "smollm3": Case("smollm3", layers=4),
}
