"""How much one rendering of a chat template may make: sizes are known before values are made.

The budget of the rendering in progress is `current`'s.
"""

from __future__ import annotations

import time
import types
from collections.abc import Iterable, Mapping
from contextvars import ContextVar
from typing import Any, NoReturn

from ..errors import UnsupportedError

TEXT_LIMIT = 4 * 1024 * 1024  # characters of any value and of the output, beyond 4 x the input
NODE_LIMIT = 400_000  # values inside any one container, beyond 4 x the input
DEPTH_LIMIT = 60
SECONDS = 1.0  # CPU time of the rendering thread, and 50 us for each value of the input

_MADE = 16  # all that is made may take this many times one text's limit
_INT_BITS = 10_000
_CONTAINERS = (
    list | tuple | set | frozenset | type({}.items()) | type({}.keys()) | type({}.values())
)
ACTIVE: ContextVar[Budget] = ContextVar("chat template budget")


def current() -> Budget:
    """The budget of the rendering in progress in this thread."""
    return ACTIVE.get()


def refuse(what: str) -> NoReturn:
    """Raises UnsupportedError: the template does ``what`` (a verb phrase)."""
    raise UnsupportedError(f"the chat template is refused: it {what}")


class Budget:
    """The bounds of one rendering: sizes of values, steps taken, characters put out."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        # Sizes of the inputs' containers, which neither change nor go away meanwhile.
        self._known: dict[int, tuple[int, int, int]] = {}
        self.node_limit = self.text_limit = 1 << 62
        inputs = [self._size(value, self._known) for value in values.values()]
        count = sum(size[0] for size in inputs)
        self.node_limit = NODE_LIMIT + 4 * count
        self.text_limit = TEXT_LIMIT + 4 * sum(size[1] for size in inputs)
        self._steps = self._emitted = self._made = 0
        self._deadline = time.thread_time() + SECONDS + 5e-5 * count

    def step(self, count: int = 1) -> None:
        before = self._steps >> 6
        self._steps += count
        if self._steps >> 6 != before and time.thread_time() > self._deadline:
            refuse(f"takes more than {SECONDS} seconds")

    def text(self, length: int) -> None:
        """Refuses a text of ``length`` characters that is about to be made."""
        if length > self.text_limit:
            refuse(f"makes a text of {length} characters; the limit is {self.text_limit}")

    def bits(self, length: int) -> None:
        """Refuses an integer of ``length`` bits."""
        if length > _INT_BITS:
            refuse(f"makes an integer of more than {_INT_BITS} bits")

    def emit(self, length: int) -> None:
        self.step()
        self._emitted += length
        self.text(self._emitted // 4)  # a macro's output is put out again by its caller

    def size(self, *values: Any) -> tuple[int, int, int]:
        """(values in it, characters of its repr, depth) of ``values`` together; refuses too much.

        A value counts as often as it is reached: ``[x, x]`` is twice ``x``.
        """
        total = (0, 0, 0)
        seen: dict[int, tuple[int, int, int]] = {}
        for value in values:
            n, chars, depth = self._size(value, seen)
            total = (total[0] + n, total[1] + chars, max(total[2], depth))
        # What comes next takes time in proportion, so large values bring the clock nearer.
        self.step(1 + (total[0] >> 6) + (total[1] >> 12))
        self.limit(*total[:2])
        return total

    def limit(self, count: int, chars: int) -> None:
        """Refuses a value of ``count`` values and ``chars`` characters."""
        if count > self.node_limit:
            refuse(f"makes a list or mapping of more than {self.node_limit} values")
        self.text(chars)

    def _size(self, value: Any, seen: dict[int, tuple[int, int, int]]) -> tuple[int, int, int]:
        if isinstance(value, str | bytes):
            return 1, len(value) + 2, 0
        if isinstance(value, int):
            return 1, value.bit_length() // 3 + 6, 0
        if isinstance(value, range):
            return len(value) + 1, 8 * len(value), 0
        if isinstance(value, Mapping):
            parts: Iterable[Any] = (part for item in value.items() for part in item)
        elif isinstance(value, _CONTAINERS):
            parts = value
        else:
            return 1, 32, 0  # a number, or an object with a short repr
        known = self._known.get(id(value)) or seen.get(id(value))
        if known is not None:
            return known
        count, chars, depth = 1, 2, 0
        for part in parts:
            n, size, below = self._size(part, seen)
            count, chars, depth = count + n, chars + size + 2, max(depth, below)
            self.limit(count, chars)
        if depth >= DEPTH_LIMIT:
            refuse(f"nests values more than {DEPTH_LIMIT} deep")
        seen[id(value)] = count, chars, depth + 1
        return count, chars, depth + 1

    def checked(self, value: Any) -> Any:
        """``value``, just made, within the limits; an iterator as a list."""
        made = 1
        if isinstance(value, str):
            self.text(len(value))
            made = len(value)
        elif isinstance(value, int):
            self.bits(value.bit_length())
        elif isinstance(value, types.GeneratorType | map | filter | zip | reversed):
            items, count, chars = [], 1, 2
            for item in value:
                self.step()
                items.append(item)
                n, size, _ = self.size(item)
                count, chars = count + n, chars + size + 2
                made += len(item) if isinstance(item, str) else 8
                self.limit(count, chars)
            value = items
        elif isinstance(value, _CONTAINERS | Mapping):
            self.size(value)
            made = 8 * len(value)  # references: what they refer to was counted before
        self.count(made)
        return value

    def count(self, made: int) -> None:
        """Counts ``made`` characters of a new value, kept or not."""
        self.step()
        self._made += made
        if self._made > _MADE * self.text_limit:
            refuse("makes too many large values")
