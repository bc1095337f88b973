"""What the commands share: the app, errors, options. Everything heavy is imported inside the
command that needs it.

stdout holds the answer and nothing else; progress, notes and errors go to stderr. Model
text printed on a terminal has its control and bidi characters shown as escapes; a pipe or a
file gets the text as the model gave it.
"""

from __future__ import annotations

import functools
import io
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, ParamSpec, TextIO

import typer

from .. import __version__
from ..errors import MLXFuseError
from ..terminal import neutralize, one_line
from ._options import ActQuant, DType
from .process import INTERRUPTED, fail, unexpected, watch_interrupts
from .progress import download_bar, print_table

if TYPE_CHECKING:
    from ..loader import LoadReport
    from ..nn.kv.options import KVOptions

PIPE_CLOSED = 141  # 128 + SIGPIPE, what a shell reports for any program

P = ParamSpec("P")

app = typer.Typer(
    name="mlxfuse",
    no_args_is_help=True,
    add_completion=False,
    help="Run GGUF files in MLX at the file's own precision, with fused Metal kernels.",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> NoReturn:
    """The ``mlxfuse`` command; exits with the codes of ``mlxfuse.errors``."""
    watch_interrupts()
    sys.excepthook = unexpected
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    # The command object, not the app: calling the app would install typer's own excepthook.
    typer.main.get_command(app)(prog_name="mlxfuse")
    raise SystemExit(0)


def command(function: Callable[P, None]) -> Callable[P, None]:
    """Turn what a command raises into one message on stderr and an exit code."""

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> None:
        debug = bool(kwargs.get("debug"))
        if debug:
            sys.excepthook = sys.__excepthook__
        try:
            function(*args, **kwargs)
            sys.stdout.flush()
        except KeyboardInterrupt:
            raise typer.Exit(INTERRUPTED) from None
        except BrokenPipeError:
            # The interpreter flushes stdout when it exits; that must not fail again.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(PIPE_CLOSED) from None
        except (MLXFuseError, OSError, MemoryError) as error:
            if debug:
                traceback.print_exc()
            fail(str(error) or type(error).__name__)
            raise typer.Exit(getattr(error, "exit_code", 1)) from None

    return wrapper


def _version(shown: bool) -> None:
    if shown:
        print(f"mlxfuse {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


def resolve_model(ref: str | None, revision: str | None, shown: bool) -> Path:
    from ..hub.resolve import resolve

    with download_bar(shown) as progress:
        return resolve(ref, revision=revision, progress=progress)


def one_model(argument: str | None, option: str | None) -> str | None:
    if argument is not None and option is not None:
        raise typer.BadParameter(
            f"the model is given twice: {one_line(argument)!r} and --model {one_line(option)!r}"
        )
    return argument if option is None else option


def before_model(fuse: str, bits: str | None, group_size: int, rotate: bool) -> KVOptions | None:
    """`before_imports`, and what ``--kv-bits`` and its companions ask for.

    Options without a meaning are refused before a model is downloaded for them.
    """
    before_imports()
    if fuse not in ("auto", "all", "off"):
        from ..fusion import chosen

        try:
            chosen(fuse)
        except ValueError as error:
            raise typer.BadParameter(f"--fuse: {error}") from None
    if bits is None:
        return None
    from ..nn.kv.options import KVOptions

    try:
        return KVOptions.parse(bits, group_size, rotate)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def load_model(path: Path, dtype: DType | None, fuse: str, act_quant: ActQuant) -> tuple[Any, Any]:
    """`mlxfuse.load` as the options say."""
    from ..loader import load

    return load(path, dtype=dtype and dtype.value, fuse=fuse, act_quant=act_quant.value)


def show_report(report: LoadReport) -> None:
    """On stderr: what was fused, what takes more memory than its file, and what ran without its
    kernel so far.
    """
    from .. import kernels

    patch = report.patch
    if patch.tallies:
        print_table(("fusion", "fused", "of", "why not all, and which formats"), patch.rows())
    lines = [f"{name} is not used: {reason}" for name, reason in patch.disabled.items()]
    if patch.fused and patch.dispatches:
        lines.append("Dispatches of a token: {} unfused, {} fused".format(*patch.dispatches))
    for line in (*lines, *report.lines(), *kernels.summary()):
        print(one_line(line, 1000), file=sys.stderr)


def model_or_checkpoint(ref: str | None, revision: str | None) -> tuple[Path, bool]:
    """A model, or a folder with an MLX-LM checkpoint, and which of the two it is."""
    from ..bench.run import is_checkpoint

    if ref is not None and is_checkpoint(Path(ref)):
        return Path(ref), True
    return resolve_model(ref, revision, True), False


def answer_writer(stdout: TextIO, say: Callable[[str | None], None]) -> Callable[[str], None]:
    """What takes an answer's pieces: they end the status line, and are harmless on a terminal."""
    on_terminal = stdout.isatty()

    def write(piece: str) -> None:
        say(None)
        stdout.write(neutralize(piece) if on_terminal else piece)
        stdout.flush()

    return write


def clean(text: str) -> str:
    """Bytes that were not UTF-8 arrive as lone surrogates; no tokenizer takes those."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def before_imports() -> None:
    """What must come before mlx and transformers, which advises to install torch."""
    from .. import blas

    blas.preload()
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
