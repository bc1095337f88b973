"""GGUF metadata -> a model's configuration, checked; numpy only.

Keys and defaults are llama.cpp's (``src/llama-model.cpp``, ``src/models/*.cpp``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from ..errors import GGUFError, UnsupportedError
from .architectures import ARCHITECTURES, Architecture

if TYPE_CHECKING:
    from ..gguf.reader import GGUFFile

T = TypeVar("T", int, float, str)

# llama.cpp names no model size in a file; these layer counts mark the 27B models, which alone
# scale queries by the width of a head as if all heads filled the model.
_LAYERS_27B = {"gemma2": 46, "gemma3": 62}


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary embedding of one kind of layer.

    dims      leading components of a head that are rotated.
    base      frequency base.
    factor    positions are divided by this (1: as they are).
    scale     q and k are multiplied by this.
    factors   tensor that divides the frequencies, [dims/2], or empty.
    yarn      original context in tokens if the scaling is YaRN, else 0.
    """

    dims: int
    base: float
    factor: float = 1.0
    scale: float = 1.0
    factors: str = ""
    yarn: int = 0

    @property
    def plain(self) -> bool:
        return self.factor == 1.0 and self.scale == 1.0 and not self.factors and not self.yarn

    def periods(self, factors: np.ndarray | None = None) -> np.ndarray:
        """Radians^-1 a position of each pair, float32 [dims/2]: what ``mx.fast.rope`` calls freqs.

        ``base^(2i/dims)``, times ``factors``; YaRN blends the interpolated and the extrapolated
        frequency by a ramp over i (arXiv 2309.00071, section 3.2) whose ends are the pairs that
        make 32 turns and 1 turn over the original context, llama.cpp's values for every file.
        """
        extrapolated = self.base ** (np.arange(0, self.dims, 2, dtype=np.float64) / self.dims)
        if factors is not None:
            extrapolated = extrapolated * factors
        interpolated = extrapolated * self.factor
        if not self.yarn:
            return interpolated.astype(np.float32)

        def pair(turns: float) -> float:
            """The pair that makes ``turns`` turns over the original context."""
            period = self.yarn / (turns * 2 * math.pi)
            return self.dims * math.log(period) / (2 * math.log(self.base))

        low = max(0, math.floor(pair(32)))
        high = min(self.dims - 1, math.ceil(pair(1)))
        ramp = np.clip((np.arange(self.dims // 2) - low) / max(0.001, high - low), 0, 1)
        return (1 / (ramp / interpolated + (1 - ramp) / extrapolated)).astype(np.float32)


@dataclass(frozen=True, slots=True)
class Config:
    """What a file says about its model.

    layers     number of layers.
    sizes      name -> size, the names used in the architecture tables.
    args       fields of mlx-lm's ``ModelArgs``.
    rope       of the layers that see the whole context.
    rope_swa   of the sliding-window layers, if they differ.
    tied       the output head is the embedding.
    """

    architecture: Architecture
    layers: int
    sizes: dict[str, int]
    args: dict[str, Any]
    rope: Rope
    rope_swa: Rope | None
    tied: bool


def architecture(file: GGUFFile) -> Architecture:
    """The file's row of ``ARCHITECTURES``, or UnsupportedError naming it and those there are."""
    name = file.architecture
    if name not in ARCHITECTURES:
        raise UnsupportedError(
            f"{file.path}: architecture {name!r} is not supported; "
            f"supported are {', '.join(ARCHITECTURES)}"
        )
    return ARCHITECTURES[name]


class _Keys:
    """Typed look-ups under ``ARCH.``."""

    def __init__(self, file: GGUFFile) -> None:
        self.file = file
        self.name = file.architecture

    def __call__(self, key: str, kind: type[T], default: T | None = None) -> T:
        full = f"{self.name}.{key}"
        value = self.file.get(full, kind) if default is None else self.file.get(full, kind, default)
        if kind is float and not math.isfinite(value):
            raise GGUFError(self.file.path, f"{full} is {value}; expected a finite number")
        return value

    def has(self, key: str) -> bool:
        return f"{self.name}.{key}" in self.file.metadata

    def count(self, key: str, default: int | None = None) -> int:
        """A positive integer; an array with one value per layer must be uniform."""
        full = f"{self.name}.{key}"
        values = self.file.metadata.get(full)
        if isinstance(values, np.ndarray):
            if values.size == 0 or values.dtype.kind not in "iu":
                raise GGUFError(self.file.path, f"{full} is not a list of integers")
            if np.any(values != values[0]):
                raise UnsupportedError(f"{full} differs between layers: {_some(values)}")
            value = int(values[0])
        else:
            value = self(key, int, default)
        if not 0 < value < 2**31:
            raise GGUFError(self.file.path, f"{full} is {value}; expected a positive 32-bit number")
        return value

    def positive(self, key: str, default: float | None = None) -> float:
        value = self(key, float, default)
        if value <= 0:
            raise GGUFError(self.file.path, f"{self.name}.{key} is {value}; expected more than 0")
        return value


def _some(values: np.ndarray) -> str:
    return ", ".join(map(str, values[:8].tolist())) + (", ..." if values.size > 8 else "")


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
    key = _Keys(file)
    if key("expert_count", int, 0) and not arch.experts:
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
    layers = key.count("block_count")
    expert_args, expert_sizes = _experts(file, key) if arch.experts else ({}, {})
    ff = key.count("feed_forward_length", expert_sizes.get("expert_ff"))
    context = key.count("context_length")
    vocab = _vocab_size(file)
    rope = _rope(file, arch, key, head, context, context_length or context)
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
    if arch.name == "gpt-oss":
        args |= _gpt_oss(file, key, layers, expert_sizes["expert_ff"])
    rope_swa = None
    if arch.name in _LAYERS_27B:
        args |= _gemma(file, arch, key, head, layers)
        if arch.name == "gemma2":
            args["attn_logit_softcapping"] = key.positive("attn_logit_softcapping", 50.0)
            args["final_logit_softcapping"] = key.positive("final_logit_softcapping", 30.0)
            swa_base = key.positive("rope.freq_base_swa", rope.base)
            rope_swa = Rope(rope.dims, swa_base, rope.factor, rope.scale)
        else:
            if key("final_logit_softcapping", float, 0.0):
                raise UnsupportedError("gemma3 with a cap on its logits is not supported")
            # The rotary scaling of gemma3 is for its global layers alone.
            rope_swa = Rope(rope.dims, key.positive("rope.freq_base_swa", 10000.0))
            args["rope_local_base_freq"] = rope_swa.base
    sizes = {
        "vocab": vocab,
        "embd": embd,
        "ff": ff,
        "gate_up": 2 * ff,
        "head": head,
        "heads": heads,
        "kv_heads": kv_heads,
        "q": heads * head,
        "kv": kv_heads * head,
        "qkv": (heads + 2 * kv_heads) * head,
        **expert_sizes,
    }
    return Config(arch, layers, sizes, args, rope, rope_swa, tied)


def _experts(file: GGUFFile, key: _Keys) -> tuple[dict[str, Any], dict[str, int]]:
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
    if file.architecture == "qwen2moe":
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


def _gemma(
    file: GGUFFile, arch: Architecture, key: _Keys, head: int, layers: int
) -> dict[str, Any]:
    """Query scale and sliding window."""
    embd = key.count("embedding_length")
    heads = key.count("attention.head_count")
    gemma2 = arch.name == "gemma2"
    return {
        "query_pre_attn_scalar": embd // heads if layers == _LAYERS_27B[arch.name] else head,
        "sliding_window": key.count("attention.sliding_window", 4096 if gemma2 else None),
        "sliding_window_pattern": _window_period(file, key, layers, 2 if gemma2 else 6),
    }


def _gpt_oss(file: GGUFFile, key: _Keys, layers: int, expert_ff: int) -> dict[str, Any]:
    """Windows, of which mlx-lm needs a layer with and one without, and mlx-lm's own names."""
    period = _window_period(file, key, layers, 2)
    if period == 1:
        raise UnsupportedError("gpt-oss without a layer that has a sliding window")
    kinds = ("sliding_attention", "full_attention")
    return {
        "num_local_experts": key.count("expert_count"),
        "intermediate_size": expert_ff,
        "sliding_window": key.count("attention.sliding_window"),
        "layer_types": [kinds[i % period == period - 1] for i in range(layers)],
    }


def _window_period(file: GGUFFile, key: _Keys, layers: int, default: int) -> int:
    """The last of so many layers sees the whole context, the others a window."""
    pattern = file.metadata.get(f"{key.name}.attention.sliding_window_pattern")
    if isinstance(pattern, np.ndarray):
        period = _period(pattern, layers)
        if period is None:
            raise UnsupportedError("an irregular attention.sliding_window_pattern")
    else:
        period = key.count("attention.sliding_window_pattern", default)
    if period > layers:
        raise UnsupportedError(f"{layers} layers, none of which sees the whole context")
    return period


def _period(pattern: np.ndarray, layers: int) -> int | None:
    """The p for which layer i slides exactly if ``i % p < p - 1``, if there is one."""
    slides = pattern[:layers].astype(bool)
    if slides.size != layers or slides.all():
        return None
    period = int(np.argmin(slides)) + 1
    regular = np.arange(layers) % period < period - 1
    return period if np.array_equal(slides, regular) else None


def _rope(
    file: GGUFFile, arch: Architecture, key: _Keys, head: int, trained: int, used: int
) -> Rope:
    dims = key.count("rope.dimension_count", head)
    if dims % 2 or dims > head:
        raise GGUFError(file.path, f"{dims} rotary dimensions of a head of {head}")
    if dims != head and arch.name != "phi3":
        raise UnsupportedError(f"{arch.name} with rotary embedding on {dims} of {head} dimensions")
    base = key.positive("rope.freq_base", 10000.0)
    original = key.count("rope.scaling.original_context_length", trained)
    # llama.cpp's default type is linear, which a missing factor turns into none.
    kind = key("rope.scaling.type", str, "linear")
    factor = key("rope.scaling.factor", float, key("rope.scale_linear", float, 0.0)) or 1.0
    if factor <= 0:
        raise GGUFError(file.path, f"rope.scaling.factor is {factor}; expected more than 0")
    scale = key("rope.scaling.attn_factor", float, 1.0)
    if kind == "none" or (kind == "linear" and factor == 1.0):
        kind, factor = "none", 1.0
    factors = ""
    if "rope_freqs.weight" in file.tensors:
        kind = "llama3" if kind == "none" else f"{kind} with rope_freqs.weight"
        factors = "rope_freqs.weight"
    elif "rope_factors_long.weight" in file.tensors or "rope_factors_short.weight" in file.tensors:
        if kind in ("none", "longrope"):
            kind = "longrope"
        factors = f"rope_factors_{'long' if used > original else 'short'}.weight"
    elif kind == "longrope":
        raise GGUFError(file.path, "rope_factors_long.weight is missing for longrope scaling")
    if kind not in ("none", *arch.rope_types):
        raise UnsupportedError(
            f"rotary scaling {kind!r} is not supported for {arch.name}; "
            f"supported are {', '.join(arch.rope_types)}"
        )
    if factors:
        tensor = file.tensors.get(factors)
        if tensor is None:
            raise GGUFError(file.path, f"{factors} is missing")
        if tensor.shape != (dims // 2,):
            raise GGUFError(file.path, f"{factors} is {tensor.shape}; expected {(dims // 2,)}")
    if kind == "yarn":
        if base <= 1:
            raise GGUFError(file.path, f"rope.freq_base is {base}; expected more than 1 for YaRN")
        scale *= 1 + 0.1 * math.log(factor) if factor > 1 else 1.0
    return Rope(dims, base, factor, scale, factors, original if kind == "yarn" else 0)
