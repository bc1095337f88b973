"""``mlxfuse generate``."""

from __future__ import annotations

import json
import sys
import time
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import MLXFuseError
from ..process import fail
from ..terminal import one_line
from . import _options as opt
from . import _text_options as text_opt
from ._common import AnswerWriter, command, show_report
from ._models import resolve_model
from ._ranks import NO_END, ONE_MODEL, alone, of_first, team
from .progress import status_line


@dataclass(frozen=True, kw_only=True)
class Drafting:
    """What guesses tokens that the model only has to check."""

    draft_model: Annotated[
        str | None,
        opt.of_model("A smaller model of the same vocabulary, to draft.", metavar="MODEL"),
    ] = None
    prompt_lookup: text_opt.PromptLookup = False
    num_draft_tokens: text_opt.NumDraftTokens = None

    def settings(self) -> dict[str, Any]:
        """The fields of `mlxfuse.generate.run.Settings`."""
        if self.draft_model is not None and self.prompt_lookup:
            raise typer.BadParameter("give --draft-model or --prompt-lookup, not both")
        if self.num_draft_tokens and not (self.draft_model or self.prompt_lookup):
            raise typer.BadParameter("--num-draft-tokens needs --draft-model or --prompt-lookup")
        count = self.num_draft_tokens or (7 if self.prompt_lookup else 3)
        return {"prompt_lookup": self.prompt_lookup, "num_draft_tokens": count}

    def check(self, max_kv_size: int | None) -> None:
        if max_kv_size and self.draft_model:
            raise typer.BadParameter("--max-kv-size cannot be combined with --draft-model")

    def fetch(self, shown: bool = True) -> Path | None:
        """The draft model's file or folder, fetched first where it is not here."""
        if not self.draft_model:
            return None
        return resolve_model(self.draft_model, None, shown)

    def load(self, path: Path | None, tokenizer: Any) -> Any:
        """The draft model, if there is one; it must have the same vocabulary."""
        if path is None:
            return None
        from ..loader import load

        draft, draft_tokenizer = load(path)
        if draft_tokenizer.vocab_size != tokenizer.vocab_size:
            raise MLXFuseError(
                f"the draft model has {draft_tokenizer.vocab_size:,} tokens, "
                f"the model {tokenizer.vocab_size:,}; they must share one vocabulary"
            )
        return draft


@dataclass(frozen=True, kw_only=True)
class Message(text_opt.Prompt):
    """The prompt of one answer."""

    prompt: Annotated[
        str | None,
        opt.of_text(
            "The message; -: from stdin; \\n is a new line.",
            "--prompt",
            "-p",
            metavar="TEXT",
        ),
    ] = None
    file: Annotated[
        Path | None,
        opt.of_text("The message, as it is in a file.", "--file", "-f", metavar="FILE"),
    ] = None
    prefill_response: Annotated[
        str | None, opt.of_text("How the answer begins.", metavar="TEXT", rare=True)
    ] = None
    json_schema: Annotated[
        Path | None,
        opt.of_text("JSON of the schema in this file.", metavar="FILE", rare=True),
    ] = None
    ignore_chat_template: Annotated[
        bool, opt.of_text("Continue the prompt as raw text.", "--ignore-chat-template")
    ] = False

    rest: Annotated[list[str] | None, typer.Argument(hidden=True, metavar=" ")] = None

    def settings(self) -> dict[str, Any]:
        if self.rest:
            raise typer.BadParameter(
                f"{one_line(' '.join(self.rest))!r}: a message is given with -p"
            )
        if self.ignore_chat_template and (self.system_prompt or self.system_prompt_file):
            raise typer.BadParameter(
                "--system-prompt needs the chat template, which --ignore-chat-template leaves out"
            )
        return {
            **super().settings(),
            "prompt": text_opt.clean(self._text()),
            "prefill_response": self.prefill_response and text_opt.clean(self.prefill_response),
            "ignore_chat_template": self.ignore_chat_template,
            "json_schema": None if self.json_schema is None else self._schema(self.json_schema),
        }

    @staticmethod
    def _schema(path: Path) -> Any:
        from ..generate.structured import read_schema

        return read_schema(text_opt.read_text(path))

    def _text(self) -> str:
        if self.file is not None:
            if self.prompt is not None:
                raise typer.BadParameter("give --prompt or --file, not both")
            return text_opt.read_text(self.file)
        if self.prompt == "-":
            alone(NO_END, **{"prompt -": True})
            if sys.stdin.isatty():
                print("type the message, then Ctrl-D on a line of its own", file=sys.stderr)
            return sys.stdin.read()
        # mlx_lm.generate's rule: \n and \t in the argument are a newline and a tab.
        return (
            ("hello" if self.prompt is None else self.prompt)
            .replace("\\n", "\n")
            .replace("\\t", "\t")
        )


@command(
    "Run",
    'mlxfuse generate model-Q4_K_M.gguf -p "What is a fused kernel?" -m 200',
    "mlxfuse generate org/repo:Q4_K_M -f question.txt --temp 0.7 --seed 1",
    ranks=True,
)
def generate_command(
    model: opt.Model,
    load: opt.Loading,
    drafting: Drafting,
    message: Message,
    cache: opt.BoundedCache,
    sampling: text_opt.Sampling,
    talk: opt.Verbosity,
    out: opt.Output,
    prompt_cache_file: Annotated[
        Path | None,
        opt.of_cache("A stored prompt cache that the prompt follows.", metavar="FILE", rare=True),
    ] = None,
) -> None:
    """Answer one prompt: the text on stdout, progress and speeds on stderr."""
    ref = model.ref
    drafting.check(cache.max_kv_size)
    if cache.max_kv_size and prompt_cache_file:
        raise typer.BadParameter("--max-kv-size cannot be combined with --prompt-cache-file")
    alone(ONE_MODEL, draft_model=drafting.draft_model)
    alone("each rank would need a file of its own", prompt_cache_file=prompt_cache_file)
    load.check()
    told = of_first(message.settings)
    given = {**told, **cache.settings(), **sampling.given(), **drafting.settings()}
    path = model.fetch(talk.shown)
    draft_path = drafting.fetch(talk.shown)

    stdout = sys.stdout
    # mlx-lm prints warnings on stdout.
    with redirect_stdout(sys.stderr), status_line(talk.shown and not out.as_json) as say:
        from .. import kernels
        from ..generate import prompt_cache
        from ..generate import run as engine

        if prompt_cache_file:
            prompt_cache.expect_model(prompt_cache_file, ref)
        kernels.launches.clear()
        kernels.fallbacks.clear()
        start = time.perf_counter()
        loaded, tokenizer = load.load(path, say)
        draft = drafting.load(draft_path, tokenizer)
        load_seconds = time.perf_counter() - start
        say("reading the prompt")
        models = [loaded] if draft is None else [loaded, draft]
        settings = engine.Settings(**{**loaded.load_report.sampling, **given})
        writer = AnswerWriter(stdout, say, shown=talk.shown)
        result = engine.generate(
            loaded,
            tokenizer,
            settings,
            draft_model=draft,
            prompt_cache=prompt_cache.read(prompt_cache_file, *models)
            if prompt_cache_file
            else None,
            write=None if out.as_json else writer.write,
            think=None if out.as_json else writer.think,
            on_prompt=lambda done, total: say(f"reading the prompt: {done:,} of {total:,} tokens"),
            note=fail if talk.shown else None,
            team=team(),
        )
    report = loaded.load_report
    if out.as_json:
        record = {
            "model": str(path),
            **asdict(result),
            "sampling": settings.chosen(),
            "load_seconds": load_seconds,
            "load": report.as_dict(),
            "kernels": kernels.counts(),
        }
        print(json.dumps(record))
        return
    print()
    if talk.shown:
        print(result.footer(), file=sys.stderr)
        if settings.chosen() or report.sampling:
            print(settings.describe(report.sampling.keys() - given.keys()), file=sys.stderr)
        if result.kv_cache:
            print(result.kv_cache, file=sys.stderr)
        show_report(report)
    if talk.verbose:
        for step, seconds in report.seconds.items():
            print(f"Loading, {step}: {seconds:.3f} s", file=sys.stderr)
