"""GGUF metadata -> a model's configuration, checked; numpy only.

Keys and defaults are llama.cpp's (``src/llama-model.cpp``, ``src/models/*.cpp``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..errors import GGUFError, UnsupportedError
from .architectures import ARCHITECTURES
from .keys import Keys
from .layers import check_kv_heads
from .nearest import missing, nearest
from .rope import read_rope
from .table import Architecture, Config

if TYPE_CHECKING:
    from ..gguf.reader import GGUFFile


def architecture(file: GGUFFile) -> Architecture:
    """The file's row of ``ARCHITECTURES``, or UnsupportedError naming it and those there are."""
    name = file.architecture
    if name not in ARCHITECTURES:
        near = missing(name) or nearest(file)
        raise UnsupportedError(
            f"{file.path}: architecture {name!r} is not supported; "
            f"supported are {', '.join(ARCHITECTURES)}" + (near and f"; {near}")
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
    experts = _has_experts(key, arch)
    sizes = _sizes(key, arch)
    layers, ignored = _layers(key)
    expert_args: dict[str, Any] = {}
    by_layer: tuple[dict[str, int], ...] = ()
    if experts:
        expert_args, expert_sizes, by_layer = _experts(key, arch, layers)
        sizes |= expert_sizes
    width = key.count_or_none("feed_forward_length") or sizes.get("expert_ff")
    width = 0 if arch.attention_free else width or key.count("feed_forward_length")
    sizes["ff"] = width
    sizes["gate_up"] = 2 * sizes["ff"]
    context = key.tokens("context_length")
    rope = read_rope(key, arch, sizes["head"], context, context_length or context)
    sizes["rotary"] = rope.dims
    tied = "output.weight" not in file.tensors
    if tied and not arch.may_tie:
        raise GGUFError(file.path, f"output.weight is missing; {arch.name} has a head of its own")
    args: dict[str, Any] = {
        "num_hidden_layers": layers,
        "max_position_embeddings": context,
        "rope_theta": rope.base,
        **({"partial_rotary_factor": rope.dims / sizes["head"]} if arch.partial_rope else {}),
        "tie_word_embeddings": tied,
        **_sizes_as_args(sizes),
        **_epsilons(key, arch),
        **expert_args,
        **_own_args(key, arch, sizes),
    }
    config = Config(arch, layers, sizes, args, rope, tied, ignored=ignored, by_layer=by_layer)
    return arch.configure(key, config) if arch.configure else config


def _has_experts(key: Keys, arch: Architecture) -> bool:
    """Whether the model's layers have experts.

    Raises:
        UnsupportedError: they do and the architecture's do not, or the model is none that
            generates text.
    """
    experts = bool(key("expert_count", int, 0))
    if experts and not arch.experts:
        raise UnsupportedError(f"mixture-of-experts models of {arch.name} are not supported")
    if not key.flag("attention.causal", True):
        raise UnsupportedError(
            f"{arch.name}.attention.causal is false: a model that sees later tokens too, such as "
            "those for embeddings; only models that generate text are supported"
        )
    return experts or (arch.experts and not arch.dense_too)


def _sizes_as_args(sizes: Mapping[str, int]) -> dict[str, int]:
    """Fields of ``ModelArgs`` that are sizes in every architecture."""
    fields = {
        "hidden_size": "embd",
        "intermediate_size": "ff",
        "num_attention_heads": "heads",
        "num_key_value_heads": "kv_heads",
        "head_dim": "head",
        "vocab_size": "vocab",
    }
    return {field: sizes[name] for field, name in fields.items()}


def _epsilons(key: Keys, arch: Architecture) -> dict[str, float]:
    """The norms' epsilon under each name that a ``ModelArgs`` has for it."""
    name, rms = "attention.layer_norm_epsilon", "attention.layer_norm_rms_epsilon"
    # Some hybrids' files have the other name.
    if not arch.layer_norm and (rms in key or name not in key):
        name = rms
    epsilon = key(name, float)
    if epsilon < 0:
        raise GGUFError(key.file.path, f"{key.name}.{name} is {epsilon}; expected 0 or more")
    names = ("rms_norm_eps", "layer_norm_eps", "norm_eps", "norm_epsilon")
    return dict.fromkeys(names, epsilon or 1e-30)  # MLX takes none of 0


def _own_args(key: Keys, arch: Architecture, sizes: Mapping[str, int]) -> dict[str, Any]:
    """Fields of ``ModelArgs`` that the architecture's row tells."""
    return {
        "model_type": arch.name,
        "attention_bias": False,  # linears have the biases that the file has
        "mlp_bias": False,
        **{field: sizes[name] for field, name in arch.same.items()},
        **{field: key.value(*given) for field, given in arch.keys.items()},
        **{field: name in key.file.tensors for field, name in arch.present.items()},
        **arch.args,
    }


def _sizes(key: Keys, arch: Architecture) -> dict[str, int]:
    """The sizes that every architecture has."""
    embd, heads, kv_heads = key.count("embedding_length"), 1, 1
    if not arch.attention_free:
        heads = key.count("attention.head_count")
        kv_heads = key.count("attention.head_count_kv", heads)
        check_kv_heads(key, heads, kv_heads)
    if arch.latent:
        kv_heads = heads
        head, value_head = _latent_heads(key)
    else:
        head = key.count("attention.key_length", embd // heads)
        value_head = key.count("attention.value_length", embd // heads)
    if value_head != head and not (arch.latent or arch.value_heads):
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
        "value": value_head,
        "o": heads * value_head,
        "kv": kv_heads * head,
        "v": kv_heads * value_head,
        "qkv": (heads + 2 * kv_heads) * head,
        "cache": kv_heads * (head + value_head),
        "window": 0,
        "state": 0,
    }


def _latent_heads(key: Keys) -> tuple[int, int]:
    """The sizes of a head of keys and of values; those without a suffix are the cache's."""
    names = [f"attention.{name}_length_mla" for name in ("key", "value")]
    if not all(key(name, int, 0) for name in names):
        raise UnsupportedError(
            f"{key.name}.{names[0]} is missing: the file is from before llama.cpp stored the "
            "latent attention's matrices apart; convert the model again"
        )
    return key.count(names[0]), key.count(names[1])


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


def _experts(
    key: Keys, arch: Architecture, layers: int
) -> tuple[dict[str, Any], dict[str, int], tuple[dict[str, int], ...]]:
    """Arguments and sizes of a model with experts, and which sizes are 0 in which layers.

    Raises:
        UnsupportedError: experts are chosen in a way that mlx-lm's class does not know.
        GGUFError: the numbers contradict each other.
    """
    experts, used = key.count("expert_count"), key.count("expert_used_count")
    if used > experts:
        raise GGUFError(key.file.path, f"expert_used_count is {used} of {experts} experts")
    tensors = {name for table in arch.tables for name in table}
    gating = key("expert_gating_func", int, 0) if arch.gatings else 0
    if gating and gating not in arch.gatings:
        raise UnsupportedError(f"{arch.name} with expert_gating_func {gating}")
    whole = arch.whole_experts
    width = key.count("feed_forward_length") if whole else _expert_width(key, used)
    sizes = {"experts": experts, "expert_ff": width}
    args = {
        **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts"), experts),
        "num_experts_per_tok": used,
        "moe_intermediate_size": width,
        "norm_topk_prob": key.flag("expert_weights_norm", False),
        "routed_scaling_factor": key("expert_weights_scale", float, 0.0) or 1.0,
        **_expert_groups(key, arch, experts),
    }
    if "ffn_down_shexp" in tensors:
        shared = _shared_width(key, width)
        sizes["shared_ff"] = args["shared_expert_intermediate_size"] = shared
        args |= dict.fromkeys(("n_shared_experts", "num_shared_experts"), shared // width)
    dense = key("leading_dense_block_count", int, 0)
    args["first_k_dense_replace"] = dense
    if "ffn_gate_inp" not in tensors or not tensors & {"ffn_up"} or arch.dense_too:
        return args, sizes, ()
    bare = {"experts": 0, "shared_ff": 0}
    by_layer = tuple(bare if i < dense else {"ff": 0} for i in range(layers))
    return args, sizes, by_layer


def _expert_groups(key: Keys, arch: Architecture, experts: int) -> dict[str, int]:
    """How many groups of experts there are, and from how many a token's are chosen."""
    groups = key("expert_group_count", int, 0) or 1
    if groups == 1:  # all groups chosen is no choice
        return {"n_group": 1, "topk_group": 1}
    chosen = key("expert_group_used_count", int, 0) or groups
    if not arch.groups_too:
        raise UnsupportedError("experts that are chosen by groups (expert_group_count)")
    if experts % groups or chosen > groups:
        raise GGUFError(
            key.file.path, f"{experts} experts in {groups} groups, of which {chosen} are used"
        )
    groups = 1 if chosen == groups else groups
    return {"n_group": groups, "topk_group": min(chosen, groups)}


def _expert_width(key: Keys, share: int) -> int:
    """An expert's width; if the file has none, the experts of a token share the MLP's."""
    # llama.cpp takes 0 for a key that is missing.
    if own := key.count_or_none("expert_feed_forward_length"):
        return own
    whole = key.count("feed_forward_length")
    if whole < share:
        raise GGUFError(key.file.path, f"{key.name}.expert_feed_forward_length is missing")
    return whole // share


def _shared_width(key: Keys, width: int) -> int:
    """The width of all shared experts together."""
    if own := key.count_or_none("expert_shared_feed_forward_length"):
        return own
    if count := key.count_or_none("expert_shared_count"):
        return count * width
    return key.count("feed_forward_length")


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
