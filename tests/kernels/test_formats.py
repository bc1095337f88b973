"""The table of formats says what the Metal text does, and every type of weights has a kernel."""

from __future__ import annotations

import re

import mlx.core as mx
import numpy as np
import pytest

from mlxfuse import codebooks
from mlxfuse.formats import BY_NAME, FORMATS
from mlxfuse.gguf.decoders import DECODERS
from mlxfuse.kernels.matmul.dequantize import section
from mlxfuse.kernels.runtime.source import header, metal_dir
from mlxfuse.kernels.weight import STREAMS
from tests import msl

from .weights import WITH_KERNEL

FIELDS = ("width", "halves", "biased", "offset")


def of_metal(names: list[str]) -> dict[str, tuple[int, ...]]:
    """`FIELDS` of each trait, by a kernel that writes them down."""
    fields = [f"{name}::{field}" for name in names for field in FIELDS]
    lines = [f"out[{i}] = int({field});" for i, field in enumerate(fields)]
    kernel = msl.metal_kernel(
        name="traits",
        input_names=["x"],
        output_names=["out"],
        source="\n".join([*lines, "out[0] += x[0];"]),
        header=header(tuple(section(n) for n in names)),
    )
    (out,) = kernel(
        inputs=[mx.zeros((8,), mx.int32)],
        grid=(1, 1, 1),
        threadgroup=(1, 1, 1),
        template=[],
        output_shapes=[(len(lines),)],
        output_dtypes=[mx.int32],
    )
    return dict(
        zip(names, map(tuple, np.array(out).reshape(-1, len(FIELDS)).tolist()), strict=True)
    )


def test_the_table_is_what_the_metal_text_says() -> None:
    traits = {f.name: f.traits for f in WITH_KERNEL if not f.traits.stored}
    want = {n: (t.unit, t.halves, t.biased, t.offset) for n, t in traits.items()}
    assert of_metal(list(traits)) == want
    for name, trait in traits.items():
        # What the trait's sections have beside what every trait needs.
        text = header((section(name),)).replace(header(("formats.h",)), "")
        text = text.replace("super(p,", "p.supers(")
        assert {s.name for s in trait.streams} <= {s for s in STREAMS if f"p.{s}" in text}, name
        assert bool(trait.grid) == ("p.grid" in text), name


def test_a_codebook_fits_in_threadgroup_memory() -> None:
    for grid in {f.traits.grid for f in WITH_KERNEL} - {""}:
        words = codebooks.staged(grid)
        assert words.dtype == np.uint32
        assert words.nbytes <= 8192


def test_no_trait_has_a_table_in_the_constant_address_space() -> None:
    text = (metal_dir() / "formats.h").read_text()
    assert not re.search(r"^constant\b(?! constexpr)", text, re.M)
    assert not re.search(r"^struct \w+ *:", text, re.M)  # and none is derived


@pytest.mark.parametrize("name", sorted(DECODERS.keys() - {"Q8_K"}))
def test_every_type_of_quantised_weights_has_a_kernel(name: str) -> None:
    """So that nothing is dequantised on Metal; Q8_K and Q8_1 are no weights' types."""
    format = BY_NAME[name]
    assert format.kernel or not format.quantized
    assert format is FORMATS[format.id]
