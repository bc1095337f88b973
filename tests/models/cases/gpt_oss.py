"""gpt-oss."""

from tests.models.case import EXPERT_BIASES, QKV, YARN, Case

CASES = {
    "gpt-oss": Case(
        "gpt-oss",
        layers=4,
        head_dim=32,
        untied=True,
        biases=(*QKV, "attn_output", *EXPERT_BIASES),
        post_attention_norm=True,
        sinks=True,
        experts=6,
        used=3,
        expert_ffn=32,
        keys={**YARN, "attention.sliding_window": 6},
        formats={
            "": "Q8_0",
            **dict.fromkeys(("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"), "MXFP4"),
        },
    ),
}
