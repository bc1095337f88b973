"""``mlxfuse bench``."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import MLXFuseError
from ..files import write_text
from . import _options as opt
from ._common import (
    app,
    before_model,
    command,
    model_or_checkpoint,
    one_model,
)
from .progress import status_line


class Output(StrEnum):
    """Forms of the result."""

    md = "md"
    json = "json"
    jsonl = "jsonl"
    csv = "csv"


class Stock(StrEnum):
    """What stock MLX-LM is given."""

    exact = "exact"
    affine = "affine"


def _counts(name: str, text: str) -> list[int]:
    from ..bench.measure import numbers

    try:
        return numbers(text)
    except ValueError as error:
        raise typer.BadParameter(f"{name} {error}") from None


@app.command("bench", rich_help_panel="Measure")
@command
def bench_command(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help="A .gguf file, a folder with an MLX-LM checkpoint, a hub repository such as "
            "org/repo:Q4_K_M, or nothing for the demo model; kernels: each kernel by itself; "
            "a report (.json): only draw its --plot.",
        ),
    ] = None,
    model_option: opt.ModelOption = None,
    revision: opt.Revision = None,
    dtype: opt.DTypeOption = None,
    fuse: opt.Fuse = "auto",
    kv_bits: opt.KVBits = None,
    kv_group_size: opt.KVGroupSize = 64,
    quantized_kv_start: opt.QuantizedKVStart = 0,
    kv_rotate: opt.KVRotate = True,
    kv_force: opt.KVForce = False,
    stock: Annotated[
        Stock,
        opt.option(
            opt.TESTS,
            "Stock MLX-LM's weights where MLX cannot hold the file's: exact, which are dense, or "
            "affine, requantised to about the same size.",
        ),
    ] = Stock.exact,
    n_prompt: Annotated[
        str | None,
        opt.option(
            opt.TESTS,
            "Tokens of a prompt: 512,1024 or 128-1024*2 or 0-512+256 (default: 512; CPU: 64).",
            "--n-prompt",
            "-p",
        ),
    ] = None,
    n_gen: Annotated[
        str | None,
        opt.option(
            opt.TESTS, "Tokens decoded one by one (default: 128; CPU: 16).", "--n-gen", "-n"
        ),
    ] = None,
    n_depth: Annotated[
        str, opt.option(opt.TESTS, "Tokens in the cache before that.", "--n-depth", "-d")
    ] = "0",
    repetitions: Annotated[
        int | None,
        opt.option(
            opt.TESTS,
            "Runs of each, in turns; best an even number (default: 6; CPU: 4).",
            "--repetitions",
            "-r",
            min=1,
            max=1000,
        ),
    ] = None,
    delay: opt.Delay = 0.0,
    compare: Annotated[
        list[Path] | None,
        opt.option(opt.TESTS, "Add what `llama-bench -o json` has found for the same file."),
    ] = None,
    llama_bench: Annotated[
        bool,
        opt.option(opt.TESTS, "Let the llama-bench of the PATH take its turn.", "--llama-bench"),
    ] = False,
    output: Annotated[Output, opt.of_output("Form of the result.", "--output", "-o")] = Output.md,
    report: Annotated[
        Path | None,
        opt.of_output("Also write the result to this file, as JSON: to keep or to send."),
    ] = None,
    plot: Annotated[Path | None, opt.of_output("Also draw the result in this SVG file.")] = None,
    as_json: opt.Json = False,
    debug: opt.Debug = False,
) -> None:
    """Time a model in stock MLX-LM and in mlxfuse, in turns, after comparing their outputs."""
    form = "json" if as_json else output.value
    ref = one_model(model, model_option)
    if ref is not None and ref.endswith(".json"):
        _redraw(Path(ref), plot)
        return
    sizes = {"-p": n_prompt, "-n": n_gen, "-d": n_depth}
    given = {name: _counts(name, text) for name, text in sizes.items() if text is not None}
    for target in (report, plot):
        if target is not None and not target.absolute().parent.is_dir():
            raise typer.BadParameter(f"there is no folder {target.absolute().parent}")

    kv = before_model(fuse, kv_bits, kv_group_size, kv_rotate)
    with redirect_stdout(sys.stderr), status_line(True) as say:
        found: dict[str, Any]
        if ref == "kernels":
            if given.keys() - {"-d"} or compare or llama_bench or kv:
                raise typer.BadParameter(
                    "-p, -n, --compare, --llama-bench and --kv-bits need a model"
                )
            from ..bench.kernels import bench_kernels

            found = bench_kernels(repetitions=repetitions or 20, pause=delay, say=say)
        else:
            import mlx.core as mx

            from ..bench import llama
            from ..bench.measure import tests
            from ..bench.run import about, bench

            path, folder = model_or_checkpoint(ref, revision)
            on_cpu = mx.default_device() == mx.cpu
            usual = {"-p": 64, "-n": 16, "-d": 0} if on_cpu else {"-p": 512, "-n": 128, "-d": 0}
            counts = {name: given.get(name, [usual[name]]) for name in usual}
            wanted = tests(counts["-p"], counts["-n"], counts["-d"])
            if not wanted:
                raise typer.BadParameter("-p and -n are both 0: there is nothing to time")
            if folder and (compare or llama_bench):
                raise MLXFuseError("llama-bench runs GGUF files; this is an MLX-LM checkpoint")
            others = [row for file in compare or [] for row in llama.read(file, about(path))]
            extras = [llama.LlamaBench(path, about(path))] if llama_bench else []
            found = bench(
                path,
                wanted,
                repetitions=repetitions or (4 if on_cpu else 6),
                pause=delay,
                dtype=dtype and dtype.value,
                fuse=fuse,
                stock=stock.value,
                kv=kv,
                kv_start=quantized_kv_start,
                kv_force=kv_force,
                extras=extras,
                say=say,
            )
            llama.add(found, others)
        say(None)
    from ..bench.output import render

    if report is not None:
        write_text(report, render(found, "json") + "\n", 0o644)
    if plot is not None:
        _draw(found, plot)
    print(render(found, form))


def _redraw(report: Path, plot: Path | None) -> None:
    if plot is None:
        raise typer.BadParameter(f"{report} is a report: say where to draw it with --plot out.svg")
    from ..bench.plot import read

    _draw(read(report), plot)


def _draw(found: dict[str, Any], plot: Path) -> None:
    from ..bench.plot import draw

    write_text(plot, draw(found), 0o644)
