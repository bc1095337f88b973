"""``mlxfuse perplexity``."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .. import env
from ..errors import MLXFuseError
from . import _options as opt
from . import _text_options as text_opt
from ._common import command, show_report
from ._ranks import NO_END, alone, of_first
from .progress import status_line

if TYPE_CHECKING:
    from ..generate.perplexity import Way
    from ..nn.kv.options import KVOptions


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What a text's scores are compared with, and how much of it is scored at a time."""

    kld: Annotated[
        bool,
        opt.of_text("Compare with plain cache and float activations: KLD, same top.", "--kld"),
    ] = False
    base: Annotated[
        str | None,
        opt.of_text(
            "The same model in other types, such as F16: --kld compares with it.",
            "--base",
            metavar="MODEL",
        ),
    ] = None
    ctx_size: Annotated[
        int, opt.of_text("Tokens of a chunk.", "--ctx-size", "-c", min=4, metavar="INTEGER")
    ] = 512
    chunks: Annotated[
        int | None, opt.of_text("Score at most so many chunks.", min=1, metavar="INTEGER")
    ] = None
    step: Annotated[
        int | None,
        opt.of_text(
            "Tokens processed at a time (default: 8 with --kv-bits, as in generation; else 512).",
            min=1,
            metavar="INTEGER",
            rare=True,
        ),
    ] = None

    def check(self, cache: opt.Compression, rounded: bool) -> None:
        """Refuse a comparison of two ways that are the same."""
        if self.kld and cache.kv_bits is None and not rounded and self.base is None:
            raise typer.BadParameter(
                "--kld compares two ways: say with --kv-bits, --act-quant or --base which"
            )


@command(
    "Look", "mlxfuse perplexity model-Q4_K_M.gguf -f text.txt --kv-bits k8v4 --kld", ranks=True
)
def perplexity_command(
    file: Annotated[
        str, opt.of_text("A text; - reads it from stdin.", "--file", "-f", metavar="FILE")
    ],
    model: opt.Model,
    load: opt.Loading,
    cache: opt.Compression,
    out: opt.Output,
    compared: Comparison,
) -> None:
    """Score a text: perplexity, and what another quantisation, cache or activations change."""
    rounded = load.act_quant is opt.ActQuant.on
    compared.check(cache, rounded)
    if rounded and load.fuse == "auto":
        # Where no kernel runs "auto" fuses nothing, and nothing would be rounded.
        load = replace(load, fuse="all")
    text = of_first(lambda: _text(file))
    load.check()
    kv = cache.scheme()
    path, base = model.fetch(), compared.base
    with redirect_stdout(sys.stderr), status_line(not out.as_json) as say:
        from ..generate.perplexity import Way, perplexity, render
        from ..nn.kv.options import check_model, compressed, plain_caches

        loaded, tokenizer = load.load(path, say)
        ids = tokenizer.encode(text)
        way = Way(loaded, lambda: plain_caches(loaded))
        plain = Way(_with_floats(loaded), way.make_caches)
        if kv is not None:
            check_model(loaded, kv, force=cache.kv_force)
            way = Way(loaded, lambda: compressed(plain_caches(loaded), kv))
        if base is not None:
            plain = _other(replace(model, model=base, model_option=None), load, say, text, ids)
        report = perplexity(
            ids,
            way,
            plain if compared.kld or base else None,
            bos=tokenizer.bos_token_id if ids[:1] == [tokenizer.bos_token_id] else None,
            context=compared.ctx_size,
            chunks=compared.chunks,
            step=compared.step or (512 if kv is None else 8),
            on_chunk=lambda done, count: say(f"{done} of {count} chunks"),
        )
    if out.as_json:
        scheme = None if kv is None else {"kv_bits": kv.name, "kv_rotate": kv.rotate}
        found: dict[str, Any] = {"model": str(path), "scheme": scheme, "act_quant": rounded}
        if base is not None:
            found["base_model"] = base
        print(json.dumps({**found, "load": loaded.load_report.as_dict(), **report.as_dict()}))
        return
    ways = _named(kv, rounded)
    if base is None:
        print(render(report, ways or "plain"))
    else:
        print(render(report, ways or "model", "base"))
    show_report(loaded.load_report)


def _named(kv: KVOptions | None, rounded: bool) -> str:
    """What is special about the way that is scored; empty if nothing is."""
    cache = [] if kv is None else [kv.name + (" rotated" if kv.rotate else "")]
    return ", ".join([*cache, *["int8"] * rounded])


def _text(file: str) -> str:
    if file != "-":
        return text_opt.read_text(Path(file))
    alone(NO_END, **{"file -": True})
    return text_opt.clean(sys.stdin.read())


def _other(
    model: opt.Model, load: opt.Loading, say: Callable[[str], None], text: str, ids: list[int]
) -> Way:
    """The way to compare with that is another file.

    Raises:
        MLXFuseError: it has other tokens for the text.
    """
    from ..generate.perplexity import Way
    from ..nn.kv.options import plain_caches

    path = model.fetch()
    loaded, tokenizer = load.load(path, say)
    if tokenizer.encode(text) != ids:
        raise MLXFuseError(
            f"--base {path}: expected the same tokens for the text as MODEL has, found others: "
            "give the same model in another quantisation"
        )
    return Way(_with_floats(loaded), lambda: plain_caches(loaded))


def _with_floats(model: Any) -> Any:
    """The model, its activations not rounded."""
    off = ",".join(filter(None, [env.get("MLXFUSE_DISABLE"), "int8"]))

    def call(*args: Any, **kwargs: Any) -> Any:
        with env.overridden("MLXFUSE_DISABLE", off):
            return model(*args, **kwargs)

    return call
