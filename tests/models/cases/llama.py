"""Models in the form of Llama."""

from collections.abc import Mapping

from tests.models.case import K_MIX, Q4_MIX, QKV, YARN, Case, Change
from tests.models.changes import read_as, set_full, set_key, swap_keys

GRANITE = {
    "logit_scale": 0.5,
    "residual_scale": 0.6,
    "embedding_scale": 3.0,
    "attention.scale": 0.5,
}

MINICPM = {"embedding_scale": 2.0, "residual_scale": 0.4, "logit_scale": 0.5}
MISTRAL3 = {
    **YARN,
    "rope.scaling.original_context_length": 8,
    "rope.scaling.yarn_beta_fast": 4.0,
    "rope.scaling.yarn_beta_slow": 0.1,
    "rope.scaling.yarn_log_multiplier": 0.7,
    "attention.temperature_scale": 0.5,
}


def unset(keys: Mapping[str, object]) -> dict[str, Change]:
    """A control for each factor: it is 1."""
    return {f"no-{key}": set_key(key, 1.0) for key in keys}


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
        controls=unset(GRANITE),
    ),
    "granite-without-rope": Case(
        "granite",
        keys={**GRANITE, "rope.scaling.finetuned": False},
        no_rope=True,
        controls={"rope": set_key("rope.scaling.finetuned", True)},
    ),
    "smollm3": Case("smollm3", layers=4),
    "apertus": Case(
        "apertus",
        head_norms=True,
        untied=True,
        extra={"ffn_gate": None},
        others={
            "xielu.alpha_n": [0.3, 0.5, 0.7],
            "xielu.alpha_p": [0.4, 0.8, 1.2],
            "xielu.beta": [0.5, 0.4, 0.3],
            "xielu.eps": [-1e-6, -1e-6, -1e-6],
        },
        controls={
            "alphas-swapped": swap_keys("xielu.alpha_n", "xielu.alpha_p"),
            "layers-reversed": set_full("xielu.beta", [0.3, 0.4, 0.5]),
        },
    ),
    "ernie4_5": Case("ernie4_5"),
    "hunyuan-dense": Case(
        "hunyuan-dense",
        head_norms=True,
        controls={"norms-before-the-rotation": read_as("qwen3")},
    ),
    "internlm2": Case("internlm2", untied=True),
    "minicpm": Case("minicpm", keys=MINICPM, controls=unset(MINICPM)),
    "minicpm-untied": Case("minicpm", untied=True, keys=MINICPM, controls=unset(MINICPM)),
    "mistral3": Case("mistral3", untied=True, head_dim=32),
    # Of 24 tokens the later ones are beyond the original context.
    "mistral3-yarn": Case(
        "mistral3",
        keys=MISTRAL3,
        controls={
            "no-temperature": set_key("attention.temperature_scale", 0.0),
            "no-log-multiplier": set_key("rope.scaling.yarn_log_multiplier", 0.0),
            "other-turns": set_key("rope.scaling.yarn_beta_slow", 1.0),
        },
    ),
    "qwen2vl": Case("qwen2vl", biases=QKV, keys={"rope.dimension_sections": [2, 3, 3, 0]}),
    "qwen3vl": Case("qwen3vl", head_norms=True, keys={"rope.dimension_sections": [3, 3, 2, 0]}),
    "seed_oss": Case("seed_oss", biases=QKV, post_attention_norm=True, untied=True),
}
