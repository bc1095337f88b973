"""Commands under ``mlx.launch``, where several processes hold one model together."""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import typer

from .. import env
from ..errors import UnsupportedError
from ._models import before_imports

if TYPE_CHECKING:
    from ..ranks import Ranks

T = TypeVar("T")
ONE_MODEL = "the ranks hold one model together"
NO_END = "it does not pass on the end of its input; give a file"


def team() -> Ranks | None:
    """The ranks of this run; None where this process is the only one."""
    if env.launched_rank() is None:
        return None
    before_imports()
    from ..ranks import join

    return join()


def begin(possible: bool) -> Ranks | None:
    """`team`, at the start of a command.

    Args:
        possible: whether the command runs on several ranks.
    """
    if not possible and (rank := env.launched_rank()) is not None:
        message = "this command runs in one process: start it without mlx.launch"
        raise UnsupportedError(message) if rank == 0 else typer.Exit(UnsupportedError.exit_code)
    found = team()
    if found is not None and not found.first:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # rank 0 ends all
    return found


def of_first(make: Callable[[], T]) -> T:
    """What ``make`` gives, on rank 0 where there are several: only its machine has the input."""
    found = team()
    return make() if found is None else found.of_first(make)


def together(**options: Any) -> None:
    """Refuse options that mean nothing where this process is the only one.

    Args:
        options: name -> its value; what is None or False was not given.
    """
    given = [f"--{name}" for name, value in options.items() if value]
    if given and env.launched_rank() is None:
        raise typer.BadParameter(f"{given[0]} is for several machines: start it with mlx.launch")


def alone(reason: str, **options: Any) -> None:
    """Refuse options that cannot be used under ``mlx.launch``.

    Args:
        reason: why they cannot.
        options: name with ``_`` -> its value; what is None or False was not given.
    """
    given = [f"--{name.replace('_', '-')}" for name, value in options.items() if value]
    if given and env.launched_rank() is not None:
        raise typer.BadParameter(f"{given[0]} cannot be used under mlx.launch: {reason}")
