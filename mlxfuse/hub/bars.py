"""Bars that show how far a download has come, for scripts; the command line has its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from .download import Progress


@contextmanager
def bars() -> Iterator[Progress]:
    """One bar a file on stderr, as huggingface_hub's, which HF_HUB_DISABLE_PROGRESS_BARS hides.

    Yields what takes (label, bytes done, bytes in all).
    """
    with ExitStack() as stack:
        made = {}

        def update(label: str, done: int, total: int) -> None:
            from huggingface_hub.utils import tqdm

            if label not in made:
                bar = tqdm(total=total, desc=label, unit="B", unit_scale=True)
                made[label] = stack.enter_context(bar)
            made[label].update(done - made[label].n)

        yield update
