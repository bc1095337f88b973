"""The options that several commands have, each said once."""

from __future__ import annotations

import functools
import json
import math
from enum import StrEnum
from typing import Annotated, Any

import typer

from ..terminal import one_line


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


def finite(value: float) -> float:
    if not math.isfinite(value):
        raise typer.BadParameter(f"{value} is not a finite number")
    return value


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


def json_object(text: str | None) -> dict[str, Any]:
    try:
        value = json.loads(text or "{}")
    except (ValueError, RecursionError) as error:
        raise typer.BadParameter(f"not JSON: {error}") from None
    if not isinstance(value, dict):
        raise typer.BadParameter(f"expected a JSON object, found {one_line(str(text))}")
    return value


MODEL, SAMPLING, OUTPUT, TESTS = "Model", "Sampling", "Output", "Tests"
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


def option(panel: str, help: str, *names: str, **more: Any) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=panel, **more)


of_model = functools.partial(option, MODEL)
of_sampling = functools.partial(option, SAMPLING)
of_output = functools.partial(option, OUTPUT)
fraction = functools.partial(of_sampling, min=0, max=1, callback=finite)
DTypeOption = Annotated[
    DType | None, of_model("Type of the activations (default: by architecture and device).")
]
Fuse = Annotated[
    str,
    of_model("What to fuse: auto (all where kernels run), all, off, or names (see README)."),
]
ActQuantOption = Annotated[
    ActQuant,
    of_model(
        "on: round activations to int8 (32 share a scale) wherever what reads them takes that; "
        "it costs some quality. auto: where it was measured to be faster, so far nowhere. Not "
        "mlx_lm's --quantize-activations, which is for models quantised as mxfp8 or nvfp4.",
        "--act-quant",
    ),
]
MaxKVSize = Annotated[
    int | None, of_model("Keep at most this many tokens in the key-value cache.", min=5)
]
PrefillStepSize = Annotated[
    int, of_model("Prompt tokens processed at a time; fewer take less memory.", min=1)
]
KVBits = Annotated[
    str | None,
    of_model(
        "Compress the key-value cache: 8 or 4 bits, or keys and values apart, as k8v4 (advised) "
        "or k16v8. Mind that 4-bit keys cost much of some models.",
        metavar="BITS",
    ),
]
KVGroupSize = Annotated[
    int, of_model("Values of a head that share a scale: 32, 64 or 128.", metavar="INTEGER")
]
QuantizedKVStart = Annotated[int, of_model("Tokens up to which the cache is left as it is.", min=0)]
KVRotate = Annotated[
    bool,
    of_model("Rotate keys and values before they are compressed.", "--kv-rotate/--no-kv-rotate"),
]
KVForce = Annotated[
    bool, of_model("Compress keys of models that are known to suffer from it.", "--kv-force")
]
SystemPrompt = Annotated[str | None, typer.Option(help="The system message.")]
IgnoreChatTemplate = Annotated[
    bool, typer.Option("--ignore-chat-template", help="Continue the prompt as raw text.")
]
ChatTemplateConfig = Annotated[
    str | None, typer.Option(help="A JSON object of values for the chat template.")
]
Delay = Annotated[
    float, option(TESTS, "Seconds to cool down before every run.", min=0, callback=finite)
]
MaxTokens = Annotated[
    int,
    of_sampling(
        "Tokens to generate at most; -1: no limit.",
        "--max-tokens",
        "-m",
        parser=_max_tokens,
        metavar="INTEGER",
    ),
]
Temp = Annotated[float, of_sampling("Temperature; 0: greedy.", min=0, callback=finite)]
TopP = Annotated[float, fraction("Nucleus sampling; 1: off.")]
MinP = Annotated[float, fraction("Least probability, relative to the best; 0: off.")]
TopK = Annotated[int, of_sampling("Sample among the best K; 0: off.", min=0)]
XTCProbability = Annotated[float, fraction("Chance of XTC sampling for each token.")]
XTCThreshold = Annotated[float, of_sampling("XTC's threshold.", min=0, max=0.5, callback=finite)]
MinTokensToKeep = Annotated[int, of_sampling("Tokens that --min-p always leaves.", min=1)]
Seed = Annotated[int | None, of_sampling("Seed of the random numbers.", min=0, max=2**64 - 1)]
ExtraEOSToken = Annotated[
    list[str] | None,
    of_sampling("A further token that ends the answer (may be repeated)."),
]
