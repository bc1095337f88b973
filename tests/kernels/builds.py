"""In which builds of the bench the cases of a table run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import pytest

from tests import msl

from .pairwise import Case


def in_turn(cases: Sequence[Case], name: Callable[[Case], str]) -> list[Any]:
    """Parameters ``(case, kernels)``: each case in one build of the bench, the next in the other.

    In the builds that are left out a case is slow. On Metal, where there is one build, all run.

    Args:
        name: of a case, for its test's id.
    """
    builds = ["metal"] if mx.metal.is_available() else msl.BUILDS
    return [
        pytest.param(
            *(case, build),
            id=f"{build}-{name(case)}",
            marks=() if at % len(builds) == builds.index(build) else pytest.mark.slow,
        )
        for at, case in enumerate(cases)
        for build in builds
    ]
