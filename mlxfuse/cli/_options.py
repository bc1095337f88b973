"""The options that several commands have, in groups; each is declared once.

A group is a dataclass that `flat` turns into a command's parameters. ``rare`` options are left
out of ``--help``, which is to fit a screen, and are shown by ``--help-all``.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from ..terminal import one_line
from ._models import before_imports, complete_model, expect_gguf, resolve_model
from ._ranks import team, together


class DType(StrEnum):
    """Names of the activation types, as in mlx.core."""

    float16 = "float16"
    bfloat16 = "bfloat16"
    float32 = "float32"


class ActQuant(StrEnum):
    """As in `mlxfuse.patch_model`."""

    auto = "auto"
    on = "on"
    off = "off"


MODEL, CACHE, SAMPLING, OUTPUT, TESTS = "Model", "Key-value cache", "Sampling", "Output", "Tests"


def finite(value: float | None) -> float | None:
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is not a finite number")
    return value


def option(panel: str, help: str, *names: str, rare: bool = False, **more: Any) -> Any:
    if more.get("callback") is finite:
        more.setdefault("metavar", "NUMBER")
    return typer.Option(*names, help=help, rich_help_panel=panel, hidden=rare, **more)


of_model = functools.partial(option, MODEL)
of_cache = functools.partial(option, CACHE)
of_sampling = functools.partial(option, SAMPLING)
of_output = functools.partial(option, OUTPUT)
of_tests = functools.partial(option, TESTS)
of_text = functools.partial(option, "Options")
fraction = functools.partial(of_sampling, min=0, max=1, callback=finite)
number = functools.partial(of_sampling, callback=finite)


def model_argument(help: str) -> Any:
    return typer.Argument(metavar="MODEL", help=help, autocompletion=complete_model)


Revision = Annotated[
    str | None,
    of_model("Branch, tag or commit of the hub repository.", metavar="NAME", rare=True),
]
Delay = Annotated[float, of_tests("Seconds to cool down before every run.", min=0, callback=finite)]


@dataclass(frozen=True, kw_only=True)
class Model:
    """Which model; nothing means the demo model."""

    model: Annotated[
        str | None,
        model_argument(
            "A .gguf file, a folder, a hub repository such as org/repo:Q4_K_M, or nothing for "
            "the demo model (93 MB)."
        ),
    ] = None
    model_option: Annotated[str | None, of_model("The same as MODEL.", "--model", rare=True)] = None
    revision: Revision = None

    @property
    def ref(self) -> str | None:
        if self.model is not None and self.model_option is not None:
            raise typer.BadParameter(
                f"the model is given twice: {one_line(self.model)!r} and "
                f"--model {one_line(self.model_option)!r}"
            )
        return self.model if self.model_option is None else self.model_option

    def fetch(self, shown: bool = True) -> Path:
        """Its path, downloaded if need be.

        Args:
            shown: show how far a download has come.
        """
        return resolve_model(self.ref, self.revision, shown)


Type = Annotated[
    DType | None,
    of_model("Type of the activations, such as float16.", metavar="TYPE"),
]


ActQuantOption = Annotated[
    ActQuant,
    of_model(
        "on: round activations to int8 (32 share a scale) wherever what reads them takes "
        "that; it costs some quality. auto: where it was measured to be faster, so far "
        "nowhere. Not mlx_lm's --quantize-activations, which is for models quantised as mxfp8 "
        "or nvfp4.",
        "--act-quant",
        rare=True,
    ),
]


Pipeline = Annotated[
    bool,
    of_model(
        "Under mlx.launch: each machine has some of the layers, and not a part of each; for slow "
        "links.",
        "--pipeline",
        rare=True,
    ),
]


@dataclass(frozen=True, kw_only=True)
class Fusing:
    """In which type a model computes, and what of it is fused."""

    dtype: Type = None
    fuse: Annotated[str, of_model("What to fuse: auto, all, off, or names.", metavar="NAMES")] = (
        "auto"
    )

    def check(self) -> None:
        """Refuse fusions without a meaning, before a model is downloaded for them."""
        before_imports()
        from ..fusion import chosen

        try:
            chosen(self.fuse)
        except ValueError as error:
            raise typer.BadParameter(
                f"--{error}" if str(error).startswith("fuse ") else str(error)
            ) from None


@dataclass(frozen=True, kw_only=True)
class Loading(Fusing):
    """How a model is loaded."""

    adapter_path: Annotated[
        Path | None,
        of_model("A folder with a LoRA adapter that mlx_lm.lora wrote.", metavar="FOLDER"),
    ] = None
    act_quant: ActQuantOption = ActQuant.auto
    ignore_memory: Annotated[
        bool, of_model("Load a model that does not fit in memory.", "--ignore-memory", rare=True)
    ] = False
    pipeline: Pipeline = False

    def check(self) -> None:
        """Refuse what means nothing, before a model is downloaded for it."""
        super().check()
        together(pipeline=self.pipeline)

    def load(self, path: Path, say: Callable[[str], None]) -> tuple[Any, Any]:
        """`mlxfuse.load` as the options say.

        Args:
            say: is told how far it has come.
        """
        from ..loader import load

        ranks = team()
        say(f"loading {path.name}")
        return load(
            path,
            progress=lambda share: say(f"loading {path.name}: {share:.0%}"),
            adapter_path=self.adapter_path,
            dtype=self.dtype and self.dtype.value,
            fuse=self.fuse,
            act_quant=self.act_quant.value,
            ignore_memory=self.ignore_memory,
            group=None if ranks is None else ranks.group,
            pipeline=self.pipeline and ranks is not None,
        )


@dataclass(frozen=True, kw_only=True)
class Compression:
    """How the key-value cache is compressed."""

    kv_bits: Annotated[
        str | None,
        of_cache(
            "Compress it: 8 or 4 bits, or keys and values apart, as k8v4 (advised) or k16v8.",
            metavar="BITS",
        ),
    ] = None
    kv_group_size: Annotated[
        int,
        of_cache(
            "Values of a head that share a scale: 32, 64 or 128.", metavar="INTEGER", rare=True
        ),
    ] = 64
    kv_rotate: Annotated[
        bool,
        of_cache(
            "Rotate keys and values before they are compressed.",
            "--kv-rotate/--no-kv-rotate",
            rare=True,
        ),
    ] = True
    kv_layers: Annotated[
        str,
        of_cache(
            "Compress that of all layers, or of the full ones only: those with a sliding window "
            "stay plain.",
            metavar="all|full",
            rare=True,
        ),
    ] = "all"
    kv_force: Annotated[
        bool,
        of_cache("Compress keys of models that are known to suffer from it.", rare=True),
    ] = False

    def scheme(self) -> Any:
        """A `KVOptions`, or None; a usage error where the options mean nothing."""
        if self.kv_bits is None:
            for option in fields(Compression):
                if getattr(self, option.name) != option.default:
                    name = "no_kv_rotate" if option.name == "kv_rotate" else option.name
                    name = name.replace("_", "-")
                    raise typer.BadParameter(f"--{name} is about a compressed cache: add --kv-bits")
            return None
        before_imports()
        from ..nn.kv.options import KVOptions

        try:
            return KVOptions.parse(self.kv_bits, self.kv_group_size, self.kv_rotate, self.kv_layers)
        except ValueError as error:
            raise typer.BadParameter(str(error)) from None


@dataclass(frozen=True, kw_only=True)
class Judged:
    """What a model is to be used with, where it is only judged."""

    context: Annotated[
        int,
        of_model("Tokens it is to be used with (default: all it can).", "-c", "--ctx-size", min=0),
    ] = 0
    kv_bits: Annotated[
        str | None,
        of_cache("With a compressed key-value cache: 8, 4 or for example k8v4.", metavar="BITS"),
    ] = None

    ranks: Annotated[
        int | None,
        of_model(
            "Also tell what each of so many machines would hold, under mlx.launch.",
            min=2,
            max=1024,
            metavar="INTEGER",
        ),
    ] = None

    pipeline: Pipeline = False

    def check(self) -> None:
        """Refuse what means nothing."""
        if self.pipeline and self.ranks is None:
            raise typer.BadParameter("--pipeline is about several machines: add --ranks")

    def by_rank(self, path: Path, here: Any) -> list[dict[str, Any]]:
        """What each of ``--ranks`` would hold; empty without the option."""
        if self.ranks is None:
            return []
        from ..inspect.ranks import by_rank

        expect_gguf(path, "--ranks")
        how: dict[str, Any] = {"context": self.context, "bits": self.bits()}
        return by_rank(path, self.ranks, here, pipeline=self.pipeline, **how)

    def bits(self) -> Any:
        """A `KVBits`; a usage error where the option means nothing."""
        from ..inspect.needs import PLAIN, KVBits

        scheme = Compression(kv_bits=self.kv_bits).scheme()
        return KVBits(scheme.k_bits, scheme.v_bits, scheme.group_size) if scheme else PLAIN


QuantizedKVStart = Annotated[
    int, of_cache("Tokens up to which it is left as it is.", min=0, metavar="INTEGER", rare=True)
]


@dataclass(frozen=True, kw_only=True)
class Cache(Compression):
    """And from which token on; with how much is read at a time."""

    quantized_kv_start: QuantizedKVStart = 0
    prefill_step_size: Annotated[
        int,
        of_cache(
            "Prompt tokens processed at a time; fewer take less memory.",
            min=1,
            metavar="INTEGER",
            rare=True,
        ),
    ] = 2048

    def settings(self) -> dict[str, Any]:
        """The fields of `mlxfuse.generate.run.Settings`."""
        return {
            "kv": self.scheme(),
            "quantized_kv_start": self.quantized_kv_start,
            "kv_force": self.kv_force,
            "prefill_step_size": self.prefill_step_size,
        }


@dataclass(frozen=True, kw_only=True)
class BoundedCache(Cache):
    max_kv_size: Annotated[
        int | None,
        of_cache("Keep at most this many tokens in it.", min=5, metavar="INTEGER"),
    ] = None

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "max_kv_size": self.max_kv_size}


@dataclass(frozen=True, kw_only=True)
class Verbosity:
    """How much is said on stderr."""

    quiet: Annotated[
        bool, of_output("No progress, no footer: only the answer.", "--quiet", "-q")
    ] = False
    verbose: Annotated[
        bool, of_output("Also what loading took, step by step.", "--verbose", "-v")
    ] = False

    @property
    def shown(self) -> bool:
        return not self.quiet


def _help_all(context: typer.Context, wanted: bool) -> None:
    if wanted:
        parameters: list[Any] = list(context.command.params)
        for parameter in parameters:
            parameter.hidden = False
        typer.echo(context.get_help())
        raise typer.Exit


@dataclass(frozen=True, kw_only=True)
class Debug:
    debug: Annotated[bool, of_output("Show tracebacks.", "--debug", rare=True)] = False
    help_all: Annotated[
        bool,
        of_text(
            "Show this, with the rarer options.", "--help-all", is_eager=True, callback=_help_all
        ),
    ] = False


@dataclass(frozen=True, kw_only=True)
class Output(Debug):
    """What is printed."""

    as_json: Annotated[bool, of_output("One JSON object on stdout.", "--json")] = False
