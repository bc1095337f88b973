"""``mlxfuse perplexity``."""

from __future__ import annotations

import json
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated, Any

import typer

from .. import env
from ..errors import MLXFuseError
from . import _options as opt
from ._common import (
    app,
    before_model,
    clean,
    command,
    load_model,
    one_model,
    resolve_model,
    show_report,
)
from .progress import status_line


@app.command("perplexity", rich_help_panel="Look")
@command
def perplexity_command(
    file: Annotated[str, typer.Option("--file", "-f", help="A text; - reads it from stdin.")],
    model: opt.ModelArgument = None,
    model_option: opt.ModelOption = None,
    revision: opt.Revision = None,
    dtype: opt.DTypeOption = None,
    fuse: opt.Fuse = "auto",
    act_quant: opt.ActQuantOption = opt.ActQuant.auto,
    kv_bits: opt.KVBits = None,
    kv_group_size: opt.KVGroupSize = 64,
    kv_rotate: opt.KVRotate = True,
    kv_force: opt.KVForce = False,
    kld: Annotated[
        bool,
        typer.Option(
            "--kld", help="Compare with plain cache and float activations: KLD, same top token."
        ),
    ] = False,
    ctx_size: Annotated[
        int, typer.Option("--ctx-size", "-c", help="Tokens of a chunk.", min=4)
    ] = 512,
    chunks: Annotated[int | None, typer.Option(help="Score at most so many chunks.", min=1)] = None,
    step: Annotated[
        int | None,
        typer.Option(
            help="Tokens processed at a time (default: 8 with --kv-bits, as in generation; "
            "else 512).",
            min=1,
        ),
    ] = None,
    as_json: opt.Json = False,
    debug: opt.Debug = False,
) -> None:
    """Score a text: perplexity, and what a compressed cache or int8 activations change."""
    rounded = act_quant is opt.ActQuant.on
    if kld and kv_bits is None and not rounded:
        raise typer.BadParameter("--kld compares two ways: say with --kv-bits or --act-quant which")
    if rounded and fuse == "auto":
        fuse = "all"  # where no kernel runs "auto" fuses nothing, and nothing would be rounded
    text = _read(file)
    kv = before_model(fuse, kv_bits, kv_group_size, kv_rotate)
    path = resolve_model(one_model(model, model_option), revision, True)
    with redirect_stdout(sys.stderr), status_line(not as_json) as say:
        say(f"loading {path.name}")
        from ..nn.kv.options import check_model, compressed, plain_caches
        from ..text.perplexity import Way, perplexity, render

        loaded, tokenizer = load_model(path, dtype, fuse, act_quant)
        way = Way(loaded, lambda: plain_caches(loaded))
        plain = Way(_with_floats(loaded), way.make_caches)
        if kv is not None:
            check_model(loaded, kv, force=kv_force)
            way = Way(loaded, lambda: compressed(plain_caches(loaded), kv))
        ids = tokenizer.encode(text)
        report = perplexity(
            ids,
            way,
            plain if kld else None,
            bos=tokenizer.bos_token_id if ids[:1] == [tokenizer.bos_token_id] else None,
            context=ctx_size,
            chunks=chunks,
            step=step or (512 if kv is None else 8),
            on_chunk=lambda done, count: say(f"{done} of {count} chunks"),
        )
    if as_json:
        scheme = None if kv is None else {"kv_bits": kv.name, "kv_rotate": kv.rotate}
        found = {"model": str(path), "scheme": scheme, "act_quant": rounded}
        print(json.dumps({**found, "load": loaded.load_report.as_dict(), **report.as_dict()}))
        return
    names = [] if kv is None else [kv.name + (" rotated" if kv.rotate else "")]
    print(render(report, ", ".join([*names, *["int8"] * rounded]) or "plain"))
    show_report(loaded.load_report)


def _with_floats(model: Any) -> Any:
    """The model, its activations not rounded."""
    off = ",".join(filter(None, [env.get("MLXFUSE_DISABLE"), "int8"]))

    def call(*args: Any, **kwargs: Any) -> Any:
        with env.overridden("MLXFUSE_DISABLE", off):
            return model(*args, **kwargs)

    return call


def _read(file: str) -> str:
    try:
        return clean(sys.stdin.read()) if file == "-" else Path(file).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise MLXFuseError(f"{file}: expected a text in UTF-8: {error}") from None
