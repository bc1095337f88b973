"""GGUF metadata -> a model's configuration, checked; numpy only.

Keys and defaults are llama.cpp's (``src/llama-model.cpp``, ``src/models/*.cpp``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import GGUFError, UnsupportedError
from .architectures import ARCHITECTURES, Architecture
from .families.small import FAMILIES
from .keys import Keys
from .rope import Rope, read_rope

if TYPE_CHECKING:
    from ..gguf.reader import GGUFFile


@dataclass(frozen=True, slots=True)
class Config:
    """What a file says about its model.

    layers     number of layers.
    sizes      name -> size, the names used in the architecture tables.
    by_layer   for each layer, or empty: sizes that it has in place of those; of a size that is 0
               there is no tensor.
    args       fields of mlx-lm's ``ModelArgs``.
    rope       of the layers that see the whole context.
    rope_swa   of the sliding-window layers, if they differ.
    tied       the output head is the embedding.
    recurrent  layers with a recurrence in place of attention.
    unread     tensors that a file may have and nothing reads.
    ignored    blocks of the file after the layers, which predict tokens after the next one.
    """

    architecture: Architecture
    layers: int
    sizes: dict[str, int]
    args: dict[str, Any]
    rope: Rope
    rope_swa: Rope | None
    tied: bool
    recurrent: frozenset[int] = frozenset()
    ignored: int = 0
    by_layer: tuple[Mapping[str, int], ...] = ()
    unread: frozenset[str] = frozenset()


def architecture(file: GGUFFile) -> Architecture:
    """The file's row of ``ARCHITECTURES``, or UnsupportedError naming it and those there are."""
    name = file.architecture
    if name not in ARCHITECTURES:
        raise UnsupportedError(
            f"{file.path}: architecture {name!r} is not supported; "
            f"supported are {', '.join(ARCHITECTURES)}"
        )
    return ARCHITECTURES[name]


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
    embd = key.count("embedding_length")
    heads = key.count("attention.head_count")
    kv_heads = key.count("attention.head_count_kv", heads)
    if heads % kv_heads:
        raise GGUFError(
            file.path, f"{heads} attention heads cannot share {kv_heads} key/value heads"
        )
    head = key.count("attention.key_length", embd // heads)
    value_head = key.count("attention.value_length", embd // heads)
    if value_head != head:
        raise UnsupportedError(f"heads of keys ({head}) and values ({value_head}) differ in size")
    if head * heads != embd and arch.name in ("qwen2", "qwen2moe", "phi3"):
        raise UnsupportedError(
            f"{arch.name} with a head size of {head}; expected {embd} / {heads} heads"
        )
    layers, ignored = _layers(key, arch)
    expert_args, expert_sizes = (
        _experts(file, key) if experts or (arch.experts and not arch.dense_too) else ({}, {})
    )
    ff = key.count("feed_forward_length", expert_sizes.get("expert_ff"))
    context = key.count("context_length")
    vocab = _vocab_size(file)
    rope = read_rope(arch, key, head, context, context_length or context)
    tied = "output.weight" not in file.tensors
    if tied and not arch.may_tie:
        raise GGUFError(file.path, f"output.weight is missing; {arch.name} has a head of its own")
    args: dict[str, Any] = {
        **arch.args,
        **expert_args,
        "model_type": arch.name,
        "hidden_size": embd,
        "num_hidden_layers": layers,
        "intermediate_size": ff,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head,
        "rms_norm_eps": key.positive("attention.layer_norm_rms_epsilon"),
        "vocab_size": vocab,
        "max_position_embeddings": context,
        "rope_theta": rope.base,
        "tie_word_embeddings": tied,
    }
    sizes = {
        "vocab": vocab,
        "embd": embd,
        "ff": ff,
        "gate_up": 2 * ff,
        "head": head,
        "heads": heads,
        "kv_heads": kv_heads,
        "q": heads * head,
        "o": heads * head,
        "kv": kv_heads * head,
        "qkv": (heads + 2 * kv_heads) * head,
        **expert_sizes,
    }
    config = Config(arch, layers, sizes, args, rope, None, tied, ignored=ignored)
    return FAMILIES[arch.name](key, config) if arch.name in FAMILIES else config


def _layers(key: Keys, arch: Architecture) -> tuple[int, int]:
    """How many layers there are, and how many blocks after them that are ignored."""
    blocks, tensors = key.count("block_count"), len(key.file.tensors)
    if blocks > tensors:  # before there is a list of so many
        raise GGUFError(key.file.path, f"block_count is {blocks}, but there are {tensors} tensors")
    ignored = key("nextn_predict_layers", int, 0) if arch.recurrent else 0
    if ignored >= blocks:
        raise GGUFError(
            key.file.path, f"{ignored} of {blocks} blocks predict tokens after the next"
        )
    return blocks - ignored, ignored


def _experts(file: GGUFFile, key: Keys) -> tuple[dict[str, Any], dict[str, int]]:
    """Arguments and sizes of a model with experts.

    Without their own lengths the experts of a token share the feed-forward length, and the
    shared expert has all of it.
    """
    experts, used = key.count("expert_count"), key.count("expert_used_count")
    if used > experts:
        raise GGUFError(file.path, f"expert_used_count is {used} of {experts} experts")
    if key("expert_group_count", int, 0) > 1:
        raise UnsupportedError("experts that are chosen by groups (expert_group_count)")

    def length(name: str, share: int) -> int:
        # llama.cpp takes 0 for a key that is missing.
        if key(name, int, 0):
            return key.count(name)
        whole = key.count("feed_forward_length")
        if whole < share:
            raise GGUFError(file.path, f"{key.name}.{name} is missing")
        return whole // share

    sizes = {
        "one": 1,
        "experts": experts,
        "expert_ff": length("expert_feed_forward_length", used),
    }
    args = {
        "num_experts": experts,
        "num_experts_per_tok": used,
        "moe_intermediate_size": sizes["expert_ff"],
    }
    if "ffn_gate_shexp" in ARCHITECTURES[file.architecture].layer:
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
