"""Several processes that hold one model together, as ``mlx.launch`` starts them.

Each process is a rank; rank 0 reads what the user says, and answers.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from . import env

if TYPE_CHECKING:
    import mlx.core as mx


@cache
def group() -> mx.distributed.Group | None:
    """MLX's group of the processes that ``mlx.launch`` started; None if this is the only one.

    The first call connects the ranks, and waits until all of them have called it.
    """
    if env.launched_rank() is None:
        return None
    import mlx.core as mx

    found = mx.distributed.init()
    return found if found.size() > 1 else None
