"""GGUF metadata -> a model's configuration, checked; numpy only.

Keys and defaults are llama.cpp's (``src/llama-model.cpp``, ``src/models/*.cpp``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..errors import GGUFError, UnsupportedError
from .architectures import ARCHITECTURES
from .keys import Keys
from .layers import check_kv_heads
from .rope import read_rope
from .table import Architecture, Config

if TYPE_CHECKING:
    from ..gguf.reader import GGUFFile


def architecture(file: GGUFFile) -> Architecture:
    """The file's row of ``ARCHITECTURES``, or UnsupportedError naming it and those there are."""
    name = file.architecture
    if name not in ARCHITECTURES:
        raise UnsupportedError(
            f"{file.path}: architecture {name!r} is not supported; "
            f"supported are {', '.join(ARCHITECTURES)}"
        )
    arch = ARCHITECTURES[name]
    return (arch.choose and arch.choose(Keys(file, arch.uneven))) or arch


def read_config(file: GGUFFile, context_length: int | None = None) -> Config:
    """The configuration in a file's metadata.

    Args:
        context_length: tokens the model will be used with; the file's own by default. It decides
            between the long and short rotary factors of a ``longrope`` model, as in llama.cpp.

    Raises:
        UnsupportedError: the architecture, or a feature of this model, is not supported.
        GGUFError: a key is missing, has the wrong type, or contradicts another.
    """
    arch = architecture(file)
    key = Keys(file, arch.uneven)
    experts = bool(key("expert_count", int, 0))
    if experts and not arch.experts:
        raise UnsupportedError(f"mixture-of-experts models of {arch.name} are not supported")
    sizes = _sizes(key, arch)
    embd, heads, head = sizes["embd"], sizes["heads"], sizes["head"]
    layers, ignored = _layers(key)
    expert_args: dict[str, Any] = {}
    if experts or (arch.experts and not arch.dense_too):
        expert_args, expert_sizes = _experts(key, arch)
        sizes |= expert_sizes
    sizes["ff"] = key.count("feed_forward_length", sizes.get("expert_ff"))
    sizes["gate_up"] = 2 * sizes["ff"]
    context = key.count("context_length")
    rope = read_rope(
        key,
        head,
        context,
        context_length or context,
        types=arch.rope_types,
        partial=arch.partial_rope,
        pairs=arch.rope_layout == "interleaved",
        yarn_log=arch.yarn_log,
    )
    tied = "output.weight" not in file.tensors
    if tied and not arch.may_tie:
        raise GGUFError(file.path, f"output.weight is missing; {arch.name} has a head of its own")
    norm = "layer_norm_epsilon" if arch.layer_norm else "layer_norm_rms_epsilon"
    epsilon = key.positive(f"attention.{norm}")
    args: dict[str, Any] = {
        "model_type": arch.name,
        "hidden_size": embd,
        "num_hidden_layers": layers,
        "intermediate_size": sizes["ff"],
        "num_attention_heads": heads,
        "num_key_value_heads": sizes["kv_heads"],
        "head_dim": head,
        "attention_bias": False,  # linears have the biases that the file has
        "mlp_bias": False,
        **dict.fromkeys(("rms_norm_eps", "layer_norm_eps", "norm_eps", "norm_epsilon"), epsilon),
        "vocab_size": sizes["vocab"],
        "max_position_embeddings": context,
        "rope_theta": rope.base,
        **({"partial_rotary_factor": rope.dims / head} if arch.partial_rope else {}),
        "tie_word_embeddings": tied,
        **expert_args,
        **{field: sizes[name] for field, name in arch.same.items()},
        **{field: key.value(*given) for field, given in arch.keys.items()},
        **{field: name in file.tensors for field, name in arch.present.items()},
        **arch.args,
    }
    config = Config(arch, layers, sizes, args, rope, tied, ignored=ignored)
    return arch.configure(key, config) if arch.configure else config


def _sizes(key: Keys, arch: Architecture) -> dict[str, int]:
    """The sizes that every architecture has."""
    embd, heads = key.count("embedding_length"), key.count("attention.head_count")
    kv_heads = key.count("attention.head_count_kv", heads)
    check_kv_heads(key, heads, kv_heads)
    head = key.count("attention.key_length", embd // heads)
    value_head = key.count("attention.value_length", embd // heads)
    if value_head != head:
        raise UnsupportedError(f"heads of keys ({head}) and values ({value_head}) differ in size")
    if head * heads != embd and arch.fixed_head:
        raise UnsupportedError(
            f"{arch.name} with a head size of {head}; expected {embd} / {heads} heads"
        )
    return {
        "one": 1,
        "vocab": _vocab_size(key.file),
        "embd": embd,
        "head": head,
        "heads": heads,
        "kv_heads": kv_heads,
        "q": heads * head,
        "o": heads * head,
        "kv": kv_heads * head,
        "qkv": (heads + 2 * kv_heads) * head,
        "cache": 2 * kv_heads * head,
        "window": 0,
        "state": 0,
    }


def _layers(key: Keys) -> tuple[int, int]:
    """How many layers there are, and how many blocks after them that are ignored."""
    blocks, tensors = key.count("block_count"), len(key.file.tensors)
    if blocks > tensors:  # before there is a list of so many
        raise GGUFError(key.file.path, f"block_count is {blocks}, but there are {tensors} tensors")
    ignored = key("nextn_predict_layers", int, 0)
    if ignored >= blocks:
        raise GGUFError(
            key.file.path, f"{ignored} of {blocks} blocks predict tokens after the next"
        )
    return blocks - ignored, ignored


def _experts(key: Keys, arch: Architecture) -> tuple[dict[str, Any], dict[str, int]]:
    """Arguments and sizes of a model with experts.

    Without their own lengths the experts of a token share the feed-forward length, and the
    shared expert has all of it.
    """
    experts, used = key.count("expert_count"), key.count("expert_used_count")
    if used > experts:
        raise GGUFError(key.file.path, f"expert_used_count is {used} of {experts} experts")
    if key("expert_group_count", int, 0) > 1:
        raise UnsupportedError("experts that are chosen by groups (expert_group_count)")

    def length(name: str, share: int) -> int:
        # llama.cpp takes 0 for a key that is missing.
        if key(name, int, 0):
            return key.count(name)
        whole = key.count("feed_forward_length")
        if whole < share:
            raise GGUFError(key.file.path, f"{key.name}.{name} is missing")
        return whole // share

    sizes = {
        "experts": experts,
        "expert_ff": length("expert_feed_forward_length", used),
    }
    args = {
        "num_experts": experts,
        "num_experts_per_tok": used,
        "moe_intermediate_size": sizes["expert_ff"],
    }
    if any("ffn_gate_shexp" in table for table in arch.tables):
        shared = length("expert_shared_feed_forward_length", 1)
        sizes["shared_ff"] = args["shared_expert_intermediate_size"] = shared
    return args, sizes


def _vocab_size(file: GGUFFile) -> int:
    """Rows of the embedding; a tokenizer with another number of tokens is refused."""
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        raise GGUFError(file.path, "token_embd.weight is missing")
    rows = embedding.shape[0] if len(embedding.shape) == 2 else 0
    if not rows:
        raise GGUFError(
            file.path, f"token_embd.weight has the shape {embedding.shape}; expected a row a token"
        )
    tokens = file.metadata.get("tokenizer.ggml.tokens")
    if isinstance(tokens, list) and len(tokens) != rows:
        raise GGUFError(
            file.path,
            f"token_embd.weight has the shape {embedding.shape}; "
            f"expected a row for each of the {len(tokens)} tokens",
        )
    return rows
