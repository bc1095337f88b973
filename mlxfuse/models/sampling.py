"""The sampling options that a GGUF file recommends."""

from __future__ import annotations

import math
from collections.abc import Mapping

from ..terminal import one_line

WHOLE_CONTEXT = 2**31 - 1
# general.sampling.NAME -> our name, and the range of its values. llama.cpp's converter writes
# these keys from a model's generation_config.json.
_KNOWN: dict[str, tuple[str, float, float]] = {
    "temp": ("temp", 0, math.inf),
    "top_p": ("top_p", 0, 1),
    "min_p": ("min_p", 0, 1),
    "top_k": ("top_k", 0, WHOLE_CONTEXT),
    "xtc_probability": ("xtc_probability", 0, 1),
    "xtc_threshold": ("xtc_threshold", 0, 0.5),
    "penalty_repeat": ("repetition_penalty", 0, math.inf),
    "penalty_last_n": ("repetition_context_size", 0, WHOLE_CONTEXT),
}


def recommended(metadata: Mapping[str, object]) -> tuple[dict[str, float], list[str]]:
    """The options of `Sampling` that the file gives, and what was left out.

    A value that means nothing is left out with a line that says so, since llama.cpp runs such a
    file too; so is mirostat, which MLX-LM does not have.
    """
    found: dict[str, float] = {}
    notes: list[str] = []
    for key, (name, least, most) in _KNOWN.items():
        value = metadata.get(full := f"general.sampling.{key}")
        if value is None:
            continue
        number = _number(value, whole=most == WHOLE_CONTEXT)
        if number is None or not least <= number <= most:
            notes.append(f"{full} is {one_line(str(value), 40)}, which is no {key}: it is not used")
            continue
        found[name] = number
    if metadata.get("general.sampling.mirostat"):
        notes.append("general.sampling.mirostat is not used: MLX-LM has no mirostat sampling")
    return found, notes


def _number(value: object, whole: bool) -> float | None:
    """A finite number, whole where it has to be; of whole ones -1 means as many as there are."""
    if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
        return None
    if whole and value == -1:
        return WHOLE_CONTEXT
    return value if math.isfinite(value) else None
