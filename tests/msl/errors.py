"""What the bench raises."""

from __future__ import annotations


class MslError(Exception):
    """Base class of everything the bench reports about a kernel."""


class MslCompileError(MslError):
    """The front end or the lint refused a kernel; the text is theirs, one finding a line."""


class MslRunError(MslError):
    """A launch went wrong.

    Attributes:
        kind: one of the names in ``run.KINDS``, e.g. ``"data-race"``.
    """

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(text)
        self.kind = kind


class MslSetupError(MslError):
    """This machine cannot build kernels; says what is missing."""
