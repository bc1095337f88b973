"""Fused forms put over the modules of a model, and taken off again."""

from __future__ import annotations

from .patch import FUSIONS, chosen, patch_model, unpatch_model
from .report import PatchReport

__all__ = ["FUSIONS", "PatchReport", "chosen", "patch_model", "unpatch_model"]
