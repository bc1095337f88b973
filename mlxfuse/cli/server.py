"""``mlxfuse server``."""

from __future__ import annotations

import logging
import os
import sys
from dataclasses import dataclass
from typing import Annotated

import typer

from ..process import INTERRUPTED
from ..terminal import one_line
from . import _options as opt
from . import _text_options as text_opt
from ._common import command, show_report
from .progress import status_line

SERVER = "Server"


@dataclass(frozen=True, kw_only=True)
class Defaults(text_opt.Sampling):
    """For requests that do not give their own."""

    max_tokens: text_opt.MaxTokens = 512


@command("Run", "mlxfuse server model-Q4_K_M.gguf --port 8080 --kv-bits k8v4")
def server_command(
    model: opt.Model,
    load: opt.Loading,
    cache: opt.Cache,
    sampling: Defaults,
    out: opt.Debug,
    host: Annotated[
        str, opt.option(SERVER, "Address to listen on.", metavar="ADDRESS")
    ] = "127.0.0.1",
    port: Annotated[
        int,
        opt.option(SERVER, "Port to listen on; 0: any free one.", min=0, max=65535, metavar="PORT"),
    ] = 8080,
    allowed_origins: Annotated[
        str,
        opt.option(
            SERVER,
            "Web pages that may call it (CORS), with commas; * for all.",
            metavar="URLS",
            rare=True,
        ),
    ] = "",
    prompt_cache_size: Annotated[
        int,
        opt.option(
            SERVER,
            "Conversations whose prompt caches are kept.",
            min=1,
            metavar="INTEGER",
            rare=True,
        ),
    ] = 10,
    log_level: Annotated[
        str, opt.option(SERVER, "DEBUG, INFO, WARNING or ERROR.", metavar="LEVEL", rare=True)
    ] = "WARNING",
    chat_template_config: text_opt.ChatTemplateConfig = None,
) -> None:
    """Serve a model to OpenAI clients at http://127.0.0.1:8080/v1.

    The sampling options are for requests that do not give their own. Whatever model a request
    names, it gets this one.
    """
    config = text_opt.json_object(chat_template_config)
    level = logging.getLevelNamesMapping().get(log_level.upper())
    if level is None:
        raise typer.BadParameter(f"--log-level: no level {one_line(log_level)!r}")
    if sampling.max_tokens < 0:
        raise typer.BadParameter("--max-tokens: a request needs a limit; give 1 or more")
    load.check()
    given = {**cache.settings(), **sampling.given()}
    path = model.fetch()
    logging.basicConfig(level=level, format="%(asctime)s - %(levelname)s - %(message)s")
    with status_line(True) as say:
        from ..server.app import Server
        from ..server.engine import Limits
        from ..text.generate import Settings

        loaded, tokenizer = load.load(path, say)
        server = Server(
            loaded,
            tokenizer,
            path.stem,
            Settings(chat_template_config=config, **{**loaded.load_report.sampling, **given}),
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
