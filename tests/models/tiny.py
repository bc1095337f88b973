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
from dataclasses import dataclass
from pathlib import Path
from zlib import crc32

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, TokenType
from gguf.quants import dequantize, quantize

from mlxfuse.formats import BY_NAME
from tests.models.case import VOCABULARY, Case, shapes
from tests.models.cases import CASES

__all__ = ["CASES", "VOCABULARY", "Case"]
SEEDS = (0, 1, 2)
VECTORS = ("ssm_a", "ssm_d", "ssm_norm")  # of more than one axis in some files
VECTORS = ("ssm_a", "ssm_d", "ssm_norm")  # of more than one axis in some files
BOS, EOS, MERGED = 256, 257, 258


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


# How far the weights of random blocks deviate from 0 where the blocks' scales are 1.
_DEVIATION = {
    **{"Q2_K": 13.0, "Q3_K": 43.0, "IQ4_XS": 1240.0, "TQ2_0": 1.2, "NVFP4": 2.9},
    **{"IQ1_S": 7.2, "IQ1_M": 7.2, "IQ2_XXS": 53.0, "IQ2_XS": 56.0, "IQ2_S": 56.0},
    **{"IQ3_XXS": 143.0, "IQ3_S": 140.0},
}


def _scaled_blocks(
    random: np.random.RandomState, kind: str, blocks: int, gain: float
) -> np.ndarray:
    format = BY_NAME[kind]
    packed = random.randint(0, 256, (blocks, format.type_size), dtype=np.uint8)
    scale = np.array([gain / _DEVIATION[kind]], np.float16)
    for at in format.float16:
        packed[:, at : at + 2] = scale.view(np.uint8)
    if kind == "IQ1_M":  # four bits of the scale above each word of the others
        for i, at in enumerate((49, 51, 53, 55)):
            packed[:, at] = packed[:, at] & 15 | int(scale.view(np.uint16)[0]) >> 4 * i << 4 & 0xF0
    if kind == "NVFP4":  # floats of 4 bits of the exponent, whose bias is 7, and 3 of the mantissa
        exponent = 7 + math.frexp(gain / _DEVIATION[kind])[1]
        packed[:, :4] = exponent << 3 | random.randint(0, 8, (blocks, 4))
    return packed


def blocks(random: np.random.RandomState, kind: str, shape: tuple[int, ...]) -> np.ndarray:
    """Random valid rows of about unit gain: uint8 [..., rows, packed bytes].

    gguf-py cannot quantise to these types, and another quantiser's search may round differently
    from one machine to the next.
    """
    columns = shape[-1]
    blocks = math.prod(shape) // BY_NAME[kind].block_size
    gain = columns**-0.5
    if kind in _DEVIATION:
        packed = _scaled_blocks(random, kind, blocks, gain)
    elif kind == "MXFP4":  # exponent, 16 bytes of codes, whose values are 2.9 on average
        packed = random.randint(0, 256, (blocks, 17), dtype=np.uint8)
        packed[:, 0] = 126 + math.frexp(gain / 2.9)[1] + random.randint(0, 2, blocks)
    elif kind == "IQ4_NL":  # d, 16 bytes of codes, whose values deviate by 69
        packed = random.randint(0, 256, (blocks, 18), dtype=np.uint8)
        packed[:, :2] = np.array([gain / 69], np.float16).view(np.uint8)
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


def build(name: str, seed: int, case: Case | None = None) -> Tiny:
    """The model `name` of CASES, or of a case, from `seed`: the same bits on any machine."""
    case = case or CASES[name]
    random = np.random.RandomState(crc32(name.encode()) ^ seed)
    tensors: dict[str, tuple[np.ndarray, str]] = {}
    formats = case.formats_of(seed)
    for full, shape in shapes(case):
        vector = full.split(".", 2)[-1].removesuffix(".weight")
        short = full.removesuffix(".weight").removesuffix(".bias").split(".")[-1]
        if short.startswith("rope_"):
            factors = random.uniform(1, 6, shape).astype(np.float32)
            factors[len(factors) - case.unrotated :] = 1e30
            tensors[full] = factors, "F32"
        elif (
            full.endswith(".bias")
            or short in VECTORS
            or short in VECTORS
            or (len(shape) == 1 and short != "ffn_gate_inp_shexp")
        ):
            # gpt-oss clips gate and up at 7.
            wide = 9 if short in ("ffn_gate_exps", "ffn_up_exps") else 1.5
            low, high = (-wide, wide) if full.endswith(".bias") else (0.2, 2.2)
            low, high = case.ranges.get(vector, (low, high))
            tensors[full] = random.uniform(low, high, shape).astype(np.float32), "F32"
        else:
            router = short.startswith(("ffn_gate_inp", "ssm_conv1d"))
            usual = formats.get(short, formats[""])
            kind = "F32" if router else formats.get(full.removesuffix(".weight"), usual)
            if kind in ("Q4_K", "Q6_K", "MXFP4", "IQ4_NL", *_DEVIATION):
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
        f"attention.layer_norm_{'' if case.layer_norm else 'rms_'}epsilon": 1e-5,
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
    found = (keys | dict(case.keys)).items()
    own = {f"{case.arch}.{key}": value for key, value in found if value is not None}
    return own | dict(case.others)


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
        elif isinstance(value, bool):
            writer.add_bool(key, value)
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
