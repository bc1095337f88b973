"""The options of what is said and how it is answered, in groups, as in `_options`."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import MLXFuseError
from ..terminal import one_line
from ._options import fraction, number, of_model, of_sampling, of_text


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
        raise typer.BadParameter(f"--chat-template-config: not JSON: {error}") from None
    if not isinstance(value, dict):
        raise typer.BadParameter(
            f"--chat-template-config: expected a JSON object, found {one_line(str(text))}"
        )
    return value


def clean(text: str) -> str:
    """Bytes that were not UTF-8 arrive as lone surrogates; no tokenizer takes those."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _logit_bias(items: list[str] | None) -> dict[int, float] | None:
    """``15043+1``, as llama.cpp writes it: a token's id and what is added to its logit."""
    found = {}
    for item in items or ():
        match = re.fullmatch(r"(\d{1,9})([+-].+)", item.strip())
        try:
            if match is None:
                raise ValueError
            found[int(match[1])] = float(match[2])
        except ValueError:
            raise typer.BadParameter(
                f"--logit-bias: {one_line(item)!r}: expected a token's id and what to add to its "
                "logit, such as 15043+1 or 15043-inf"
            ) from None
    return found or None


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


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """`mlxfuse.generate.sampling.Sampling`; what is None is as the model's file says, else its
    default there.
    """

    max_tokens: MaxTokens = 100
    temp: Annotated[
        float | None, number("Temperature; 0: greedy (default: the file's, else 0).", min=0)
    ] = None
    top_p: Annotated[float | None, fraction("Nucleus sampling; 1: off.")] = None
    min_p: Annotated[float | None, fraction("Least probability relative to the best.")] = None
    top_k: Annotated[
        int | None, of_sampling("Sample among the best K; 0: off.", min=0, metavar="INTEGER")
    ] = None
    xtc_probability: Annotated[
        float | None, fraction("Chance of XTC sampling for each token.", rare=True)
    ] = None
    xtc_threshold: Annotated[
        float | None, number("XTC's threshold (default: 0.1).", min=0, max=0.5, rare=True)
    ] = None
    min_tokens_to_keep: Annotated[
        int | None, of_sampling("Tokens that --min-p always leaves.", min=1, rare=True)
    ] = None
    repetition_penalty: Annotated[
        float | None, number("Divides the logits of recent tokens; 1: off.", min=0)
    ] = None
    presence_penalty: Annotated[
        float | None, number("Subtracted from the logits of recent tokens.", rare=True)
    ] = None
    frequency_penalty: Annotated[
        float | None, number("The same for each time that they occur.", rare=True)
    ] = None
    repetition_context_size: Annotated[
        int | None,
        of_sampling("How many tokens are recent (default: 64).", min=0, rare=True),
    ] = None
    logit_bias: Annotated[
        list[str] | None,
        of_sampling(
            "Add to a token's logit: 15043+1, 15043-inf (may be repeated).",
            metavar="ID+BIAS",
            rare=True,
        ),
    ] = None
    stop: Annotated[
        list[str] | None,
        of_sampling("End before this text (may be repeated).", metavar="TEXT"),
    ] = None
    extra_eos_token: Annotated[
        list[str] | None,
        of_sampling(
            "A further token that ends the answer (may be repeated).", metavar="TOKEN", rare=True
        ),
    ] = None
    seed: Annotated[
        int | None,
        of_sampling("Seed of the random numbers.", min=0, max=2**64 - 1, metavar="INTEGER"),
    ] = None

    def given(self) -> dict[str, Any]:
        """The fields of `Sampling` that the command line gives."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        values["logit_bias"] = _logit_bias(self.logit_bias)
        for name in ("stop", "extra_eos_token"):
            values[name] = tuple(map(clean, values[name] or ())) or None
        return {name: value for name, value in values.items() if value is not None}


PromptLookup = Annotated[
    bool,
    of_model("Draft tokens from what the text said before.", "--prompt-lookup"),
]
NumDraftTokens = Annotated[
    int | None,
    of_model(
        "Tokens drafted at a time (default: 3 by a model, 7 by look-up).",
        min=1,
        max=64,
        metavar="INTEGER",
        rare=True,
    ),
]


ChatTemplateConfig = Annotated[
    str | None,
    of_text("A JSON object of values for the chat template.", metavar="JSON", rare=True),
]


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """What the chat template is given."""

    system_prompt: Annotated[str | None, of_text("The system message.", metavar="TEXT")] = None
    system_prompt_file: Annotated[
        Path | None, of_text("The same from a file.", metavar="FILE", rare=True)
    ] = None
    chat_template_config: ChatTemplateConfig = None

    def settings(self) -> dict[str, Any]:
        """The fields of `mlxfuse.generate.run.Settings`."""
        if self.system_prompt is not None and self.system_prompt_file is not None:
            raise typer.BadParameter("give --system-prompt or --system-prompt-file, not both")
        system = self.system_prompt
        if self.system_prompt_file is not None:
            system = read_text(self.system_prompt_file)
        return {
            "system_prompt": system and clean(system),
            "chat_template_config": json_object(self.chat_template_config),
        }


def read_text(path: Path) -> str:
    """A file of text.

    Raises:
        MLXFuseError: it is not in UTF-8.
        OSError: it cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise MLXFuseError(f"{path}: expected a text in UTF-8: {error}") from None
