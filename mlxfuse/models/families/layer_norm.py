"""Models whose norms subtract the mean: Cohere, StarCoder2, StableLM, Phi-2, Nemotron 4."""

from __future__ import annotations

from dataclasses import replace

from ..keys import Keys
from ..layers import period, windows, with_windows
from ..pieces import GROUPS, QKV, attention, mlp
from ..table import OUTER, Architecture, Config, Weight, Weights


def _norms(bias: str, offset: float = 0.0) -> dict[str, Weight]:
    return {
        "attn_norm": Weight("input_layernorm", ("embd",), bias, offset=offset),
        "ffn_norm": Weight("post_attention_layernorm", ("embd",), bias, offset=offset),
    }


def _outer(bias: str, norm: str = "model.norm", offset: float = 0.0) -> Weights:
    return {**OUTER, "output_norm": Weight(norm, ("embd",), bias, offset=offset)}


def _plain_mlp(up: str, down: str, bias: str) -> dict[str, Weight]:
    """An MLP without a gate, by the names of its two matrices."""
    return {
        "ffn_up": Weight(f"mlp.{up}", ("ff", "embd"), bias),
        "ffn_down": Weight(f"mlp.{down}", ("embd", "ff"), bias),
    }


def _cohere2(key: Keys, config: Config) -> Config:
    """Layers that see everything rotate nothing."""
    slides = windows(key, config.layers, 4)
    window = key.count("attention.sliding_window")
    args = {
        "sliding_window": window,
        "sliding_window_pattern": period(key, slides, "attention.sliding_window_pattern"),
    }
    config = with_windows(config, slides, window, config.rope, None)
    return replace(config, args=config.args | args)


def _stablelm(key: Keys, config: Config) -> Config:
    """A model without the second norm has attention and the MLP side by side."""
    parallel = "blk.0.ffn_norm.weight" not in key.file.tensors
    biased = "blk.0.attn_q.bias" in key.file.tensors
    args = {"use_parallel_residual": parallel, "use_qkv_bias": biased}
    return replace(config, args=config.args | args)


_COHERE = attention("optional") | mlp() | {"attn_norm": _norms("no")["attn_norm"]}

ROWS = (
    Architecture(
        name="cohere2",
        models="Command R7B, Command A, Tiny Aya",
        module="mlx_lm.models.cohere2",
        layer=_COHERE,
        groups=GROUPS,
        keys={"logit_scale": ("logit_scale", 1.0)},
        rope_layout="interleaved",
        layer_norm=True,
        fixed_head=True,
        configure=_cohere2,
    ),
    Architecture(
        name="command-r",
        models="Command R, Aya Expanse",
        module="mlx_lm.models.cohere",
        layer=_COHERE,
        groups=GROUPS,
        keys={"logit_scale": ("logit_scale", 1.0)},
        rope_layout="interleaved",
        layer_norm=True,
        fixed_head=True,
    ),
    Architecture(
        name="nemotron",
        models="Nemotron 4, Minitron",
        module="mlx_lm.models.nemotron",
        outer=_outer("required", offset=1.0),
        layer={
            **_norms("required", offset=1.0),
            **attention("optional", "optional"),
            **_plain_mlp("up_proj", "down_proj", "optional"),
        },
        groups=QKV,
        args={"hidden_act": "relu2"},
        partial_rope=True,
        layer_norm=True,
        may_tie=False,
    ),
    Architecture(
        name="phi2",
        models="Phi-2",
        module="mlx_lm.models.phi",
        outer={
            **_outer("required", "model.final_layernorm"),
            "output": Weight("lm_head", ("vocab", "embd"), "required"),
        },
        layer={
            "attn_norm": _norms("required")["attn_norm"],
            **attention("required"),
            "attn_output": Weight("self_attn.dense", ("embd", "o"), "required"),
            **_plain_mlp("fc1", "fc2", "required"),
        },
        groups=QKV,
        partial_rope=True,
        layer_norm=True,
        fixed_head=True,
        may_tie=False,
    ),
    Architecture(
        name="stablelm",
        models="StableLM 2 and Zephyr",
        module="mlx_lm.models.stablelm",
        outer=_outer("required"),
        layer={
            "attn_norm": _norms("required")["attn_norm"],
            "ffn_norm": replace(_norms("required")["ffn_norm"], optional=True),
            **attention("optional"),
            **mlp(),
        },
        groups=GROUPS,
        partial_rope=True,
        layer_norm=True,
        fixed_head=True,
        may_tie=False,
        configure=_stablelm,
    ),
    Architecture(
        name="starcoder2",
        models="StarCoder2",
        module="mlx_lm.models.starcoder2",
        outer=_outer("required"),
        layer={
            **_norms("required"),
            **attention("optional", "optional"),
            **_plain_mlp("c_fc", "c_proj", "optional"),
        },
        groups=QKV,
        layer_norm=True,
        fixed_head=True,
    ),
)
