"""``mlxfuse server``."""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from ..errors import MLXFuseError
from ..process import INTERRUPTED, errors, fail
from ..terminal import one_line
from . import _options as opt
from . import _text_options as text_opt
from ._common import command, show_report
from ._ranks import ONE_MODEL, alone, team
from .generate import Drafting
from .progress import status_line

SERVER = "Server"


@dataclass(frozen=True, kw_only=True)
class Defaults(text_opt.Sampling):
    """For requests that do not give their own."""

    max_tokens: text_opt.MaxTokens = -1


def _size(text: str) -> int:
    found = re.fullmatch(r"(\d{1,15}(?:\.\d+)?)\s*([KMGT]?)B?", text.strip(), re.IGNORECASE)
    if found is None:
        raise typer.BadParameter(f"{one_line(text)!r}: expected bytes, such as 8GB or 500M")
    return int(float(found[1]) * 1000 ** " KMGT".index(found[2].upper() or " "))


def of_server(help: str, metavar: str, *names: str, **more: Any) -> Any:
    return opt.option(SERVER, help, *names, metavar=metavar, **more)


@dataclass(frozen=True, kw_only=True)
class Listening:
    """Where the server listens, and to whom."""

    host: Annotated[str, of_server("Address to listen on.", "ADDRESS")] = "127.0.0.1"
    port: Annotated[int, of_server("Its port; 0: any free one.", "PORT", min=0, max=65535)] = 8080
    api_key: Annotated[
        str | None,
        of_server("The key that clients must send.", "KEY", envvar="MLXFUSE_API_KEY"),
    ] = None
    cors_origin: Annotated[
        str,
        of_server(
            "Web pages that may call it, with commas; * for all.",
            "URLS",
            "--cors-origin",
            "--allowed-origins",
            rare=True,
        ),
    ] = ""
    served_model_name: Annotated[
        str | None,
        of_server("The model's name for clients (default: the file's).", "NAME", rare=True),
    ] = None

    @property
    def origins(self) -> tuple[str, ...]:
        return tuple(x.strip().rstrip("/") for x in self.cors_origin.split(",") if x.strip())

    def warn(self) -> None:
        """Where others can reach the server, and need no key."""
        from ..server.listener import is_loopback

        if self.api_key is None and not is_loopback(self.host):
            fail(
                f"warning: everyone who can reach {one_line(self.host)} can use this server; "
                "--api-key asks for a key"
            )


@dataclass(frozen=True, kw_only=True)
class Amounts:
    """How much is done at a time, and kept."""

    prompt_cache_size: Annotated[
        int, of_server("Conversations whose prompt caches are kept.", "INTEGER", min=1, rare=True)
    ] = 10
    prompt_cache_bytes: Annotated[
        int | None,
        of_server(
            "Bytes of these caches, such as 8GB (default: half of what the model leaves).",
            "SIZE",
            parser=_size,
            rare=True,
        ),
    ] = None
    decode_concurrency: Annotated[
        int, of_server("Answers generated at a time.", "INTEGER", min=1, rare=True)
    ] = 32
    prompt_concurrency: Annotated[
        int, of_server("Prompts read at a time.", "INTEGER", min=1, rare=True)
    ] = 8

    def limits(self, prefill_step_size: int) -> Any:
        """A `Limits`; to be asked once the model is loaded."""
        from ..server.jobs import Limits, memory_left

        size = self.prompt_cache_bytes
        return Limits(
            decode_concurrency=self.decode_concurrency,
            prompt_concurrency=self.prompt_concurrency,
            prefill_step_size=prefill_step_size,
            prompt_caches=self.prompt_cache_size,
            prompt_cache_bytes=memory_left() // 2 if size is None else size,
        )


@command(
    "Run",
    "mlxfuse server model-Q4_K_M.gguf --port 8080 --kv-bits k8v4",
    "MLXFUSE_API_KEY=secret mlxfuse server org/repo:Q4_K_M --host 0.0.0.0",
    ranks=True,
)
def server_command(
    model: opt.Model,
    load: opt.Loading,
    drafting: Drafting,
    cache: opt.Cache,
    listening: Listening,
    amounts: Amounts,
    sampling: Defaults,
    out: opt.Debug,
    log_level: Annotated[
        str, of_server("DEBUG, INFO, WARNING or ERROR.", "LEVEL", rare=True)
    ] = "WARNING",
    chat_template: Annotated[
        str | None, opt.of_text("A chat template, or a file with one.", metavar="TEXT", rare=True)
    ] = None,
    chat_template_config: text_opt.ChatTemplateConfig = None,
) -> None:
    """Serve a model to OpenAI and Anthropic clients at http://127.0.0.1:8080/v1.

    The sampling options are for requests that do not give their own.
    """
    config = text_opt.json_object(chat_template_config)
    level = logging.getLevelNamesMapping().get(log_level.upper())
    if level is None:
        raise typer.BadParameter(
            f"--log-level: expected DEBUG, INFO, WARNING or ERROR; found {one_line(log_level)!r}"
        )
    if drafting.prompt_lookup:
        raise typer.BadParameter("--prompt-lookup is for generate and chat")
    alone(ONE_MODEL, draft_model=drafting.draft_model)
    load.check()
    given = {**cache.settings(), **sampling.given()}
    ranks = team()
    follows = ranks is not None and not ranks.first
    template = None if chat_template is None or follows else _template(chat_template)
    from ..server.listener import bind

    listener = None if follows else bind(listening.host, listening.port)
    listening.warn()
    path = model.fetch()
    draft_path = drafting.fetch()
    logging.basicConfig(level=level, format="%(asctime)s - %(levelname)s - %(message)s")
    with status_line(True) as say:
        from ..generate.run import Settings
        from ..server.app import Server, follow
        from ..tokenizer.load import with_template

        loaded, tokenizer = load.load(path, say)
        draft = drafting.load(draft_path, tokenizer)
        given["num_draft_tokens"] = drafting.settings()["num_draft_tokens"]
        given = {**loaded.load_report.sampling, **given}
        settings = Settings(chat_template_config=config, **given)
        limits = amounts.limits(cache.prefill_step_size)
        if ranks is not None and not ranks.first:
            _end(lambda: follow(loaded, tokenizer, settings, limits, ranks))
        server = Server(
            loaded,
            tokenizer if template is None else with_template(tokenizer, template),
            listening.served_model_name or path.stem,
            settings,
            listener=listener,
            host=listening.host,
            api_key=listening.api_key,
            allowed_origins=listening.origins,
            limits=limits,
            draft=draft,
            details=_details(path),
            team=ranks,
        )
    print(f"{one_line(path.name)} at {server.address}/v1; Ctrl-C ends it", file=sys.stderr)
    show_report(loaded.load_report)
    _end(server.serve)


def _end(work: Callable[[], None]) -> NoReturn:
    """End the process with ``work``; on all ranks, where there are several."""
    code = 0
    try:
        work()
    except KeyboardInterrupt:
        code = INTERRUPTED
    except MLXFuseError as error:
        fail(str(error), errors())
        code = error.exit_code
    if (ranks := team()) is not None:
        if code == 0:
            ranks.barrier()
        ranks.leave(code)
    # MLX 0.32 on CPU aborts a normal exit once a thread that computed has ended.
    os._exit(code)


def _template(given: str) -> str:
    path = Path(given)
    try:
        if "{" not in given and path.is_file():
            return text_opt.read_text(path)
    except (OSError, ValueError):  # too long for a path
        pass
    if "{" not in given:
        raise typer.BadParameter(
            f"--chat-template: {one_line(given)!r} is no template, and no file"
        )
    return given


def _details(path: Path) -> dict[str, Any]:
    """What `/v1/models` tells of a GGUF file."""
    from ..hub.folders import is_checkpoint
    from ..inspect.header import inspect

    if is_checkpoint(path):
        return {}
    found = inspect(path)
    return {
        "quantization": found["tensor_types"][0]["type"],
        "architecture": found["architecture"],
        "parameters": found["parameters"],
        "size": found["size"],
    }
