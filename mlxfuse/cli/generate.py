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
from . import _options as opt
from ._common import (
    answer_writer,
    app,
    before_model,
    clean,
    command,
    load_model,
    one_model,
    resolve_model,
    show_report,
)
from .process import fail
from .progress import status_line


def _read_prompt(prompt: str) -> str:
    # mlx_lm.generate's rule: \n and \t in the argument are a newline and a tab.
    text = sys.stdin.read() if prompt == "-" else prompt.replace("\\n", "\n").replace("\\t", "\t")
    return clean(text)


@app.command("generate", rich_help_panel="Run")
@command
def generate_command(
    model: opt.ModelArgument = None,
    model_option: opt.ModelOption = None,
    revision: opt.Revision = None,
    dtype: opt.DTypeOption = None,
    fuse: opt.Fuse = "auto",
    act_quant: opt.ActQuantOption = opt.ActQuant.auto,
    draft_model: Annotated[
        str | None,
        opt.of_model("A smaller model with the same vocabulary, for speculative decoding."),
    ] = None,
    num_draft_tokens: Annotated[int, opt.of_model("Tokens drafted at a time.", min=1)] = 3,
    prompt_cache_file: Annotated[
        Path | None, opt.of_model("A stored prompt cache that the prompt follows.")
    ] = None,
    max_kv_size: opt.MaxKVSize = None,
    kv_bits: opt.KVBits = None,
    kv_group_size: opt.KVGroupSize = 64,
    quantized_kv_start: opt.QuantizedKVStart = 0,
    kv_rotate: opt.KVRotate = True,
    kv_force: opt.KVForce = False,
    prefill_step_size: opt.PrefillStepSize = 2048,
    prompt: Annotated[
        str, typer.Option("--prompt", "-p", help="The message; - reads it from stdin.")
    ] = "hello",
    system_prompt: opt.SystemPrompt = None,
    prefill_response: Annotated[str | None, typer.Option(help="How the answer begins.")] = None,
    ignore_chat_template: opt.IgnoreChatTemplate = False,
    chat_template_config: opt.ChatTemplateConfig = None,
    max_tokens: opt.MaxTokens = 100,
    temp: opt.Temp = 0.0,
    top_p: opt.TopP = 1.0,
    min_p: opt.MinP = 0.0,
    top_k: opt.TopK = 0,
    xtc_probability: opt.XTCProbability = 0.0,
    xtc_threshold: opt.XTCThreshold = 0.1,
    min_tokens_to_keep: opt.MinTokensToKeep = 1,
    seed: opt.Seed = None,
    extra_eos_token: opt.ExtraEOSToken = None,
    verbose: Annotated[
        str, opt.of_output("False: no progress and no footer.", metavar="BOOLEAN")
    ] = "True",
    as_json: opt.Json = False,
    debug: opt.Debug = False,
) -> None:
    """Answer one prompt: the text on stdout, progress and speeds on stderr."""
    ref = one_model(model, model_option)
    config = opt.json_object(chat_template_config)
    if max_kv_size and (draft_model or prompt_cache_file):
        raise typer.BadParameter(
            "--max-kv-size cannot be combined with --draft-model or --prompt-cache-file"
        )
    shown = verbose.lower() not in ("false", "f")
    text = _read_prompt(prompt)
    kv = before_model(fuse, kv_bits, kv_group_size, kv_rotate)
    path = resolve_model(ref, revision, shown)
    draft_path = resolve_model(draft_model, None, shown) if draft_model else None

    stdout = sys.stdout
    # mlx-lm prints warnings on stdout.
    with redirect_stdout(sys.stderr), status_line(shown and not as_json) as say:
        say(f"loading {path.name}")
        from .. import kernels
        from ..text import generate as engine
        from ..text import prompt_cache

        if prompt_cache_file:
            prompt_cache.expect_model(prompt_cache_file, ref)
        kernels.launches.clear()
        kernels.fallbacks.clear()
        start = time.perf_counter()
        loaded, tokenizer = load_model(path, dtype, fuse, act_quant)
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
                kv=kv,
                quantized_kv_start=quantized_kv_start,
                kv_force=kv_force,
            ),
            draft_model=draft,
            prompt_cache=prompt_cache.read(prompt_cache_file, *models)
            if prompt_cache_file
            else None,
            write=None if as_json else answer_writer(stdout, say),
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
        if result.kv_cache:
            print(result.kv_cache, file=sys.stderr)
        show_report(loaded.load_report)


def _load_draft(path: Path, tokenizer: Any) -> Any:
    from ..loader import load

    draft, draft_tokenizer = load(path)
    if draft_tokenizer.vocab_size != tokenizer.vocab_size:
        raise MLXFuseError(
            f"the draft model has {draft_tokenizer.vocab_size:,} tokens, "
            f"the model {tokenizer.vocab_size:,}; they must share one vocabulary"
        )
    return draft
