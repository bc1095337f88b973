"""What the files of an MLX-LM checkpoint tell: no weight is read and MLX is not imported."""

from __future__ import annotations

import json
import struct
from collections import defaultdict
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..terminal import one_line

_LARGEST_HEADER = 1 << 26


def inspect_checkpoint(folder: Path) -> dict[str, Any]:
    """The checkpoint as plain data, ready for JSON. Sizes are in bytes.

    Raises:
        CheckpointError: a file of it is malformed.
    """
    config = _object(folder / "config.json", (folder / "config.json").read_bytes())
    tensors: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.glob("model*.safetensors")):
        tensors |= _header(path)
    if not tensors:
        raise CheckpointError(f"{folder}: there is no model*.safetensors beside config.json")
    nested = config.get("text_config")
    text: dict[str, Any] = nested if isinstance(nested, dict) else config
    types = _types(tensors, config.get("quantization") or {})
    return {
        "file": str(folder),
        "size": sum(t["bytes"] for t in types),
        "architecture": str(config.get("model_type", "")),
        "parameters": sum(t["parameters"] for t in types),
        "layers": text.get("num_hidden_layers", 0),
        "context_length": text.get("max_position_embeddings", 0),
        "chat_template": _has_template(folder),
        "tensor_types": types,
    }


def _has_template(folder: Path) -> bool:
    if (folder / "chat_template.jinja").is_file():
        return True
    path = folder / "tokenizer_config.json"
    return path.is_file() and "chat_template" in _object(path, path.read_bytes())


def render_checkpoint(found: Mapping[str, Any]) -> str:
    """For people."""
    lines = [
        f"{one_line(Path(found['file']).name)}: an MLX-LM checkpoint",
        f"architecture  {one_line(found['architecture'])}",
        f"size          {found['size'] / 1e9:.2f} GB, {found['parameters'] / 1e9:.2f} B parameters",
        f"layers        {found['layers']}",
        f"context       {found['context_length']:,} tokens",
        f"chat template {'yes' if found['chat_template'] else 'no'}",
    ]
    lines += [
        f"{one_line(t['type']):26} {t['tensors']:5} tensors  {t['bytes'] / 1e6:10.1f} MB"
        for t in found["tensor_types"]
    ]
    return "\n".join(lines)


def _types(tensors: dict[str, dict[str, Any]], quantization: Any) -> list[dict[str, Any]]:
    """Kinds of matrices by the bytes they take, largest first."""
    found: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0])
    for name, tensor in tensors.items():
        stem, _, leaf = name.rpartition(".")
        size = tensor["data_offsets"][1] - tensor["data_offsets"][0]
        count = prod(tensor["shape"])
        kind = str(tensor["dtype"])
        if f"{stem}.scales" in tensors:
            how = quantization | (quantization.get(stem) or {})
            bits = int(how.get("bits", 4))
            mode = how.get("mode", "affine")
            kind = f"{bits} bits in groups of {how.get('group_size', 64)}"
            kind += "" if mode == "affine" else f" ({mode})"
            count = count * 32 // bits if leaf == "weight" else 0
        row = found[kind]
        row[0] += leaf not in ("scales", "biases")
        row[1] += size
        row[2] += count
    return [
        {"type": kind, "tensors": n, "bytes": size, "parameters": count}
        for kind, (n, size, count) in sorted(found.items(), key=lambda item: -item[1][1])
    ]


def _header(path: Path) -> dict[str, dict[str, Any]]:
    """The entries of a safetensors file: 8 bytes of length, little-endian, then JSON."""
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= _LARGEST_HEADER:
            raise CheckpointError(f"{path}: a header of {length} bytes is no safetensors header")
        entries = _object(path, file.read(length))
    entries.pop("__metadata__", None)
    for name, entry in entries.items():
        good = isinstance(entry, dict) and {"dtype", "shape", "data_offsets"} <= entry.keys()
        if not good or len(entry["data_offsets"]) != 2:
            raise CheckpointError(f"{path}: the entry of {one_line(name)} is malformed")
    return entries


def _object(path: Path, data: bytes) -> dict[str, Any]:
    try:
        found = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: expected JSON: {error}") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(found).__name__}")
    return found
