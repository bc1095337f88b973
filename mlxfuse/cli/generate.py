"""``mlxfuse generate``."""

from __future__ import annotations

import json
import sys
import time
from contextlib import redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import MLXFuseError
from ..process import fail
from ..progress import status_line
from ..terminal import neutralize, one_line
from ._common import (
    Debug,
    DType,
    Json,
    ModelArgument,
    ModelOption,
    Revision,
    app,
    before_imports,
    clean,
    command,
    finite,
    fraction,
    of_model,
    of_output,
    of_sampling,
    one_model,
    resolve_model,
)


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
    return clean(text)


@app.command("generate", rich_help_panel="Run")
@command
def generate_command(
    model: ModelArgument = None,
    model_option: ModelOption = None,
    revision: Revision = None,
    dtype: Annotated[
        DType | None, of_model("Type of the activations (default: by architecture and device).")
    ] = None,
    fuse: Annotated[
        str,
        of_model("What to fuse: auto (all where kernels run), all, off, or qkv,gate_up,residual."),
    ] = "auto",
    draft_model: Annotated[
        str | None, of_model("A smaller model with the same vocabulary, for speculative decoding.")
    ] = None,
    num_draft_tokens: Annotated[int, of_model("Tokens drafted at a time.", min=1)] = 3,
    prompt_cache_file: Annotated[
        Path | None, of_model("A stored prompt cache that the prompt follows.")
    ] = None,
    max_kv_size: Annotated[
        int | None, of_model("Keep at most this many tokens in the key-value cache.", min=5)
    ] = None,
    prefill_step_size: Annotated[
        int, of_model("Prompt tokens processed at a time; fewer take less memory.", min=1)
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
        of_sampling(
            "Tokens to generate at most; -1: no limit.",
            "--max-tokens",
            "-m",
            parser=_max_tokens,
            metavar="INTEGER",
        ),
    ] = 100,
    temp: Annotated[float, of_sampling("Temperature; 0: greedy.", min=0, callback=finite)] = 0.0,
    top_p: Annotated[float, fraction("Nucleus sampling; 1: off.")] = 1.0,
    min_p: Annotated[float, fraction("Least probability, relative to the best; 0: off.")] = 0.0,
    top_k: Annotated[int, of_sampling("Sample among the best K; 0: off.", min=0)] = 0,
    xtc_probability: Annotated[float, fraction("Chance of XTC sampling for each token.")] = 0.0,
    xtc_threshold: Annotated[
        float, of_sampling("XTC's threshold.", min=0, max=0.5, callback=finite)
    ] = 0.1,
    min_tokens_to_keep: Annotated[
        int, of_sampling("Tokens that --min-p always leaves.", min=1)
    ] = 1,
    seed: Annotated[
        int | None, of_sampling("Seed of the random numbers.", min=0, max=2**64 - 1)
    ] = None,
    extra_eos_token: Annotated[
        list[str] | None,
        of_sampling("A further token that ends the answer (may be repeated)."),
    ] = None,
    verbose: Annotated[
        str, of_output("False: no progress and no footer.", metavar="BOOLEAN")
    ] = "True",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Answer one prompt: the text on stdout, progress and speeds on stderr."""
    ref = one_model(model, model_option)
    config = _json_object(chat_template_config)
    if max_kv_size and (draft_model or prompt_cache_file):
        raise typer.BadParameter(
            "--max-kv-size cannot be combined with --draft-model or --prompt-cache-file"
        )
    shown = verbose.lower() not in ("false", "f")
    text = _read_prompt(prompt)
    path = resolve_model(ref, revision, shown)
    draft_path = resolve_model(draft_model, None, shown) if draft_model else None

    before_imports()
    stdout = sys.stdout
    on_terminal = stdout.isatty()

    def write(piece: str) -> None:
        say(None)
        stdout.write(neutralize(piece) if on_terminal else piece)
        stdout.flush()

    # mlx-lm prints warnings on stdout.
    with redirect_stdout(sys.stderr), status_line(shown and not as_json) as say:
        say(f"loading {path.name}")
        from .. import generate as engine
        from .. import kernels, prompt_cache
        from ..fusion import chosen
        from ..loader import load

        try:
            chosen(fuse)
        except ValueError as error:
            raise typer.BadParameter(f"--fuse: {error}") from None

        if prompt_cache_file:
            prompt_cache.expect_model(prompt_cache_file, ref)
        kernels.launches.clear()
        kernels.fallbacks.clear()
        start = time.perf_counter()
        loaded, tokenizer = load(path, dtype=dtype and dtype.value, fuse=fuse)
        draft = _load_draft(draft_path, tokenizer) if draft_path else None
        load_seconds = time.perf_counter() - start
        say("reading the prompt")
        models = [loaded] if draft is None else [loaded, draft]
        result = engine.generate(
            loaded,
            tokenizer,
            engine.Settings(
                prompt=text,
                system_prompt=system_prompt and clean(system_prompt),
                prefill_response=prefill_response and clean(prefill_response),
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
    from ..loader import load

    draft, draft_tokenizer = load(path)
    if draft_tokenizer.vocab_size != tokenizer.vocab_size:
        raise MLXFuseError(
            f"the draft model has {draft_tokenizer.vocab_size:,} tokens, "
            f"the model {tokenizer.vocab_size:,}; they must share one vocabulary"
        )
    return draft
