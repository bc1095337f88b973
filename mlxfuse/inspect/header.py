"""What a GGUF file's header tells: no weight is read and MLX is not imported."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

from ..errors import GGUFError, UnsupportedError
from ..gguf.exported import open_model
from ..gguf.reader import GGUFFile
from ..memory import Machine, machine
from ..models import ARCHITECTURES
from ..models.config import read_config
from ..models.nearest import missing, nearest
from ..models.plan import Plan, WeightPlan, plan
from ..terminal import one_line
from ..tokenizer.vocab import read_vocab
from .needs import PLAIN, KVBits, Needs, blocks, needs

# What the groups of the architectures' tables are called here; others by their own name.
TITLES = {
    "qkv": "q|k|v",
    "gate_up": "gate|up",
    "experts_gate_up": "experts gate|up",
    "shared_gate_up": "shared gate|up",
    "in_proj": "delta net input",
}

_NOTES = {"stored as one": " (stored as one)", "apart": " (not one kernel)"}
_TEMPLATE = "tokenizer.chat_template"


def inspect(path: Path, context: int = 0, bits: KVBits = PLAIN) -> dict[str, Any]:
    """The header of ``path`` as plain data, ready for JSON. Sizes are in bytes.

    Args:
        context: tokens it is to be used with, by default all it was made for.
        bits: how keys and values are to be kept.

    ``fusion`` holds, for each group of tensors, its layers by the formats of its members:
    ``equal`` (one format), ``mixed`` (a format a member, still one kernel), ``stored as one``, or
    ``apart`` (a member's format has no kernel).

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
        trained = file.get(f"{architecture}.context_length", int, default=0)
        types = _types(file)
        planned, unsupported = _planned(file)
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
            "context_length": trained,
            "tokenizer": {
                "model": file.get("tokenizer.ggml.model", str, default=""),
                "pre": file.get("tokenizer.ggml.pre", str, default=""),
                "tokens": len(file.get("tokenizer.ggml.tokens", list, default=[])),
            },
            "chat_template": any(key.startswith(_TEMPLATE) for key in file.metadata),
            "tensor_types": types,
            "fusion": _fusion(planned.layers if planned else ()),
            "memory": fit(wanted, machine(), context, trained, bits),
            **({"ignored": ignored} if ahead else {}),
            "unsupported": unsupported,
        }


def _planned(file: GGUFFile) -> tuple[Plan | None, list[str]]:
    """What of the file goes where; and why ``load`` would refuse it, as far as the header tells,
    empty if it would not."""
    if file.architecture not in ARCHITECTURES:
        known = ", ".join(sorted(ARCHITECTURES))
        near = missing(file.architecture) or nearest(file)
        known += near and f"; {near}"
        return None, [f"architecture {file.architecture}; supported: {known}"]
    planned, reasons = None, []
    try:
        planned = plan(file, read_config(file))
    except (GGUFError, UnsupportedError) as error:
        reasons.append(str(error).removeprefix(f"{file.path}: "))
    try:
        read_vocab(file.metadata, file.path)
    except (GGUFError, UnsupportedError) as error:
        reasons.append(str(error).removeprefix(f"{file.path}: "))
    return planned, reasons


def fit(wanted: Needs, here: Machine, context: int, trained: int, bits: KVBits) -> dict[str, Any]:
    """What a model takes on a machine, in bytes, and whether it fits.

    ``weights`` and ``active`` are as in the file; ``held`` is what stays in memory of them,
    ``apart`` what of them has no kernel and becomes ordinary numbers, by type, ``streamed`` what is
    dequantised for each token; ``longest_context`` is in tokens.
    """
    tokens = context or trained
    use = wanted.on(here, tokens, bits)
    return {
        "weights": wanted.weights,
        "active": wanted.active,
        "apart": wanted.apart if here.kernels else {},
        "held": use.weights,
        "streamed": use.streamed,
        "context": tokens,
        "cache": use.cache,
        "prompt": use.prompt,
        "total": use.total,
        "budget": here.budget,
        "fits": use.total <= here.budget,
        "longest_context": min(wanted.longest(here, bits), trained or 1 << 32),
    }


def verdict(memory: Mapping[str, Any]) -> list[str]:
    """`fit`'s result in sentences."""
    parts = {name: _bytes(memory[name]) for name in ("held", "cache", "prompt", "total", "budget")}
    lines = [
        "{}: weights {held} + cache of {:,} tokens {cache} + a long prompt {prompt} = {total} of "
        "{budget}".format("fits" if memory["fits"] else "does not fit", memory["context"], **parts)
    ]
    if apart := memory["apart"]:
        sizes = ", ".join(f"{_bytes(size)} of {name}" for name, size in apart.items())
        lines.append(f"{sizes} have no kernel and become 16-bit numbers")
    if memory["streamed"]:
        lines.append(f"{_bytes(memory['streamed'])} are dequantised for each token: very slow")
    if not memory["fits"]:
        longest = memory["longest_context"]
        fits = f"up to {longest:,} tokens fit" if longest else "the weights alone do not fit"
        lines.append(f"{fits}; a smaller quantisation or --kv-bits takes less")
    return lines


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


def _fusion(layers: Sequence[Sequence[WeightPlan]]) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, dict[tuple[str, tuple[str, ...]], list[int]]] = {}
    for number, layer in enumerate(layers):
        groups: dict[str, list[WeightPlan]] = defaultdict(list)
        for weight in layer:
            if weight.group:
                name = weight.group.rpartition(".")[2]
                experts = name == "gate_up" and len(weight.shape) == 3
                groups["experts_gate_up" if experts else name].append(weight)
        for name, weights in groups.items():
            kinds = found.setdefault(TITLES.get(name, name), defaultdict(list))
            kinds[_kind(weights)].append(number)
    return {
        group: [
            {"kind": kind, "types": list(formats), "layers": numbers}
            for (kind, formats), numbers in kinds.items()
        ]
        for group, kinds in found.items()
    }


def _kind(weights: Iterable[WeightPlan]) -> tuple[str, tuple[str, ...]]:
    """How the tensors of a group go together, and their formats."""
    sources = [source for weight in weights for source in weight.weight]
    tensors = {source.tensor.name: source.format for source in sources}
    formats = tuple(format.name for format in tensors.values())
    if any(format.quantized and not format.traits for format in tensors.values()):
        return "apart", formats
    if len(tensors) == 1:
        return "stored as one", formats
    return "equal" if len(set(formats)) == 1 else "mixed", formats


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
        ("read", f"{_bytes(summary['memory']['active'])} for each token"),
        *zip(("this machine", "", "", ""), verdict(summary["memory"]), strict=False),
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
            alike = entry["kind"] in ("equal", "stored as one")
            types = entry["types"][:1] if alike else entry["types"]
            note = _NOTES.get(entry["kind"], "")
            lines.append(f"{group:<17}{'|'.join(types) + note:<24}{_ranges(entry['layers'])}")
    if ahead := summary.get("ignored"):
        count = f"{ahead['blocks']} block{'s' * (ahead['blocks'] > 1)}"
        predicts = "predict" if ahead["blocks"] > 1 else "predicts"
        size = _bytes(ahead["bytes"])
        lines += ["", f"{count} that {predicts} tokens after the next, {size}: not used"]
    lines += [f"\nnot supported: {one_line(reason, 1000)}" for reason in summary["unsupported"]]
    return "\n".join(lines)


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
