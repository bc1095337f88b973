"""Changes of a tiny model's file: what a loader that misreads it would take it for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from tests.models.case import Change

if TYPE_CHECKING:
    from tests.models.tiny import Tiny


def edit(tensor: str, change: Callable[[np.ndarray], np.ndarray]) -> Change:
    """Change the data of the tensors called `tensor`, in every layer."""

    def apply(model: Tiny) -> None:
        for name, (data, kind) in model.tensors.items():
            if name.removesuffix(".weight").split(".", 2)[-1] == tensor:
                model.tensors[name] = change(data), kind

    return apply


def together(*changes: Change) -> Change:
    """Several changes at once."""

    def apply(model: Tiny) -> None:
        for change in changes:
            change(model)

    return apply


def swap(one: str, other: str) -> Change:
    """Let the tensors of two names change places, in every layer."""

    def apply(model: Tiny) -> None:
        for name in list(model.tensors):
            if f".{one}." in name:
                pair = name, name.replace(one, other)
                first, second = (model.tensors[n] for n in pair)
                model.tensors |= {pair[0]: second, pair[1]: first}

    return apply


def set_key(key: str, value: object) -> Change:
    def apply(model: Tiny) -> None:
        full = f"{model.case.arch}.{key}"
        if value is None:
            del model.metadata[full]
        else:
            model.metadata[full] = value

    return apply


def set_full(key: str, value: object) -> Change:
    """Let a key of the full name have another value."""

    def apply(model: Tiny) -> None:
        model.metadata[key] = value

    return apply


def swap_keys(one: str, other: str) -> Change:
    """Let the values of two keys, by their full names, change places."""

    def apply(model: Tiny) -> None:
        first, second = model.metadata[one], model.metadata[other]
        model.metadata |= {one: second, other: first}

    return apply


def read_as(arch: str) -> Change:
    """Let the file say that it is of another architecture."""

    def apply(model: Tiny) -> None:
        own = f"{model.case.arch}."
        model.metadata = {
            key.replace(own, f"{arch}.") if key.startswith(own) else key: value
            for key, value in model.metadata.items()
        }
        model.case = replace(model.case, arch=arch)

    return apply
