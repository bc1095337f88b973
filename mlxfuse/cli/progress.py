"""What stderr shows while a command is at work, and after it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TextIO

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from rich.table import Table

from ..terminal import one_line


@contextmanager
def download_bar(shown: bool) -> Iterator[Callable[[str, int, int], None] | None]:
    """A bar on a terminal, one line a file elsewhere, nothing where ``shown`` is false.

    Yields what takes (label, bytes done, bytes in all).
    """
    if not shown:
        yield None
        return
    console = Console(stderr=True)
    tasks: dict[str, Any] = {}
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
    )
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bar:

        def update(label: str, done: int, total: int) -> None:
            if label not in tasks:
                tasks[label] = bar.add_task(escape(one_line(label, 60)), total=total)
                if not console.is_terminal:
                    size = f"{total / 1e6:.0f} MB"
                    print(f"downloading {one_line(label)} ({size})", file=sys.stderr)
            bar.update(tasks[label], completed=done)

        yield update


@contextmanager
def status_line(shown: bool) -> Iterator[Callable[[str | None], None]]:
    """One line on a terminal that says what is being done, and goes when it is.

    Yields what takes the text; None takes the line away. Nothing is shown elsewhere than on a
    terminal.
    """
    console = Console(stderr=True)
    if not (shown and console.is_terminal):
        yield lambda text: None
        return
    with console.status("") as line:

        def say(text: str | None) -> None:
            if text is None:
                line.stop()
            else:
                # Naming the spinner draws the line at once: what takes no time is seen too.
                line.update(escape(one_line(text, 70)), spinner="dots")

        yield say


def print_table(
    header: Sequence[str], rows: Iterable[Sequence[str]], file: TextIO | None = None
) -> None:
    """A small table, on stderr by default; what does not fit a line goes on in the next, in its
    column.
    """
    table = Table(*header, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*(escape(one_line(cell, 1000)) for cell in row))
    Console(stderr=file is None, file=file).print(table)
