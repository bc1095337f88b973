"""The command line. Everything heavy is imported inside the command that needs it.

stdout holds the answer and nothing else; progress, notes and errors go to stderr. Model
text printed on a terminal has its control and bidi characters shown as escapes; a pipe or a
file gets the text as the model gave it.
"""

from __future__ import annotations

import functools
import io
import json
import math
import os
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, NoReturn, ParamSpec

import typer

from . import __version__
from .errors import MLXFuseError
from .process import INTERRUPTED, fail, unexpected, watch_interrupts
from .progress import download_bar, status_line
from .terminal import neutralize, one_line

PIPE_CLOSED = 141  # 128 + SIGPIPE, what a shell reports for any program

P = ParamSpec("P")

app = typer.Typer(
    name="mlxfuse",
    no_args_is_help=True,
    add_completion=False,
    help="Run GGUF files in MLX at the file's own precision, with fused Metal kernels.",
    context_settings={"help_option_names": ["-h", "--help"]},
)


class DType(StrEnum):
    """Names of the activation types, as in mlx.core."""

    float16 = "float16"
    bfloat16 = "bfloat16"
    float32 = "float32"


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


def _resolve(ref: str | None, revision: str | None, shown: bool) -> Path:
    from .hub import resolve

    with download_bar(shown) as progress:
        return resolve(ref, revision=revision, progress=progress)


def _one_model(argument: str | None, option: str | None) -> str | None:
    if argument is not None and option is not None:
        raise typer.BadParameter(
            f"the model is given twice: {one_line(argument)!r} and --model {one_line(option)!r}"
        )
    return argument if option is None else option


def _max_tokens(text: str) -> int:
    try:
        count = int(text)
    except ValueError:
        hint = "give a whole number"
        if text.lower().endswith(".gguf") or "/" in text:
            hint = f"-m is --max-tokens here; name the model first: mlxfuse generate {text}"
        raise typer.BadParameter(f"{one_line(text)!r}: {hint}") from None
    if count == 0 or count < -1:
        raise typer.BadParameter(f"{count}: give 1 or more, or -1 for no limit")
    return count


def _finite(value: float) -> float:
    if not math.isfinite(value):
        raise typer.BadParameter(f"{value} is not a finite number")
    return value


def _json_object(text: str | None) -> dict[str, Any]:
    try:
        value = json.loads(text or "{}")
    except (ValueError, RecursionError) as error:
        raise typer.BadParameter(f"not JSON: {error}") from None
    if not isinstance(value, dict):
        raise typer.BadParameter(f"expected a JSON object, found {one_line(str(text))}")
    return value


def _read_prompt(prompt: str) -> str:
    # mlx_lm.generate's rule: \n and \t in the argument are a newline and a tab.
    text = sys.stdin.read() if prompt == "-" else prompt.replace("\\n", "\n").replace("\\t", "\t")
    return _clean(text)


def _clean(text: str) -> str:
    """Bytes that were not UTF-8 arrive as lone surrogates; no tokenizer takes those."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


MODEL, SAMPLING, OUTPUT = "Model", "Sampling", "Output"
ModelArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL",
        help="A .gguf file, a hub repository such as org/repo:Q4_K_M, or nothing for the demo "
        "model (SmolLM2 135M, a download of 93 MB).",
    ),
]
ModelOption = Annotated[
    str | None, typer.Option("--model", help="The same as MODEL.", rich_help_panel=MODEL)
]
Revision = Annotated[
    str | None,
    typer.Option(help="Branch, tag or commit of the hub repository.", rich_help_panel=MODEL),
]
Json = Annotated[
    bool, typer.Option("--json", help="One JSON object on stdout.", rich_help_panel=OUTPUT)
]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks.", rich_help_panel=OUTPUT)]


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


def _in(panel: str, help: str, *names: str, **more: Any) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=panel, **more)


_model = functools.partial(_in, MODEL)
_sampling = functools.partial(_in, SAMPLING)
_output = functools.partial(_in, OUTPUT)
_unit = functools.partial(_sampling, min=0, max=1, callback=_finite)


@app.command("generate", rich_help_panel="Run")
@command
def generate_command(
    model: ModelArgument = None,
    model_option: ModelOption = None,
    revision: Revision = None,
    dtype: Annotated[
        DType | None, _model("Type of the activations (default: by architecture and device).")
    ] = None,
    draft_model: Annotated[
        str | None, _model("A smaller model with the same vocabulary, for speculative decoding.")
    ] = None,
    num_draft_tokens: Annotated[int, _model("Tokens drafted at a time.", min=1)] = 3,
    prompt_cache_file: Annotated[
        Path | None, _model("A stored prompt cache that the prompt follows.")
    ] = None,
    max_kv_size: Annotated[
        int | None, _model("Keep at most this many tokens in the key-value cache.", min=5)
    ] = None,
    prefill_step_size: Annotated[
        int, _model("Prompt tokens processed at a time; fewer take less memory.", min=1)
    ] = 2048,
    prompt: Annotated[
        str, typer.Option("--prompt", "-p", help="The message; - reads it from stdin.")
    ] = "hello",
    system_prompt: Annotated[str | None, typer.Option(help="The system message.")] = None,
    prefill_response: Annotated[str | None, typer.Option(help="How the answer begins.")] = None,
    ignore_chat_template: Annotated[
        bool, typer.Option("--ignore-chat-template", help="Continue the prompt as raw text.")
    ] = False,
    chat_template_config: Annotated[
        str | None, typer.Option(help="A JSON object of values for the chat template.")
    ] = None,
    max_tokens: Annotated[
        int,
        _sampling(
            "Tokens to generate at most; -1: no limit.",
            "--max-tokens",
            "-m",
            parser=_max_tokens,
            metavar="INTEGER",
        ),
    ] = 100,
    temp: Annotated[float, _sampling("Temperature; 0: greedy.", min=0, callback=_finite)] = 0.0,
    top_p: Annotated[float, _unit("Nucleus sampling; 1: off.")] = 1.0,
    min_p: Annotated[float, _unit("Least probability, relative to the best; 0: off.")] = 0.0,
    top_k: Annotated[int, _sampling("Sample among the best K; 0: off.", min=0)] = 0,
    xtc_probability: Annotated[float, _unit("Chance of XTC sampling for each token.")] = 0.0,
    xtc_threshold: Annotated[
        float, _sampling("XTC's threshold.", min=0, max=0.5, callback=_finite)
    ] = 0.1,
    min_tokens_to_keep: Annotated[int, _sampling("Tokens that --min-p always leaves.", min=1)] = 1,
    seed: Annotated[
        int | None, _sampling("Seed of the random numbers.", min=0, max=2**64 - 1)
    ] = None,
    extra_eos_token: Annotated[
        list[str] | None,
        _sampling("A further token that ends the answer (may be repeated)."),
    ] = None,
    verbose: Annotated[
        str, _output("False: no progress and no footer.", metavar="BOOLEAN")
    ] = "True",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Answer one prompt: the text on stdout, progress and speeds on stderr."""
    ref = _one_model(model, model_option)
    config = _json_object(chat_template_config)
    if max_kv_size and (draft_model or prompt_cache_file):
        raise typer.BadParameter(
            "--max-kv-size cannot be combined with --draft-model or --prompt-cache-file"
        )
    shown = verbose.lower() not in ("false", "f")
    text = _read_prompt(prompt)
    path = _resolve(ref, revision, shown)
    draft_path = _resolve(draft_model, None, shown) if draft_model else None

    _before_imports()
    stdout = sys.stdout
    on_terminal = stdout.isatty()

    def write(piece: str) -> None:
        say(None)
        stdout.write(neutralize(piece) if on_terminal else piece)
        stdout.flush()

    # mlx-lm prints warnings on stdout.
    with redirect_stdout(sys.stderr), status_line(shown and not as_json) as say:
        say(f"loading {path.name}")
        from . import generate as engine
        from . import kernels, prompt_cache
        from .load import load

        if prompt_cache_file:
            prompt_cache.expect_model(prompt_cache_file, ref)
        kernels.launches.clear()
        kernels.fallbacks.clear()
        start = time.perf_counter()
        loaded, tokenizer = load(path, dtype=dtype and dtype.value)
        draft = _load_draft(draft_path, tokenizer) if draft_path else None
        load_seconds = time.perf_counter() - start
        say("reading the prompt")
        models = [loaded] if draft is None else [loaded, draft]
        result = engine.generate(
            loaded,
            tokenizer,
            engine.Settings(
                prompt=text,
                system_prompt=system_prompt and _clean(system_prompt),
                prefill_response=prefill_response and _clean(prefill_response),
                ignore_chat_template=ignore_chat_template,
                chat_template_config=config,
                extra_eos_token=tuple(extra_eos_token or ()),
                max_tokens=max_tokens,
                temp=temp,
                top_p=top_p,
                min_p=min_p,
                top_k=top_k,
                xtc_probability=xtc_probability,
                xtc_threshold=xtc_threshold,
                min_tokens_to_keep=min_tokens_to_keep,
                seed=seed,
                max_kv_size=max_kv_size,
                prefill_step_size=prefill_step_size,
                num_draft_tokens=num_draft_tokens,
            ),
            draft_model=draft,
            prompt_cache=prompt_cache.read(prompt_cache_file, *models)
            if prompt_cache_file
            else None,
            write=None if as_json else write,
            on_prompt=lambda done, total: say(f"reading the prompt: {done:,} of {total:,} tokens"),
            note=fail if shown else None,
        )
    if as_json:
        record = {
            "model": str(path),
            **asdict(result),
            "load_seconds": load_seconds,
            "load": loaded.load_report.as_dict(),
            "kernels": kernels.counts(),
        }
        print(json.dumps(record))
        return
    print()
    if shown:
        print(f"{result.footer()}", file=sys.stderr)
        for line in (*loaded.load_report.lines(), *kernels.summary()):
            print(line, file=sys.stderr)


def _load_draft(path: Path, tokenizer: Any) -> Any:
    from .load import load

    draft, draft_tokenizer = load(path)
    if draft_tokenizer.vocab_size != tokenizer.vocab_size:
        raise MLXFuseError(
            f"the draft model has {draft_tokenizer.vocab_size:,} tokens, "
            f"the model {tokenizer.vocab_size:,}; they must share one vocabulary"
        )
    return draft


def _before_imports() -> None:
    """What must come before mlx and transformers, which advises to install torch."""
    from . import blas

    blas.preload()
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


@app.command("inspect", rich_help_panel="Look")
@command
def inspect_command(
    model: ModelArgument = None,
    model_option: ModelOption = None,
    revision: Revision = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show what a model's header tells; no weight is read."""
    from .inspect import inspect, render

    summary = inspect(_resolve(_one_model(model, model_option), revision, True))
    print(json.dumps(summary) if as_json else render(summary))
