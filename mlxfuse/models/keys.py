"""Typed look-ups of an architecture's keys; numpy only."""

from __future__ import annotations

from collections.abc import Container
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from ..errors import GGUFError, UnsupportedError

if TYPE_CHECKING:
    from ..gguf.reader import GGUFFile

T = TypeVar("T", int, float, str)


class Keys:
    """Typed look-ups under ``ARCH.``."""

    def __init__(self, file: GGUFFile, uneven: Container[str] = ()) -> None:
        self.file = file
        self.uneven = uneven
        self.name = file.architecture

    def __contains__(self, key: str) -> bool:
        return f"{self.name}.{key}" in self.file.metadata

    def __call__(self, key: str, kind: type[T], default: T | None = None) -> T:
        full = f"{self.name}.{key}"
        return self.file.get(full, kind) if default is None else self.file.get(full, kind, default)

    def value(self, key: str, default: float | int | str) -> float | int | str:
        """A value of the default's type."""
        return self.file.get(f"{self.name}.{key}", type(default), default)

    def flag(self, key: str, default: bool) -> bool:
        return self.file.get(f"{self.name}.{key}", bool, default)

    def each(
        self, key: str, layers: int, default: int | None = None, *, listed: bool = False
    ) -> list[int]:
        """A number for each layer, which the file gives one by one or once for all.

        A list has one for each block of the file; those after the layers are left out.

        Args:
            default: None if the file must have it.
            listed: it must give them one by one.
        """
        full = f"{self.name}.{key}"
        values = self.file.metadata.get(full)
        if not isinstance(values, np.ndarray) and not listed:
            return [self(key, int, default)] * layers
        array, blocks = np.asarray(values), self.count("block_count")
        if array.dtype.kind not in "biu" or array.shape != (blocks,):
            raise GGUFError(
                self.file.path, f"{full} is not a list of {blocks} integers, one for each layer"
            )
        return [int(value) for value in array[:layers]]

    def floats(self, key: str, layers: int) -> list[float]:
        """A number for each layer, which the file gives one by one or once for all, under its
        full name, without the architecture's.
        """
        values = self.file.metadata.get(key)
        if not isinstance(values, np.ndarray):
            return [self.file.get(key, float)] * layers
        if values.dtype.kind not in "fiu" or len(values) < layers:
            raise GGUFError(
                self.file.path, f"{key} is not a list of {layers} numbers, one for each layer"
            )
        return [float(value) for value in values[:layers]]

    def count(self, key: str, default: int | None = None) -> int:
        """A positive integer; of an array with one value per layer, which must be uniform but
        for an ``uneven`` key, the largest.
        """
        full = f"{self.name}.{key}"
        values = self.file.metadata.get(full)
        if isinstance(values, np.ndarray):
            if values.size == 0 or values.dtype.kind not in "iu":
                raise GGUFError(self.file.path, f"{full} is not a list of integers")
            if key not in self.uneven and np.any(values != values[0]):
                raise UnsupportedError(f"{full} differs between layers: {_some(values)}")
            # Of an uneven key, where 0 says that a layer has none.
            value = int(values.max()) if key in self.uneven else int(values[0])
        else:
            value = self(key, int, default)
        if not 0 < value < 2**31:
            raise GGUFError(self.file.path, f"{full} is {value}; expected a positive 32-bit number")
        return value

    def count_or_none(self, key: str) -> int | None:
        """As `count`, but None where the file has no such key, or 0 for it."""
        value = self.file.metadata.get(f"{self.name}.{key}")
        return None if value is None or (type(value) is int and not value) else self.count(key)

    def tokens(self, key: str, default: int | None = None) -> int:
        """A number of tokens. As in llama.cpp 0 says nothing, and any 32 bits are a number: both
        are the most that there is here.
        """
        value = self.file.metadata.get(f"{self.name}.{key}")
        if type(value) is int and (value == 0 or 2**31 <= value < 2**32):
            return 2**31 - 1
        return self.count(key, default)

    def positive(self, key: str, default: float | None = None) -> float:
        value = self(key, float, default)
        if value <= 0:
            raise GGUFError(self.file.path, f"{self.name}.{key} is {value}; expected more than 0")
        return value


def _some(values: np.ndarray) -> str:
    return ", ".join(map(str, values[:8].tolist())) + (", ..." if values.size > 8 else "")
