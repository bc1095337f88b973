"""What a GGUF file's header tells: no weight is read and MLX is not imported."""

from __future__ import annotations

import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from math import prod
from pathlib import Path
from typing import Any

from ..errors import GGUFError, UnsupportedError
from ..gguf.exported import open_model
from ..gguf.reader import GGUFFile, Tensor
from ..memory import budget
from ..models import ARCHITECTURES
from ..models.config import read_config
from ..models.plan import plan
from ..terminal import one_line
from ..tokenizer.vocab import read_vocab
from .needs import Needs, blocks, needs

# Tensors that one kernel can compute together: the group's name -> its members, in order.
GROUPS: dict[str, tuple[str, ...]] = {
    "q|k|v": ("attn_q", "attn_k", "attn_v"),
    "gate|up": ("ffn_gate", "ffn_up"),
    "experts gate|up": ("ffn_gate_exps", "ffn_up_exps"),
    "shared gate|up": ("ffn_gate_shexp", "ffn_up_shexp"),
    "delta net input": ("attn_qkv", "attn_gate", "ssm_beta", "ssm_alpha"),
}
# Tensors that llama.cpp's converters already store as one.
WHOLE = {"attn_qkv": "q|k|v", "ffn_up": "gate|up", "ffn_gate_up_exps": "experts gate|up"}

_LAYER_WEIGHT = re.compile(r"blk\.(\d{1,6})\.(\w+)\.weight")


def inspect(path: Path) -> dict[str, Any]:
    """The header of ``path`` as plain data, ready for JSON. Sizes are in bytes.

    ``fusion`` holds, for each group of tensors, its layers by the formats of its members:
    ``equal`` (one format), ``mixed`` (a format a member, still one kernel), ``stored as one``.

    Raises:
        GGUFError: the file is malformed.
        UnsupportedError: it has a tensor type that is not known.
        ModelRefError: there is no such file.
    """
    with open_model(path) as file:
        architecture = file.architecture
        layers, ahead = blocks(file)
        wanted = needs(file)
        ignored = {"blocks": ahead, "bytes": wanted.ignored}
        context = file.get(f"{architecture}.context_length", int, default=0)
        types = _types(file)
        unsupported = _unsupported(file)
        return {
            "file": str(file.path),
            "shards": len(file.paths),
            "size": file.size,
            "gguf_version": file.version,
            "architecture": architecture,
            "supported": not unsupported,
            "name": file.get("general.name", str, default=""),
            "parameters": sum(prod(t.shape) for t in file.tensors.values()),
            "layers": layers,
            "context_length": context,
            "tokenizer": {
                "model": file.get("tokenizer.ggml.model", str, default=""),
                "pre": file.get("tokenizer.ggml.pre", str, default=""),
                "tokens": len(file.get("tokenizer.ggml.tokens", list, default=[])),
            },
            "chat_template": bool(file.get("tokenizer.chat_template", str, default="")),
            "tensor_types": types,
            "fusion": _fusion(file),
            "memory": _memory(wanted, context),
            **({"ignored": ignored} if ahead else {}),
            "unsupported": unsupported,
        }


def _unsupported(file: GGUFFile) -> list[str]:
    """Why ``load`` would refuse the file, as far as the header tells; empty if it would not."""
    if file.architecture not in ARCHITECTURES:
        known = ", ".join(sorted(ARCHITECTURES))
        return [f"architecture {file.architecture}; supported: {known}"]
    checks: tuple[Callable[[], object], ...] = (
        lambda: plan(file, read_config(file)),
        lambda: read_vocab(file.metadata, file.path),
    )
    reasons = []
    for check in checks:
        try:
            check()
        except (GGUFError, UnsupportedError) as error:
            reasons.append(str(error).removeprefix(f"{file.path}: "))
    return reasons


def _memory(wanted: Needs, context: int) -> dict[str, int]:
    """Bytes in memory, and read for each token; the cache is that of the whole context.

    ``budget``: what this machine has for them; ``longest_context``: tokens with which they fit;
    ``streamed``: what is dequantised for each token, where there are no kernels.
    """
    here, held, streamed = budget(), wanted, 0
    if sys.platform != "darwin":
        held, streamed = wanted.without_kernels(here)
    return {
        "weights": wanted.weights,
        "cache": wanted.cache(context),
        "active": wanted.active,
        "budget": here,
        "streamed": streamed,
        "longest_context": min(held.longest(here), context or 1 << 32),
    }


def _types(file: GGUFFile) -> list[dict[str, Any]]:
    """Tensor types by the bytes they take, largest first."""
    counts: dict[str, int] = defaultdict(int)
    sizes: dict[str, int] = defaultdict(int)
    for tensor in file.tensors.values():
        counts[tensor.format.name] += 1
        sizes[tensor.format.name] += tensor.nbytes
    formats = {tensor.format.name: tensor.format for tensor in file.tensors.values()}
    return [
        {
            "type": name,
            "tensors": counts[name],
            "bytes": sizes[name],
            "kernel": formats[name].kernel,
        }
        for name in sorted(sizes, key=lambda n: (-sizes[n], n))
    ]


def _fusion(file: GGUFFile) -> dict[str, list[dict[str, Any]]]:
    weights: dict[int, dict[str, Tensor]] = defaultdict(dict)
    for tensor in file.tensors.values():
        if match := _LAYER_WEIGHT.fullmatch(tensor.name):
            weights[int(match[1])][match[2]] = tensor
    # Some architectures give a list, one length a layer; none of those stores gate|up as one.
    length = file.metadata.get(f"{file.architecture}.feed_forward_length")
    hidden = length if isinstance(length, int) else None
    found: dict[str, dict[tuple[str, tuple[str, ...]], list[int]]] = {}
    for layer in sorted(weights):
        for group, formats, kind in _groups(weights[layer], hidden):
            found.setdefault(group, defaultdict(list))[kind, formats].append(layer)
    return {
        group: [
            {"kind": kind, "types": list(formats), "layers": layers}
            for (kind, formats), layers in kinds.items()
        ]
        for group, kinds in found.items()
    }


def _groups(
    layer: Mapping[str, Tensor], hidden: int | None
) -> Iterable[tuple[str, tuple[str, ...], str]]:
    """(group, formats, kind) for what one layer's tensors allow."""
    for group, members in GROUPS.items():
        if all(member in layer for member in members):
            formats = tuple(layer[member].format.name for member in members)
            yield group, formats, "equal" if len(set(formats)) == 1 else "mixed"
    recurrent = "ssm_out" in layer
    for name, group in WHOLE.items():
        if name == "attn_qkv" and recurrent:  # it is no q, k and v
            continue
        # An ffn_up of its usual height is a plain MLP's, which has no gate.
        if name in layer and (name != "ffn_up" or layer[name].shape[0] == 2 * (hidden or -1)):
            yield group, (layer[name].format.name,), "stored as one"


def render(summary: Mapping[str, Any]) -> str:
    """``inspect``'s result for people, safe to print on a terminal."""
    tokenizer = summary["tokenizer"]
    kind = "/".join(one_line(tokenizer[k], 40) for k in ("model", "pre") if tokenizer[k])
    support = "yes" if summary["supported"] else "no, see below"
    rows = [
        ("file", one_line(summary["file"], 1000)),
        ("name", one_line(summary["name"]) or "-"),
        ("architecture", one_line(summary["architecture"], 60)),
        ("supported", support),
        ("size", f"{_bytes(summary['size'])} in {summary['shards']} file(s)"),
        ("parameters", f"{summary['parameters']:,} in {summary['layers']} layers"),
        ("context", f"{summary['context_length']:,} tokens"),
        ("tokenizer", f"{kind or '-'}, {tokenizer['tokens']:,} tokens"),
        ("memory", _spoken(summary["memory"])),
        ("this machine", _here(summary["memory"], summary["context_length"])),
        ("chat template", "yes" if summary["chat_template"] else "no"),
    ]
    lines = [f"{label:<14}{value}" for label, value in rows]
    lines += ["", f"{'type':<10}{'tensors':>8}{'size':>12}  runs"]
    for row in summary["tensor_types"]:
        how = "in a fused kernel on Metal" if row["kernel"] else "dequantised"
        how = "as it is" if row["type"] in ("F32", "F16", "BF16") else how
        lines.append(f"{row['type']:<10}{row['tensors']:>8}{_bytes(row['bytes']):>12}  {how}")
    if summary["fusion"]:
        lines += ["", f"{'together':<17}{'types':<24}{'layers'}"]
    for group, kinds in summary["fusion"].items():
        for entry in kinds:
            types = entry["types"] if entry["kind"] == "mixed" else entry["types"][:1]
            note = " (stored as one)" if entry["kind"] == "stored as one" else ""
            lines.append(f"{group:<17}{'|'.join(types) + note:<24}{_ranges(entry['layers'])}")
    if ahead := summary.get("ignored"):
        count = f"{ahead['blocks']} block{'s' * (ahead['blocks'] > 1)}"
        predicts = "predict" if ahead["blocks"] > 1 else "predicts"
        size = _bytes(ahead["bytes"])
        lines += ["", f"{count} that {predicts} tokens after the next, {size}: not used"]
    lines += [f"\nnot supported: {one_line(reason, 1000)}" for reason in summary["unsupported"]]
    return "\n".join(lines)


def _spoken(memory: Mapping[str, int]) -> str:
    weights, cache, active = (_bytes(memory[k]) for k in ("weights", "cache", "active"))
    return f"{weights} and a cache of up to {cache}; {active} read for each token"


def _here(memory: Mapping[str, int], context: int) -> str:
    longest, budget = memory["longest_context"], _bytes(memory["budget"])
    if not longest:
        return f"does not fit in about {budget}"
    tokens = "its whole context" if longest == context else f"{longest:,} tokens"
    slow = f", {_bytes(memory['streamed'])} dequantised for each: very slow"
    return f"fits with {tokens} in about {budget}{slow if memory['streamed'] else ''}"


def _bytes(count: int) -> str:
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count} B"


def _ranges(numbers: list[int]) -> str:
    """[0, 1, 2, 5] -> 0-2, 5"""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
