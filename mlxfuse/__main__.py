"""The ``mlxfuse`` command, also as ``python -m mlxfuse``."""

from __future__ import annotations

from typing import NoReturn

from .process import watch_interrupts


def main() -> NoReturn:
    """Watch for Ctrl-C before anything that takes time is imported, then run the command."""
    watch_interrupts()
    from .cli import main as run

    run()


if __name__ == "__main__":
    main()
