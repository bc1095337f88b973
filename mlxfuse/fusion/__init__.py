"""Fused forms put over the modules of a model, and taken off again."""

from __future__ import annotations

from . import detectors, mixers, norms  # registers them
from .candidates import DETECTORS, Candidate, Skip, Tree, register_detector
from .options import chosen
from .patch import patch_model, unpatch_model
from .report import PatchReport

FUSIONS = tuple(DETECTORS)

__all__ = [
    "FUSIONS",
    "Candidate",
    "PatchReport",
    "Skip",
    "Tree",
    "chosen",
    "detectors",
    "mixers",
    "norms",
    "patch_model",
    "register_detector",
    "unpatch_model",
]
