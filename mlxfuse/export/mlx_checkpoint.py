"""A plain MLX-LM checkpoint out of a GGUF file, for stock ``mlx_lm``.

MLX's affine layers hold ``scale * code + bias`` with unsigned codes. GGUF types whose blocks say
the same with float16 scales of 32 weights are held exactly; matrices of other types become
float16, and the result says which.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from contextlib import redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from sys import stderr
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..errors import UnsupportedError
from ..formats import AFFINE
from ..gguf.blocks import dequantize
from ..gguf.exported import ExportedFile, open_model
from ..models.config import read_config
from ..models.plan import plan, stored_rows
from ..models.stock import rope_args, stock_type
from ..tokenizer.vocab import read_vocab
from .folder import new_folder
from .stock import check_stock
from .streams import Progress, Unit, write_shards
from .tokenizer import check_tokenizer, save_tokenizer

if TYPE_CHECKING:
    from ..formats import Format
    from ..gguf.reader import GGUFFile
    from ..models.plan import WeightPlan
    from ..models.rows import RowSource
    from ..models.table import Config
    from ..tokenizer.vocab import Vocab

GROUP = 32
EXACT = {name: bits for name, (bits, _) in AFFINE.items()}
_LARGEST = float(np.finfo(np.float16).max)

Arrays = dict[str, np.ndarray]
Bytes = NDArray[np.uint8]


def export_mlx(
    path: Path, target: Path, *, force: bool = False, progress: Progress | None = None
) -> dict[str, Any]:
    """Write the folder ``target``, which ``mlx_lm.load`` reads.

    Args:
        force, progress: as for `mlxfuse.export.streams.export`.

    Returns:
        ``exact`` and ``float16``: GGUF type -> matrices that were kept as they are, or not.

    Raises:
        UnsupportedError: MLX-LM's configuration cannot say what the file does.
        MLXFuseError, OSError: as for `mlxfuse.export.streams.export`.
    """
    with open_model(path) as file:
        config, vocab = read_config(file), read_vocab(file.metadata, file.path)
        check_tokenizer(vocab, file.path)
        weights = plan(file, config)
        if isinstance(file, ExportedFile):
            file.arrange(stored_rows(weights))
        every = [w for part in (weights.outer, *weights.layers) for w in part]
        described = _describe(file, config, vocab)
        check_stock(file.path, config, described, _shapes(every), _factors(file, config))
        exact, rounded = Counter[str](), Counter[str]()
        units = []
        for weight in every:
            kinds = {s.format.name for s in weight.weight}
            (kind,) = kinds if len(kinds) == 1 else ("",)
            scaled = len(weight.shape) == 1 or any(s.factor for s in weight.weight)
            bits = None if scaled else EXACT.get(kind)
            if bits and _overflows(file, weight, kind):
                bits = None
            if bits:
                described["quantization"][weight.module] = {"group_size": GROUP, "bits": bits}
                exact[kind] += 1
            elif any(s.format.quantized for s in weight.weight):
                rounded[" and ".join(sorted(kinds))] += 1
            units.append(_unit(file, weight, config, bits))
        if not exact:
            del described["quantization"]
        else:
            # mlx-lm's names; it quantises what has scales in the files, by the entry of its path.
            described["quantization_config"] = described["quantization"]
        size = sum(unit.nbytes for unit in units)
        with new_folder(target, force=force, nbytes=size, sources=(*file.paths, path)) as folder:
            write_shards(folder, units, {"format": "mlx"}, progress)
            with redirect_stdout(stderr):
                save_tokenizer(vocab, folder)
            (folder / "config.json").write_text(json.dumps(described, indent=2) + "\n", "utf-8")
    return {"exact": dict(exact), "float16": dict(rounded)}


def _shapes(weights: Sequence[WeightPlan]) -> dict[str, tuple[int, ...]]:
    """Of the parameters that are written, before any is quantised."""
    found = {weight.parameter: weight.shape for weight in weights}
    for weight in weights:
        if weight.bias:
            rows = weight.shape[:-1] or weight.shape
            found[f"{weight.module}.bias"] = rows
    return found


def _factors(file: GGUFFile, config: Config) -> NDArray[np.float32] | None:
    if not config.rope.factors:
        return None
    tensor = file.tensors[config.rope.factors]
    return dequantize(file.read(tensor), tensor.format, tensor.shape)


def _describe(file: GGUFFile, config: Config, vocab: Vocab) -> dict[str, Any]:
    """``config.json`` as mlx-lm's model reads it."""
    args = dict(config.args)
    args["model_type"] = stock_type(config)
    odd = config.kinds or config.values
    if find_spec(f"mlx_lm.models.{args['model_type']}") is None or odd:
        raise UnsupportedError(
            f"{file.path}: MLX-LM has no class that runs {config.architecture.name} as this file "
            "has it; `mlxfuse export` without --mlx keeps it"
        )
    args |= rope_args(config, _factors(file, config), file.path)
    biased = any(name.endswith("attn_q.bias") for name in file.tensors)
    return {
        **args,
        "attention_bias": biased,
        "torch_dtype": "float16",
        # All tokens that end an answer, as mlx-lm takes them.
        "eos_token_id": sorted(vocab.eog),
        "quantization": {"group_size": GROUP, "bits": 4},
    }


def _blocks(file: GGUFFile, source: RowSource) -> Bytes:
    """uint8 ``[rows, row_bytes]``, the rows in the model's order."""
    data, order = source.bytes(file, mapped=True), source.order()
    return data if order is None else data[order]


def _overflows(file: GGUFFile, weight: WeightPlan, kind: str) -> bool:
    """Whether a zero point times a scale leaves float16's range: 8, 16 or 128 times the scale."""
    _, zero = AFFINE[kind]
    return not all(
        np.all(np.abs(_halves(_blocks(file, source), source.format, 0)) * zero <= _LARGEST)
        for source in weight.weight
    )


def _halves(data: Bytes, format: Format, at: int) -> NDArray[np.float32]:
    """The float16 at byte ``at`` of every block, ``[rows, blocks]``."""
    blocks = data.reshape(len(data), -1, format.type_size)[..., at : at + 2]
    return np.ascontiguousarray(blocks).view(np.float16)[..., 0].astype(np.float32)


def affine(data: Bytes, format: Format) -> Arrays:
    """Blocks of a type of `EXACT` as ``mx.dequantize`` takes them, groups of 32.

    Args:
        data: uint8 ``[rows, row_bytes]``.

    Returns:
        ``weight`` uint32, ``scales`` and ``biases`` float16.
    """
    bits, zero = AFFINE[format.name]
    scales = _halves(data, format, 0)
    if zero:
        at, biases = 2, -zero * scales
    else:
        at, biases = 4, _halves(data, format, 2)
    fields = data.reshape(len(data), -1, format.type_size)[..., at:]
    codes: Bytes
    if bits == 8:
        codes = np.bitwise_xor(fields, np.uint8(0x80))  # int8 + 128
    else:
        nibbles = fields[..., -16:]
        codes = np.concatenate([nibbles & 15, nibbles >> 4], axis=-1)
        if bits == 5:
            codes |= np.unpackbits(fields[..., :4], axis=-1, bitorder="little") << 4
    # The codes of a row one after the other, lowest bits first.
    planes = np.unpackbits(codes[..., None], axis=-1, count=bits, bitorder="little")
    packed = np.packbits(planes.reshape(len(data), -1), axis=-1, bitorder="little")
    return {
        "weight": packed.view(np.uint32),
        "scales": scales.astype(np.float16),
        "biases": biases.astype(np.float16),
    }


def _unit(file: GGUFFile, weight: WeightPlan, config: Config, bits: int | None) -> Unit:
    size = math.prod(weight.shape)
    offset = weight.of.offset

    def floats(sources: Sequence[RowSource], offset: float = 0.0) -> np.ndarray:
        parts = []
        for source in sources:
            data = _blocks(file, source)
            shape = (len(data), *source.shape[1:][-1:])
            values = dequantize(data, source.format, shape) - offset
            factors = source.factors(file)
            parts.append(values if factors is None else values * factors)
        return np.concatenate(parts).astype(np.float16)

    def make() -> Arrays:
        if bits:
            parts = [affine(_blocks(file, s), s.format) for s in weight.weight]
            arrays = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        else:
            arrays = {"weight": floats(weight.weight, offset)}
        if weight.bias:
            arrays["bias"] = floats(weight.bias)
        if weight.of.bare:
            return {weight.module: arrays["weight"]}
        if len(weight.shape) == 3:
            lead = weight.shape[:2]
            bias = {"bias": arrays.pop("bias").reshape(lead)} if weight.bias else {}
            arrays = {n: array.reshape(*lead, -1) for n, array in arrays.items()} | bias
        return {f"{weight.module}.{name}": array for name, array in arrays.items()}

    return Unit(size * (bits + 1) // 8 if bits else 2 * size, make)
