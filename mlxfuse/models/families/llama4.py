"""Llama 4: attention in chunks of the context, and an expert whose input is weighted."""

from __future__ import annotations

from dataclasses import replace

from ...errors import UnsupportedError
from ..keys import Keys
from ..layers import without_rope
from ..pieces import EXPERT_GROUPS, GROUPS, NORMS, SHARED, attention, experts, mlp, shared_expert
from ..table import OUTER, Architecture, Config

# llama.cpp takes this whatever length of chunks the file gives; published models have no other.
CHUNK = 8192


def _llama4(key: Keys, config: Config) -> Config:
    """Every fourth layer sees everything and rotates nothing."""
    if not key("attention.sliding_window", int, CHUNK):
        raise UnsupportedError("llama4 without chunks (attention.sliding_window is 0)")
    used = config.args["num_experts_per_tok"]
    if used != 1:
        raise UnsupportedError(f"llama4 with {used} experts for each token; expected 1")
    step, layers, width = key.count("interleave_moe_layer_step"), config.layers, "expert_ff"
    args = config.args | {
        "attention_chunk_size": CHUNK,
        "interleave_moe_layer_step": step,
        "intermediate_size": config.sizes[width],
        "intermediate_size_mlp": config.sizes["ff"],
        "rope_scaling": None,
        # The size of Maverick, whose queries and keys are not normalised.
        "use_qk_norm": config.sizes["experts"] != 128,
    }
    routed = [i % step == step - 1 for i in range(layers)]
    config = replace(
        config,
        args=args | {"text_config": args},
        sizes=config.sizes | {"shared_ff": config.sizes[width]},
        by_layer=tuple({"ff": 0} if one else {"experts": 0, "shared_ff": 0} for one in routed),
    )
    return without_rope(config, range(3, layers, 4))


_AT = "language_model"

ROWS = (
    Architecture(
        name="llama4",
        models="Llama 4 Scout and Maverick",
        module="mlxfuse.models.families.llama4_model",
        outer={
            name: replace(weight, module=f"{_AT}.{weight.module}") for name, weight in OUTER.items()
        },
        layers_at=f"{_AT}.model.layers",
        layer={
            **NORMS,
            **attention(),
            **mlp(at="feed_forward"),
            **experts("feed_forward.router", "feed_forward.experts"),
            **shared_expert("feed_forward.shared_expert"),
        },
        groups=GROUPS | SHARED | {"experts_gate_up": EXPERT_GROUPS["gate_up"]},
        rope_layout="interleaved",
        rope_types=("llama3",),
        may_tie=False,
        configure=_llama4,
    ),
)
