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
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TextIO

import typer

from .. import __version__, env
from ..errors import MLXFuseError, RanksError
from ..process import INTERRUPTED, errors, fail, unexpected
from ..terminal import neutralize, one_line
from ._groups import flat
from ._ranks import begin
from .progress import print_table

if TYPE_CHECKING:
    from ..loader import LoadReport

PIPE_CLOSED = 141  # 128 + SIGPIPE, what a shell reports for any program

Command = Callable[..., None]

app = typer.Typer(
    name="mlxfuse",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="Run GGUF files in MLX at the file's own precision, with fused Metal kernels.\n\n"
    "generate, chat, server, bench and perplexity also run on several machines that share a "
    "model: `mlx.launch --hostfile hosts.json -- mlxfuse generate MODEL`.",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)


def main() -> NoReturn:
    """The ``mlxfuse`` command; exits with the codes of ``mlxfuse.errors``."""
    sys.excepthook = unexpected
    if env.launched_rank():
        # Rank 0 speaks for all; `process.errors` is where the others tell why they end.
        sys.stdout = sys.stderr = os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    # The command object, not the app: calling the app would install typer's own excepthook.
    typer.main.get_command(app)(prog_name="mlxfuse")
    raise SystemExit(0)


# [0<=x<=1] and [default: 1; x>=0]: an error tells the range too.
_RANGE = re.compile(r"\s+\[[\d.]*<?=?x[<>=\d.]*\]|; [\d.]*<?=?x[<>=\d.]*(?=\])")


class _Command(typer.core.TyperCommand):
    """A command whose ``--help`` fits a screen."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """``--verbose False``, as mlx_lm has it, is ``--quiet``."""
        if any("--verbose" in p.opts for p in self.params):
            args = _without_booleans(args)
        return super().parse_args(ctx, args)

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """Without the argument that only catches a forgotten ``-p``."""
        return [piece for piece in super().collect_usage_pieces(ctx) if piece != "[ ]..."]

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """One line an option where there is room, in sections, and the examples."""
        self.format_usage(ctx, formatter)
        self.format_help_text(ctx, formatter)
        sections: dict[str, list[tuple[str, str]]] = {"Arguments": [], "Options": []}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                panel = getattr(parameter, "rich_help_panel", None) or "Options"
                name = "Arguments" if parameter.param_type_name == "argument" else panel
                sections.setdefault(name, []).append((record[0], _RANGE.sub("", record[1])))
        for name, rows in sections.items():
            if rows:
                with formatter.section(name):
                    formatter.write_dl(rows)
        formatter.write("\nExamples:\n  " + (self.epilog or "").replace("\n", "\n  "))


def _without_booleans(args: Sequence[str]) -> list[str]:
    found: list[str] = []
    for arg in args:
        if found[-1:] == ["--verbose"] and arg.lower() in ("true", "t", "false", "f"):
            found[-1] = "--verbose" if arg.lower().startswith("t") else "--quiet"
        else:
            found.append(arg)
    return found


def command(
    panel: str, *examples: str, name: str | None = None, ranks: bool = False
) -> Callable[[Command], Command]:
    """Register a function of option groups (see `flat`) as a command.

    Args:
        panel: where ``mlxfuse --help`` lists it.
        examples: command lines that end its ``--help``.
        name: the command's name; by default the function's without ``_command``.
        ranks: whether it runs under ``mlx.launch``.
    """

    def register(function: Command) -> Command:
        app.command(
            name or function.__name__.removesuffix("_command"),
            cls=_Command,
            rich_help_panel=panel,
            epilog="\n".join(examples),
        )(_reporting(flat(function), ranks))
        return function

    return register


def _reporting(function: Command, ranks: bool) -> Command:
    """Turn what a command raises into one message on stderr and an exit code, for all ranks."""

    @functools.wraps(function)
    def wrapper(**given: Any) -> None:
        debug = bool(given.get("debug"))
        if debug:
            sys.excepthook, sys.stderr = sys.__excepthook__, errors()
        team, code = None, 1
        try:
            team = begin(ranks)
            function(**given)
            sys.stdout.flush()
            if team is not None:
                team.barrier()
            code = 0
        except KeyboardInterrupt:
            code = INTERRUPTED
            raise typer.Exit(code) from None
        except BrokenPipeError:
            # The interpreter flushes stdout when it exits; that must not fail again.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            code = PIPE_CLOSED
            raise typer.Exit(code) from None
        except (MLXFuseError, OSError, MemoryError) as error:
            if team is not None and isinstance(error, RanksError):
                team.settle()
            if debug:
                traceback.print_exc()
            fail(_told(error), errors())
            code = getattr(error, "exit_code", 1)
            raise typer.Exit(code) from None
        except (typer.Exit, typer.BadParameter) as error:
            code = error.exit_code
            raise
        except RuntimeError:
            if team is not None:
                team.settle()  # MLX raises it where it has lost a rank
            raise
        finally:
            if team is not None:
                team.leave(code)

    return wrapper


def _told(error: BaseException) -> str:
    """What is wrong, in words: of an error of the system without its number."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror[0].lower()}{error.strerror[1:]}"
    return str(error) or type(error).__name__


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


class AnswerWriter:
    """Takes an answer's pieces: they end the status line, and are harmless on a terminal.

    Reasoning is dimmed on a terminal. Elsewhere stdout has the answer alone, and reasoning goes to
    stderr, if it is shown at all.
    """

    def __init__(self, stdout: TextIO, say: Callable[[str | None], None], shown: bool) -> None:
        self._stdout, self._say = stdout, say
        self._on_terminal, self._shown = stdout.isatty(), shown
        self._thought = False

    def write(self, piece: str) -> None:
        """Take some of the answer."""
        self._say(None)
        if self._thought:
            self._thought = False
            self._put("\n\n", self._stdout if self._on_terminal else sys.stderr)
        self._put(neutralize(piece) if self._on_terminal else piece, self._stdout)

    def think(self, piece: str) -> None:
        """Take some of the reasoning."""
        if not (self._shown or self._on_terminal):
            return
        self._say(None)
        self._thought = True
        text = neutralize(piece)
        if self._on_terminal and not env.no_color():
            text = f"\x1b[2m{text}\x1b[22m"
        self._put(text, self._stdout if self._on_terminal else sys.stderr)

    def _put(self, text: str, to: TextIO) -> None:
        to.write(text)
        to.flush()
