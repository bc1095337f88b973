"""``mlxfuse bench``."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from .. import env
from ..errors import KernelError, MLXFuseError
from ..files import write_bytes, write_text
from ..process import fail
from ..terminal import one_line
from . import _options as opt
from ._common import command
from ._ranks import alone, team, together
from .progress import status_line

LLAMA = "As in llama-bench"


class Form(StrEnum):
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


@dataclass(frozen=True, kw_only=True)
class Timed(opt.Model):
    model: Annotated[
        str | None,
        opt.model_argument(
            "A model (.gguf file, folder, org/repo:Q4_K_M, or nothing for the demo model); "
            "kernels: each kernel by itself; a report (.json): only draw its --plot."
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class Arms:
    """What of mlxfuse is timed beside stock MLX-LM."""

    dtype: opt.Type = None
    fuse: Annotated[
        list[str],
        opt.of_model("What to fuse: auto, all, off, or names; more of it, more arms."),
    ] = field(default_factory=lambda: ["auto"])
    act_quant: opt.ActQuantOption = opt.ActQuant.auto
    pipeline: opt.Pipeline = False

    def check(self) -> None:
        """Refuse fusions without a meaning, before a model is downloaded for them."""
        for choice in self.fuse:
            opt.Fusing(fuse=choice).check()
        together(pipeline=self.pipeline)


@dataclass(frozen=True, kw_only=True)
class Tests:
    """What is timed."""

    stock: Annotated[
        Stock,
        opt.of_tests(
            "Stock MLX-LM's weights where MLX cannot hold the file's: exact, which are dense, or "
            "affine, requantised to about the same size.",
            rare=True,
        ),
    ] = Stock.exact
    n_prompt: Annotated[
        str | None,
        opt.of_tests(
            "Tokens of a prompt: 512,1024 or 128-1024*2 or 0-512+256 (default: 512; CPU: 64).",
            "--n-prompt",
            "-p",
            metavar="COUNTS",
        ),
    ] = None
    n_gen: Annotated[
        str | None,
        opt.of_tests(
            "Tokens decoded one by one (default: 128; CPU: 16).", "--n-gen", "-n", metavar="COUNTS"
        ),
    ] = None
    n_depth: Annotated[
        str,
        opt.of_tests("Tokens in the cache before that.", "--n-depth", "-d", metavar="COUNTS"),
    ] = "0"
    repetitions: Annotated[
        int | None,
        opt.of_tests(
            "Runs of each, in turns; best an even number (default: 6; CPU: 4).",
            "--repetitions",
            "-r",
            min=1,
            max=1000,
            metavar="INTEGER",
        ),
    ] = None
    delay: opt.Delay = 0.0
    compare: Annotated[
        list[Path] | None,
        opt.of_tests("Add what `llama-bench -o json` has found for the same file.", metavar="FILE"),
    ] = None
    llama_bench: Annotated[
        bool, opt.of_tests("Let the llama-bench of the PATH take its turn.", "--llama-bench")
    ] = False

    def counts(self) -> dict[str, list[int]]:
        """The sizes that are given, by their short option."""
        sizes = {"-p": self.n_prompt, "-n": self.n_gen, "-d": self.n_depth}
        return {name: _counts(name, text) for name, text in sizes.items() if text is not None}


@dataclass(frozen=True, kw_only=True)
class Written(opt.Output):
    output: Annotated[Form, opt.of_output("Form of the result.", "--output", "-o")] = Form.md
    report: Annotated[
        Path | None,
        opt.of_output("Also write the result to this file, as JSON.", metavar="FILE"),
    ] = None
    plot: Annotated[
        Path | None, opt.of_output("Also draw the result: .svg or .png.", metavar="FILE")
    ] = None


@dataclass(frozen=True, kw_only=True)
class Cache(opt.Compression):
    quantized_kv_start: opt.QuantizedKVStart = 0


_KV_TYPES = {"f16": 16, "bf16": 16, "f32": 16, "q8_0": 8, "q4_0": 4}


@dataclass(frozen=True, kw_only=True)
class LlamaBench:
    """llama-bench's options, so that its command lines can be pasted."""

    model_flag: Annotated[
        str | None, opt.option(LLAMA, "The same as MODEL.", "-m", metavar="MODEL", rare=True)
    ] = None
    type_k: Annotated[
        str | None,
        opt.option(LLAMA, "Keys: f16, q8_0, q4_0.", "-ctk", "--cache-type-k", rare=True),
    ] = None
    type_v: Annotated[
        str | None,
        opt.option(LLAMA, "Values: f16, q8_0, q4_0.", "-ctv", "--cache-type-v", rare=True),
    ] = None
    flash_attn: Annotated[
        str | None, opt.option(LLAMA, "No meaning here.", "-fa", "--flash-attn", rare=True)
    ] = None
    threads: Annotated[
        str | None, opt.option(LLAMA, "No meaning here.", "-t", "--threads", rare=True)
    ] = None
    batch_size: Annotated[
        str | None, opt.option(LLAMA, "No meaning here.", "-b", "--batch-size", rare=True)
    ] = None
    ubatch_size: Annotated[
        str | None, opt.option(LLAMA, "No meaning here.", "-ub", "--ubatch-size", rare=True)
    ] = None
    n_gpu_layers: Annotated[
        str | None, opt.option(LLAMA, "No meaning here.", "-ngl", "--n-gpu-layers", rare=True)
    ] = None

    def notes(self) -> list[str]:
        """Why an option that was given changes nothing."""
        reasons = {
            "-fa": (self.flash_attn, "MLX's attention never writes the scores to memory"),
            "-t": (self.threads, "MLX chooses its threads itself"),
            "-b": (self.batch_size, "a prompt is read at once"),
            "-ub": (self.ubatch_size, "a prompt is read at once"),
            "-ngl": (self.n_gpu_layers, "every layer runs on MLX's device"),
        }
        return [
            f"{flag} has no meaning here: {why}"
            for flag, (given, why) in reasons.items()
            if given is not None
        ]

    def kv_bits(self, other: str | None) -> str | None:
        """What ``--kv-bits`` would say; ``other`` is what it does say."""
        if self.type_k is None and self.type_v is None:
            return other
        if other is not None:
            raise typer.BadParameter("give --kv-bits or -ctk and -ctv, not both")
        bits = []
        for flag, kind in (("-ctk", self.type_k or "f16"), ("-ctv", self.type_v or "f16")):
            if kind.lower() not in _KV_TYPES:
                raise typer.BadParameter(
                    f"{flag}: {one_line(kind)} is not known; expected {', '.join(_KV_TYPES)}"
                )
            bits.append(_KV_TYPES[kind.lower()])
        return None if bits == [16, 16] else "k{}v{}".format(*bits)


@command(
    "Measure",
    "mlxfuse bench model-Q4_K_M.gguf -p 512 -n 128 -d 0,8192 --plot speeds.svg",
    ranks=True,
)
def bench_command(
    model: Timed,
    load: Arms,
    cache: Cache,
    tests: Tests,
    llama: LlamaBench,
    out: Written,
) -> None:
    """Time a model in stock MLX-LM and in mlxfuse, in turns, after comparing their outputs."""
    form = "json" if out.as_json else out.output.value
    if llama.model_flag is not None:
        model = replace(model, model_option=model.model_option or llama.model_flag)
    cache = replace(cache, kv_bits=llama.kv_bits(cache.kv_bits))
    for note in llama.notes():
        fail(note)
    alone("it runs by itself", llama_bench=tests.llama_bench)
    alone("a file is read by one process", compare=tests.compare)
    if env.launched_rank() is not None and model.ref == "kernels":
        raise typer.BadParameter("kernels are timed in one process: start it without mlx.launch")
    if out.plot is not None:
        from ..bench.plot import check

        check(out.plot)
    if model.ref is not None and model.ref.endswith(".json"):
        _redraw(Path(model.ref), out.plot)
        return
    for target in (out.report, out.plot):
        if target is not None and not target.absolute().parent.is_dir():
            raise typer.BadParameter(f"there is no folder {target.absolute().parent}")
    given = tests.counts()
    load.check()
    kv = cache.scheme()
    with redirect_stdout(sys.stderr), status_line(True) as say:
        if model.ref == "kernels":
            if given.keys() - {"-d"} or tests.compare or tests.llama_bench or kv:
                raise typer.BadParameter(
                    "-p, -n, --compare, --llama-bench and --kv-bits need a model"
                )
            from ..bench.kernels import bench_kernels

            found = bench_kernels(repetitions=tests.repetitions or 20, pause=tests.delay, say=say)
        else:
            found = _of_model(model, load, cache, tests, given, say)
        say(None)
    ranks = team()
    if ranks is not None and not ranks.first:
        return
    from ..bench.output import render

    if out.report is not None:
        write_text(out.report, render(found, "json") + "\n", 0o644)
    if out.plot is not None:
        _draw(found, out.plot)
    print(render(found, form))
    if refused := found.get("refused"):
        raise KernelError(f"{len(refused)} kernels do not compile or are wrong")


def _of_model(
    model: Timed,
    load: Arms,
    cache: Cache,
    options: Tests,
    given: dict[str, list[int]],
    say: Callable[[str | None], None],
) -> dict[str, Any]:
    import mlx.core as mx

    from ..bench import llama
    from ..bench.measure import tests
    from ..bench.run import about, bench
    from ..hub.folders import is_checkpoint

    path, ranks = model.fetch(), team()
    on_cpu = mx.default_device() == mx.cpu
    usual = {"-p": 64, "-n": 16, "-d": 0} if on_cpu else {"-p": 512, "-n": 128, "-d": 0}
    counts = {name: given.get(name, [usual[name]]) for name in usual}
    wanted = tests(counts["-p"], counts["-n"], counts["-d"])
    if not wanted:
        raise typer.BadParameter("-p and -n are both 0: there is nothing to time")
    if is_checkpoint(path) and (options.compare or options.llama_bench):
        raise MLXFuseError("llama-bench runs GGUF files; this is an MLX-LM checkpoint")
    others = [row for file in options.compare or [] for row in llama.read(file, about(path))]
    extras = [llama.LlamaBench(path, about(path))] if options.llama_bench else []
    found = bench(
        path,
        wanted,
        repetitions=options.repetitions or (4 if on_cpu else 6),
        pause=options.delay,
        dtype=load.dtype and load.dtype.value,
        fuse=load.fuse,
        act_quant=load.act_quant.value,
        stock=options.stock.value,
        kv=cache.scheme(),
        kv_start=cache.quantized_kv_start,
        kv_force=cache.kv_force,
        extras=extras,
        say=say,
        group=None if ranks is None else ranks.group,
        pipeline=load.pipeline,
    )
    llama.add(found, others)
    return found


def _redraw(report: Path, plot: Path | None) -> None:
    if plot is None:
        raise typer.BadParameter(f"{report} is a report: say where to draw it with --plot out.svg")
    from ..bench.plot import read

    _draw(read(report), plot)


def _draw(found: dict[str, Any], plot: Path) -> None:
    from ..bench.plot import draw

    write_bytes(plot, draw(found, plot.suffix.lower()), 0o644)
