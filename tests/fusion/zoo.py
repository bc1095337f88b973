"""One tiny random model of each class that mlx-lm ships, and what `patch_model` fuses in it.

    python -m tests.fusion.zoo              fused places of all places, for each class and form
    python -m tests.fusion.zoo --reasons    and why the others were skipped
    python -m tests.fusion.zoo --golden     writes golden_fusions.txt anew

Weights have unit gain and the prompt exceeds the sliding windows, so a wrong mask, norm or
position is seen in the logits.
"""

from __future__ import annotations

import argparse
import os
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import make_prompt_cache

from mlxfuse.fusion import PatchReport, patch_model
from mlxfuse.loader import load
from mlxfuse.models import ARCHITECTURES
from mlxfuse.models.table import Architecture
from tests.fusion.configs import CONFIGS, FORMS, USED, VOCABULARY, build
from tests.models import tiny

GOLDEN = Path(__file__).parent / "golden_fusions.txt"
PROMPT, DECODED = 12, 2

GGUF_FORMATS = ("F32", "Q8_0", "Q4_0", "Q5_1")
GGUF_CASES = ("llama", "qwen2", "qwen3", "gemma2", "gemma3", "phi3")
# Recipes with tensors of several types, biases, q, k and v as one tensor, or experts.
GGUF_MIXED = (
    *("llama-q4", "llama-k-quants", "llama-fused-qkv", "llama-biases", "phi3-separate-qkv"),
    *("qwen2moe", "qwen3moe", "qwen3moe-k-quants", "gpt-oss"),
    *("gemma4", "gemma4-e4b", "gemma4-a4b"),
    *("qwen35", "qwen35-k-quants", "qwen35moe"),
)
# Classes that are not among the most used, but whose router reads the norm in another shape.
EXPERTS = ("qwen2_moe", "olmoe")
# mlx-lm's own classes where GGUF files are loaded as one of ours, and what those are for.
_OWN = {
    "ernie_moe_model": "ernie4_5_moe",
    "gemma3_model": "gemma3_text",
    "glm_dsa_model": "glm_moe_dsa",
    "hunyuan_moe_model": "hunyuan",
    "qwen3next_model": "qwen3_next",
    "qwen35_model": "qwen3_5",
    "selective_model": "mamba",
}


def class_of(row: Architecture) -> str:
    """The class of mlx-lm that computes what an architecture's files hold."""
    short = row.module.rpartition(".")[2]
    return _OWN.get(short, short.removesuffix("_model"))


# The class of every architecture whose files are loaded.
LOADED = frozenset(map(class_of, ARCHITECTURES.values()))


def forms(name: str) -> tuple[str, ...]:
    """Of a class's weights, which are tried."""
    if name in EXPERTS:
        return "float32", "affine4", "affine4-g32"
    if name in USED:
        return tuple(FORMS)
    return ("float32", "affine4") if name in LOADED else ("float32",)


def logits(model: nn.Module) -> np.ndarray:
    """Of a prompt, then of single tokens; float32 [PROMPT + DECODED, vocabulary]."""
    tokens = mx.array(np.random.RandomState(1).randint(0, VOCABULARY, (1, PROMPT + DECODED)))
    state = make_prompt_cache(model)
    rows = [model(tokens[:, :PROMPT], cache=state)[0]]
    rows += [model(tokens[:, i : i + 1], cache=state)[0] for i in range(PROMPT, tokens.size)]
    return np.array(mx.concatenate(rows).astype(mx.float32))


def apart(got: np.ndarray, want: np.ndarray) -> float:
    """Largest difference, relative to the largest of ``want``."""
    return float(np.abs(got - want).max() / np.abs(want).max())


def counts(report: PatchReport) -> str:
    """``fusion n/N`` of every fusion that the model has places for."""
    tallies = report.tallies.items()
    found = [f"{name} {len(t.fused)}/{t.total}" for name, t in tallies if t.total]
    return ", ".join(found) or "no places"


@contextmanager
def uncompiled() -> Iterator[None]:
    """Without `mx.compile`, which on the CPU calls a compiler for seconds."""
    mx.disable_compile()
    try:
        yield
    finally:
        mx.enable_compile()


def gguf_lines() -> Iterator[str]:
    """One line of the golden file for each GGUF architecture and format, as ``load`` fuses it."""
    cases = {
        f"{name} {kind}": replace(tiny.CASES[name], formats={"": kind})
        for name in GGUF_CASES
        for kind in GGUF_FORMATS
    } | {name: tiny.CASES[name] for name in GGUF_MIXED}
    with TemporaryDirectory() as folder, patch.dict(tiny.CASES, cases):
        for name in cases:
            path = tiny.write(Path(folder) / "m.gguf", tiny.build(name, 0))
            model, _ = load(path, fuse="all", act_quant="on")
            yield f"gguf {name}: {counts(model.load_report.patch)}"


def zoo_line(name: str, form: str, report: PatchReport) -> str:
    """The line of the golden file for a class of mlx-lm."""
    return f"mlx-lm {name} {form}: {counts(report)}"


def zoo_reports() -> Iterator[tuple[str, str, PatchReport]]:
    """Class, form and what `patch_model` says of it; every form of those that are used most."""
    for name in sorted(CONFIGS, key=str.lower):
        for form in forms(name):
            yield name, form, patch_all(build(name, form), form)


def patch_all(model: nn.Module, form: str) -> PatchReport:
    """With int8 activations too, where weights of the form can have them."""
    return patch_model(model, fuse="all", act_quant="on" if FORMS[form] else "off")


def golden() -> list[str]:
    """Every line of the golden file, as it would be written now."""
    return [*gguf_lines(), *(zoo_line(*found) for found in zoo_reports())]


def tallies(line: str) -> dict[str, tuple[int, int]]:
    """A line of the golden file as fusion -> (fused, places)."""
    found = re.findall(r"(\S+) (\d+)/(\d+)", line.split(": ")[1])
    return {name: (int(fused), int(places)) for name, fused, places in found}


def summary() -> list[tuple[str, ...]]:
    """By fusion: classes of mlx-lm that have places for it, that are fused, and the places."""
    lines = [
        tallies(line)
        for line in GOLDEN.read_text().splitlines()
        if re.search("^mlx.* float32", line)
    ]
    rows = [("any", *_row([{"any": _sum(line)} for line in lines], "any"))]
    for name in dict.fromkeys(name for line in lines for name in line):
        rows.append((name, *_row(lines, name)))
    return rows


def _sum(line: dict[str, tuple[int, int]]) -> tuple[int, int]:
    return sum(n for n, _ in line.values()), sum(total for _, total in line.values())


def _row(lines: list[dict[str, tuple[int, int]]], name: str) -> tuple[str, ...]:
    found = [line[name] for line in lines if line.get(name, (0, 0))[1]]
    whole = sum(n == total for n, total in found)
    part = sum(0 < n < total for n, total in found)
    fused, places = (sum(column) for column in zip(*found, strict=True))
    return str(len(found)), str(whole), str(part), f"{fused} of {places}"


def _main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--golden", action="store_true", help=f"write {GOLDEN.name} anew")
    parser.add_argument("--reasons", action="store_true", help="also why places were skipped")
    arguments = parser.parse_args()
    os.environ["MLXFUSE_KERNELS"] = "reference"
    if arguments.golden:
        GOLDEN.write_text("\n".join(golden()) + "\n")
        return
    for name, form, report in zoo_reports():
        print(f"{name:20} {form:12} {counts(report)}")
        reasons = Counter((fusion, reason) for fusion, _, reason in report.skipped)
        for (fusion, reason), n in reasons.items() if arguments.reasons else ():
            print(f"{'':20} {n} {fusion}: {reason}")


if __name__ == "__main__":
    _main()
