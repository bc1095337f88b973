"""Tiny random GGUF files, one recipe (`CASES`) for each thing an architecture can do differently.

A recipe and a seed give the same bytes on every machine: the numbers come from the frozen
`numpy.random.RandomState` stream and no libm function is used. `write` puts the file on disk,
`write(..., twin=True)` its F32 twin: the dequantised weights stored as F32, which llama.cpp
evaluates in float32 where it would round the activations of a quantised file to int8.

Weights have unit gain, so logits have a standard deviation above 1: with the customary 0.02
attention is uniform, the embedding decides, and a wrong rope layout or window goes unnoticed.
"""

import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from zlib import crc32

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, TokenType
from gguf.quants import dequantize, quantize

from tests.models import gemma4_shapes, qwen35_shapes

SEEDS = (0, 1, 2)
BOS, EOS, MERGED = 256, 257, 258
VOCABULARY = 259  # 256 bytes, two control tokens, one merge: the least llama.cpp accepts

QKV = ("attn_q", "attn_k", "attn_v")
Q4_MIX = {"": "Q4_0", "attn_v": "Q8_0", "ffn_down": "Q5_0", "token_embd": "Q8_0"}
K_MIX = {"": "Q4_K", "attn_v": "Q6_K", "ffn_down": "Q6_K", "token_embd": "Q6_K"}


@dataclass(frozen=True)
class Case:
    """One model. `keys` are metadata under the architecture's prefix and override the usual ones.

    `formats` maps a tensor's short name (`attn_q`) to a GGUF type, "" being the default; vectors
    and routers are always F32. `prompt` is a number of tokens. With `experts`, the MLP is that many
    experts of `expert_ffn`, of which each token uses `used`, beside a shared one of `shared_ffn`.
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
    post_norms: bool = False
    post_attention_norm: bool = False  # in the place of ffn_norm
    sinks: bool = False
    experts: int = 0
    used: int = 0
    expert_ffn: int = 0
    shared_ffn: int = 0
    k_is_v: bool = False  # gemma4 without attn_v where there is no window
    unused_kv: bool = False  # gemma4's layers that share keys and values have tensors for own ones
    factors: Mapping[str, int] = field(default_factory=dict)  # rope factor tensor -> length
    keys: Mapping[str, object] = field(default_factory=dict)
    formats: Mapping[str, str] = field(default_factory=lambda: {"": "F32"})


# Caps and rope bases are smaller than in released models, so that 24 tokens of random weights
# feel them.
GEMMA2 = {
    "attention.sliding_window": 6,
    "attn_logit_softcapping": 4.0,
    "final_logit_softcapping": 4.0,
}
GEMMA3 = {"attention.sliding_window": 6, "rope.freq_base": 100.0}
YARN = {
    "rope.scaling.type": "yarn",
    "rope.scaling.factor": 4.0,
    "rope.scaling.original_context_length": 64,
}
PHI3 = {"rope.scaling.attn_factor": 1.25, "rope.dimension_count": 12}
LONGROPE = {"rope_factors_long": 6, "rope_factors_short": 6}
EXPERT_BIASES = tuple(f"ffn_{name}" for name in ("gate_inp", "gate_exps", "up_exps", "down_exps"))
EXPERT_Q4 = {"": "Q4_0", "attn_v": "Q8_0", "ffn_down_exps": "Q5_0", "token_embd": "Q8_0"}

GEMMA4 = {
    "attention.sliding_window": 6,
    "attention.shared_kv_layers": 0,
    "attention.key_length": 32,
    "attention.value_length": 32,
    "attention.key_length_swa": 16,
    "attention.value_length_swa": 16,
    "embedding_length_per_layer_input": 0,
    "rope.dimension_count": 32,
    "rope.dimension_count_swa": 16,
    "rope.freq_base": 100.0,
    "rope.freq_base_swa": 30.0,
    "final_logit_softcapping": 4.0,
}
# Heads of 16, of which 8 are rotated; two value heads for each key head.
QWEN35 = {
    "full_attention_interval": 2,
    "rope.dimension_count": 8,
    "rope.dimension_sections": [2, 1, 1, 0],
    "ssm.conv_kernel": 4,
    "ssm.state_size": 16,
    "ssm.group_count": 2,
    "ssm.time_step_rank": 6,
    "ssm.inner_size": 96,
}
# K-quants, whose blocks of 256 hold the columns of several heads.
QWEN35_LARGE = {
    **QWEN35,
    "rope.dimension_count": 32,
    "ssm.state_size": 64,
    "ssm.time_step_rank": 4,
    "ssm.inner_size": 256,
}

CASES: dict[str, Case] = {
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
    "gemma2": Case(
        "gemma2",
        layers=4,
        hidden=96,
        head_dim=32,
        post_norms=True,
        keys=GEMMA2,
        formats=Q4_MIX,
    ),
    "gemma2-pattern": Case(
        "gemma2",
        layers=4,
        post_norms=True,
        keys={**GEMMA2, "attention.sliding_window_pattern": 3},
    ),
    # 46 and 62 layers are how llama.cpp knows the 27B models, whose query scale differs.
    "gemma2-27b": Case(
        "gemma2",
        layers=46,
        hidden=48,
        heads=2,
        kv_heads=1,
        ffn=32,
        post_norms=True,
        keys=GEMMA2,
    ),
    # No pattern key, as in released files: five sliding layers to one global.
    "gemma3": Case(
        "gemma3",
        layers=7,
        hidden=96,
        head_dim=32,
        head_norms=True,
        post_norms=True,
        keys=GEMMA3,
        formats={"": "Q8_0"},
    ),
    "gemma3-rope-linear": Case(
        "gemma3",
        layers=5,
        hidden=96,
        head_norms=True,
        post_norms=True,
        keys={
            **GEMMA3,
            "attention.sliding_window_pattern": [True, True, False, True, True],
            "rope.freq_base_swa": 30.0,
            "rope.scaling.type": "linear",
            "rope.scaling.factor": 8.0,
        },
    ),
    "gemma3-27b": Case(
        "gemma3",
        layers=62,
        hidden=48,
        heads=2,
        kv_heads=1,
        ffn=32,
        head_norms=True,
        post_norms=True,
        keys=GEMMA3,
    ),
    # llama.cpp takes the long factors when the context exceeds the original one, and ignores
    # phi3's sliding window.
    "phi3": Case(
        "phi3",
        hidden=64,
        fused_qkv=True,
        fused_gate=True,
        untied=True,
        factors=LONGROPE,
        keys={
            **PHI3,
            "rope.scaling.original_context_length": 512,
            "attention.sliding_window": 6,
            "context_length": 1024,
        },
        formats=Q4_MIX,
    ),
    "phi3-long": Case(
        "phi3",
        fused_qkv=True,
        fused_gate=True,
        untied=True,
        factors=LONGROPE,
        keys={**PHI3, "rope.scaling.original_context_length": 8, "context_length": 512},
    ),
    "phi3-separate-qkv": Case("phi3", fused_gate=True, formats={"": "BF16"}),
    "phi3-4k": Case(
        "phi3", fused_qkv=True, fused_gate=True, untied=True, keys={"context_length": 4096}
    ),
    # 24 tokens of 3 experts: mlx-lm sorts from 64 rows on.
    "qwen3moe": Case(
        "qwen3moe",
        head_norms=True,
        head_dim=32,
        experts=6,
        used=3,
        expert_ffn=32,
        formats=EXPERT_Q4,
    ),
    "qwen3moe-k-quants": Case(
        "qwen3moe",
        layers=2,
        hidden=256,
        heads=8,
        head_dim=32,
        head_norms=True,
        fused_qkv=True,
        untied=True,
        experts=4,
        used=2,
        expert_ffn=256,
        formats={"": "Q4_K", "ffn_up_exps": "Q6_K", "token_embd": "Q6_K"},
    ),
    "qwen2moe": Case(
        "qwen2moe",
        biases=QKV,
        untied=True,
        experts=6,
        used=3,
        expert_ffn=32,
        shared_ffn=64,
        formats={"": "Q8_0"},
    ),
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
    # The 31B's form.
    "gemma4": Case(
        "gemma4",
        layers=4,
        k_is_v=True,
        keys={
            **GEMMA4,
            "attention.sliding_window_pattern": [True, True, False, True],
            "attention.head_count_kv": [2, 2, 1, 2],
        },
        formats=Q4_MIX,
    ),
    # The E4B's, with the tensors that nothing reads; the E2B's, with MLPs of two widths.
    "gemma4-e4b": Case(
        "gemma4",
        layers=6,
        unused_kv=True,
        keys={
            **GEMMA4,
            "attention.shared_kv_layers": 2,
            "attention.sliding_window_pattern": [True, True, True, False, True, False],
            "embedding_length_per_layer_input": 32,
        },
        formats={"": "Q8_0"},
    ),
    "gemma4-e2b": Case(
        "gemma4",
        layers=5,
        kv_heads=1,
        keys={
            **GEMMA4,
            "attention.shared_kv_layers": 2,
            "attention.sliding_window_pattern": [True, True, False, True, False],
            "embedding_length_per_layer_input": 32,
            "feed_forward_length": [64, 64, 64, 128, 128],
        },
    ),
    "gemma4-a4b": Case(
        "gemma4",
        layers=3,
        k_is_v=True,
        experts=4,
        used=2,
        expert_ffn=32,
        fused_gate=True,
        keys={
            **GEMMA4,
            "attention.sliding_window_pattern": [True, True, False],
            "attention.head_count_kv": [2, 2, 1],
        },
        formats={**EXPERT_Q4, "ffn_gate_up_exps": "Q8_0"},
    ),
    "qwen35": Case("qwen35", layers=4, keys=QWEN35, formats={**Q4_MIX, "ssm_alpha": "F32"}),
    "qwen35-k-quants": Case(
        "qwen35",
        layers=5,
        hidden=256,
        head_dim=64,
        ffn=256,
        untied=True,
        fused_qkv=True,
        keys={**QWEN35_LARGE, "nextn_predict_layers": 1},
        formats=K_MIX,
    ),
    "qwen35moe": Case(
        "qwen35moe",
        layers=3,
        experts=6,
        used=3,
        expert_ffn=32,
        shared_ffn=64,
        fused_gate=True,
        keys={**QWEN35, "full_attention_interval": 3},
        formats=EXPERT_Q4,
    ),
}


@dataclass
class Tiny:
    """A model in memory. Tests change `metadata` or `tensors` to make negative controls.

    `metadata` holds full keys; `tensors` maps a name to (float32 array or packed rows, type name).
    """

    case: Case
    metadata: dict[str, object]
    tensors: dict[str, tuple[np.ndarray, str]]
    prompt: np.ndarray

    def weights(self, name: str) -> np.ndarray:
        """The values the file means, as float32 (ne order reversed: rows first)."""
        data, kind = self.tensors[name]
        if kind == "F32":
            return data
        return dequantize(data, GGMLQuantizationType[kind]).astype(np.float32)

    def digest(self) -> str:
        """SHA-256 over every weight: tells a changed generator from a wrong model."""
        digest = hashlib.sha256(repr(sorted(self.metadata.items())).encode())
        for name in sorted(self.tensors):
            digest.update(name.encode() + self.weights(name).tobytes())
        return digest.hexdigest()


def _shapes(case: Case) -> Iterator[tuple[str, tuple[int, ...]]]:
    if case.arch == "gemma4":
        yield from gemma4_shapes.shapes(case, VOCABULARY)
        return
    hidden, ffn = case.hidden, case.ffn
    if case.arch.startswith("qwen35"):
        mlp = {"ffn_gate": (ffn, hidden), "ffn_up": (ffn, hidden), "ffn_down": (hidden, ffn)}
        mlp = expert_shapes(case) if case.experts else mlp
        yield from qwen35_shapes.shapes(case, VOCABULARY, mlp)
        return
    q, kv = case.heads * case.head_dim, case.kv_heads * case.head_dim
    yield "token_embd.weight", (VOCABULARY, hidden)
    yield "output_norm.weight", (hidden,)
    if case.untied:
        yield "output.weight", (VOCABULARY, hidden)
    for name, length in case.factors.items():
        yield f"{name}.weight", (length,)
    rows = {"attn_q": q, "attn_k": kv, "attn_v": kv, "attn_qkv": q + 2 * kv}
    matrices: dict[str, tuple[int, ...]] = {
        name: (rows[name], hidden) for name in (("attn_qkv",) if case.fused_qkv else QKV)
    }
    matrices["attn_output"] = (hidden, q)
    if case.experts:
        matrices |= expert_shapes(case)
    else:
        if not case.fused_gate:
            matrices["ffn_gate"] = (ffn, hidden)
        matrices["ffn_up"] = (ffn * (2 if case.fused_gate else 1), hidden)
        matrices["ffn_down"] = (hidden, ffn)
    second = "post_attention_norm" if case.post_attention_norm else "ffn_norm"
    norms = {"attn_norm": hidden, second: hidden}
    if case.head_norms:
        norms |= {"attn_q_norm": case.head_dim, "attn_k_norm": case.head_dim}
    if case.post_norms:
        norms |= {"post_attention_norm": hidden, "post_ffw_norm": hidden}
    for layer in range(case.layers):
        for name, shape in matrices.items():
            yield f"blk.{layer}.{name}.weight", shape
        for name in case.biases:  # fused weights may have separate biases
            shape = matrices[name][:-1] if name in matrices else (rows[name],)
            yield f"blk.{layer}.{name}.bias", shape
        for name, length in norms.items():
            yield f"blk.{layer}.{name}.weight", (length,)
        if case.sinks:
            yield f"blk.{layer}.attn_sinks.weight", (case.heads,)


def expert_shapes(case: Case) -> dict[str, tuple[int, ...]]:
    hidden, experts, width, shared = case.hidden, case.experts, case.expert_ffn, case.shared_ffn
    shapes: dict[str, tuple[int, ...]] = {"ffn_gate_inp": (experts, hidden)}
    if case.fused_gate:
        shapes["ffn_gate_up_exps"] = (experts, 2 * width, hidden)
    else:
        shapes |= dict.fromkeys(("ffn_gate_exps", "ffn_up_exps"), (experts, width, hidden))
    shapes["ffn_down_exps"] = (experts, hidden, width)
    if shared:
        shapes |= {
            "ffn_gate_inp_shexp": (hidden,),
            "ffn_gate_shexp": (shared, hidden),
            "ffn_up_shexp": (shared, hidden),
            "ffn_down_shexp": (hidden, shared),
        }
    return shapes


def blocks(random: np.random.RandomState, kind: str, shape: tuple[int, ...]) -> np.ndarray:
    """Random valid rows of about unit gain: uint8 [..., rows, packed bytes].

    gguf-py cannot quantise to these types, and another quantiser's search may round differently
    from one machine to the next.
    """
    columns = shape[-1]
    blocks = math.prod(shape) // (32 if kind == "MXFP4" else 256)
    gain = columns**-0.5
    if kind == "MXFP4":  # exponent, 16 bytes of codes, whose values are 2.9 on average
        packed = random.randint(0, 256, (blocks, 17), dtype=np.uint8)
        packed[:, 0] = 126 + math.frexp(gain / 2.9)[1] + random.randint(0, 2, blocks)
    elif kind == "Q4_K":  # d, dmin, 12 bytes of 6-bit scales and minima, 128 bytes of codes
        packed = random.randint(0, 256, (blocks, 144), dtype=np.uint8)
        # weight = d * scale * code - dmin * minimum; code averages 7.5, so dmin = 7.5 d centres it
        packed[:, :4] = np.array([gain / 260, 7.5 * gain / 260], np.float16).view(np.uint8)
    elif kind == "Q6_K":  # low bits, high bits, 16 int8 scales, d
        packed = random.randint(0, 256, (blocks, 210), dtype=np.uint8)
        packed[:, 192:208] = random.randint(-60, 61, (blocks, 16)).astype(np.int8).view(np.uint8)
        packed[:, 208:] = np.array([gain / 650], np.float16).view(np.uint8)
    else:
        raise ValueError(f"no random blocks for {kind}")
    return packed.reshape(*shape[:-1], -1)


def build(name: str, seed: int) -> Tiny:
    """The model `name` of CASES from `seed`: same seed, same bits, on any machine."""
    case = CASES[name]
    random = np.random.RandomState(crc32(name.encode()) ^ seed)
    tensors: dict[str, tuple[np.ndarray, str]] = {}
    for full, shape in _shapes(case):
        short, suffix = full.removesuffix(".weight").removesuffix(".bias").split(".")[-1], full
        if short.startswith("rope_"):
            factors = random.uniform(1, 6, shape).astype(np.float32)
            if case.arch == "gemma4":
                factors[shape[0] // 4 :] = 1e30  # not rotated
            tensors[full] = factors, "F32"
        elif suffix.endswith(".bias") or (len(shape) == 1 and short != "ffn_gate_inp_shexp"):
            # gpt-oss clips gate and up at 7.
            wide = 9 if short in ("ffn_gate_exps", "ffn_up_exps") else 1.5
            low, high = (-wide, wide) if suffix.endswith(".bias") else (0.2, 2.2)
            # Gemma 4 has no other factors: it divides the router's by the root of the width, and
            # not the scores by the root of a head's.
            if suffix.endswith("ffn_gate_inp.scale"):
                low, high = 1.6, 17.6
            elif case.arch == "gemma4" and short == "attn_q_norm":
                low, high = 0.05, 0.55
            if short == "ssm_a":  # -exp(A_log)
                low, high = -2.0, -0.2
            tensors[full] = random.uniform(low, high, shape).astype(np.float32), "F32"
        else:
            router = short.startswith(("ffn_gate_inp", "ssm_conv1d"))
            kind = "F32" if router else case.formats.get(short, case.formats[""])
            if kind in ("Q4_K", "Q6_K", "MXFP4"):
                tensors[full] = blocks(random, kind, shape), kind
                continue
            # Uniform of standard deviation gain / sqrt(columns); sharper attention than 1.
            gain = 1.4 if short in ("attn_q", "attn_k", "attn_qkv", "token_embd", "output") else 1.0
            bound = gain * (3 / shape[-1]) ** 0.5
            values = random.uniform(-bound, bound, shape).astype(np.float32)
            if kind != "F32":
                values = quantize(values, GGMLQuantizationType[kind])
            tensors[full] = values, kind
    prompt = random.randint(0, 256, case.prompt).astype(np.int32)
    return Tiny(case, _metadata(case), tensors, prompt)


def _metadata(case: Case) -> dict[str, object]:
    keys: dict[str, object] = {
        "context_length": 256,
        "embedding_length": case.hidden,
        "block_count": case.layers,
        "feed_forward_length": case.ffn,
        "attention.head_count": case.heads,
        "attention.head_count_kv": case.kv_heads,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.freq_base": 10000.0,
        "rope.dimension_count": case.head_dim,
    }
    if case.experts:
        keys |= {
            "expert_count": case.experts,
            "expert_used_count": case.used,
            "expert_feed_forward_length": case.expert_ffn,
        }
    if case.shared_ffn:
        keys["expert_shared_feed_forward_length"] = case.shared_ffn
    if case.head_dim != case.hidden // case.heads:
        keys |= {"attention.key_length": case.head_dim, "attention.value_length": case.head_dim}
    return {f"{case.arch}.{key}": value for key, value in (keys | dict(case.keys)).items()}


def byte_tokens() -> list[str]:
    """GPT-2's printable stand-in for every byte: itself, or the next character after U+0100."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spare = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(spare)) for byte in range(256)]


def write(path: Path, tiny: Tiny, *, twin: bool = False) -> Path:
    """Write `tiny` as a GGUF file, or its F32 twin, with the minimal vocabulary; returns `path`."""
    writer = GGUFWriter(path, tiny.case.arch)
    for key, value in tiny.metadata.items():
        if isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, list):
            writer.add_array(key, value)
        else:
            raise TypeError(f"{key}: no GGUF type chosen for {type(value).__name__}")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([*byte_tokens(), "<|bos|>", "<|eos|>", "ab"])
    kinds = [TokenType.NORMAL] * 256 + [TokenType.CONTROL] * 2 + [TokenType.NORMAL]
    writer.add_token_types(kinds)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(BOS)
    writer.add_eos_token_id(EOS)
    writer.add_add_bos_token(False)
    for name, (data, kind) in tiny.tensors.items():
        if twin or kind == "F32":
            writer.add_tensor(name, np.ascontiguousarray(tiny.weights(name)))
        else:
            writer.add_tensor(name, data, raw_dtype=GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
