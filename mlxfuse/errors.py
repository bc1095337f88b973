"""Every exception the package raises on purpose, and the exit code each one means."""

from __future__ import annotations

import os


class MLXFuseError(Exception):
    """Base class. ``exit_code`` is what the command line returns for it."""

    exit_code = 1


class ModelRefError(MLXFuseError):
    """A model reference that names nothing, or names it ambiguously."""


class UnsupportedError(MLXFuseError):
    """A well-formed model whose architecture, tensor type or feature is not supported."""

    exit_code = 3


class GGUFError(MLXFuseError, ValueError):
    """A malformed GGUF file.

    Args:
        path: the file.
        what: what was expected and what was found.
        offset: byte offset in the file where it was found, if one applies.
    """

    exit_code = 4

    def __init__(self, path: str | os.PathLike[str], what: str, offset: int | None = None) -> None:
        self.path = os.fspath(path)
        self.what = what
        self.offset = offset
        where = "" if offset is None else f" at byte {offset}"
        super().__init__(f"{self.path}{where}: {what}")


class PromptCacheError(MLXFuseError, ValueError):
    """A prompt-cache file that is malformed or was made with another model."""

    exit_code = 4


class ReportError(MLXFuseError, ValueError):
    """A file of benchmark results that is malformed or of another model."""

    exit_code = 4


class ExportError(MLXFuseError, ValueError):
    """A folder that ``mlxfuse export`` wrote and that is not as it wrote it."""

    exit_code = 4


class CheckpointError(MLXFuseError, ValueError):
    """An MLX-LM checkpoint that is incomplete or malformed."""

    exit_code = 4


class GrammarError(MLXFuseError, ValueError):
    """A JSON schema or grammar that is malformed, or that no answer can follow."""

    exit_code = 4


class DownloadError(MLXFuseError):
    """A download that could not start, finish or be verified."""

    exit_code = 5


class PatchError(MLXFuseError):
    """A fusion that was demanded and is not possible, or that changes what the model computes."""

    exit_code = 3


class FusionNameError(MLXFuseError, ValueError):
    """``fuse`` or ``MLXFUSE_DISABLE`` names no fusion."""

    exit_code = 2


class NotFusible(Exception):
    """Why a place of a model is not fused; `patch_model` catches it and reports the reason."""


class KernelError(MLXFuseError, RuntimeError):
    """A Metal kernel that was demanded and cannot run, with the reason."""


class DoesNotFitError(MLXFuseError):
    """The model takes more memory than there is for it."""


class RanksError(MLXFuseError):
    """The processes that hold one model together differ, or one of them has ended."""
