"""``mlxfuse server``."""

from __future__ import annotations

import logging
import os
import sys
from typing import Annotated

import typer

from ..terminal import one_line
from . import _options as opt
from ._common import app, before_model, command, load_model, one_model, resolve_model, show_report
from .process import INTERRUPTED
from .progress import status_line

SERVER = "Server"


@app.command("server", rich_help_panel="Run")
@command
def server_command(
    model: opt.ModelArgument = None,
    model_option: opt.ModelOption = None,
    revision: opt.Revision = None,
    dtype: opt.DTypeOption = None,
    fuse: opt.Fuse = "auto",
    act_quant: opt.ActQuantOption = opt.ActQuant.auto,
    kv_bits: opt.KVBits = None,
    kv_group_size: opt.KVGroupSize = 64,
    quantized_kv_start: opt.QuantizedKVStart = 0,
    kv_rotate: opt.KVRotate = True,
    kv_force: opt.KVForce = False,
    prefill_step_size: opt.PrefillStepSize = 2048,
    host: Annotated[str, opt.option(SERVER, "Address to listen on.")] = "127.0.0.1",
    port: Annotated[
        int, opt.option(SERVER, "Port to listen on; 0: any free one.", min=0, max=65535)
    ] = 8080,
    allowed_origins: Annotated[
        str, opt.option(SERVER, "Web pages that may call it (CORS), with commas; * for all.")
    ] = "",
    prompt_cache_size: Annotated[
        int, opt.option(SERVER, "Conversations whose prompt caches are kept.", min=1)
    ] = 10,
    log_level: Annotated[
        str, opt.option(SERVER, "DEBUG, INFO, WARNING or ERROR.", metavar="LEVEL")
    ] = "WARNING",
    chat_template_config: opt.ChatTemplateConfig = None,
    max_tokens: opt.MaxTokens = 512,
    temp: opt.Temp = 0.0,
    top_p: opt.TopP = 1.0,
    min_p: opt.MinP = 0.0,
    top_k: opt.TopK = 0,
    debug: opt.Debug = False,
) -> None:
    """Serve a model to OpenAI clients at http://127.0.0.1:8080/v1.

    The sampling options are for requests that do not give their own. Whatever model a request
    names, it gets this one. Requests that come together are answered together, but one by one
    with --quantized-kv-start: mlx-lm compresses no caches of a batch. With --kv-bits a conversation
    that goes on from the beginning of an earlier one reads some of its last tokens compressed that
    a new one reads as they were, so the text may differ.
    """
    config = opt.json_object(chat_template_config)
    level = logging.getLevelNamesMapping().get(log_level.upper())
    if level is None:
        raise typer.BadParameter(f"--log-level: no level {one_line(log_level)!r}")
    if max_tokens < 0:
        raise typer.BadParameter("--max-tokens: a request needs a limit; give 1 or more")
    kv = before_model(fuse, kv_bits, kv_group_size, kv_rotate)
    path = resolve_model(one_model(model, model_option), revision, True)
    logging.basicConfig(level=level, format="%(asctime)s - %(levelname)s - %(message)s")
    with status_line(True) as say:
        say(f"loading {path.name}")
        from ..server.app import Server
        from ..server.engine import Limits
        from ..text.generate import Settings

        loaded, tokenizer = load_model(path, dtype, fuse, act_quant)
        server = Server(
            loaded,
            tokenizer,
            path.stem,
            Settings(
                chat_template_config=config,
                max_tokens=max_tokens,
                temp=temp,
                top_p=top_p,
                min_p=min_p,
                top_k=top_k,
                prefill_step_size=prefill_step_size,
                kv=kv,
                quantized_kv_start=quantized_kv_start,
                kv_force=kv_force,
            ),
            host=host,
            port=port,
            allowed_origins=tuple(x.strip() for x in allowed_origins.split(",") if x.strip()),
            limits=Limits(prompt_caches=prompt_cache_size),
        )
    print(f"{one_line(path.name)} at {server.address}/v1; Ctrl-C ends it", file=sys.stderr)
    show_report(loaded.load_report)
    try:
        server.serve()
    except KeyboardInterrupt:
        # MLX 0.32 on CPU aborts a normal exit once a thread that computed has ended.
        os._exit(INTERRUPTED)
