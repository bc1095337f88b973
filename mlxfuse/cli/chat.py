"""``mlxfuse chat``."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import asdict, dataclass
from threading import Event
from typing import TYPE_CHECKING, Any, TextIO

import typer

from ..process import INTERRUPTED, fail
from ..terminal import neutralize
from . import _options as opt
from . import _text_options as text_opt
from ._common import AnswerWriter, command, show_report
from .progress import status_line

if TYPE_CHECKING:
    from ..loader import LoadReport
    from ..text.chat import Chat
    from ..text.generate import Result

FENCE = '"""'
HELP = f"""\
/reset   forget the conversation (not the system prompt)
/stats   tokens, speeds, memory, and what was fused
/help    this
/exit    leave; so does Ctrl-D
Ctrl-C   stop the answer; twice at the prompt: leave
{FENCE} begins and ends a message of several lines; a \\ at the end continues a line."""


@dataclass(frozen=True, kw_only=True)
class Answers(text_opt.Sampling):
    max_tokens: text_opt.MaxTokens = 1024


@command("Run", 'mlxfuse chat model-Q4_K_M.gguf --system-prompt "Answer in one sentence."')
def chat_command(
    model: opt.Model,
    load: opt.Loading,
    prompt: text_opt.Prompt,
    cache: opt.BoundedCache,
    sampling: Answers,
    out: opt.Output,
) -> None:
    """Talk with a model. Where stdin is no terminal, each line of it is a message.

    --json prints one object for each answer.
    """
    load.check()
    given = {**prompt.settings(), **cache.settings(), **sampling.given()}
    path = model.fetch()
    # Python's `input` writes its prompt on stdout.
    stdout, interactive = sys.stdout, sys.stdin.isatty() and sys.stdout.isatty()
    with redirect_stdout(sys.stderr), status_line(True) as say:
        say(f"loading {path.name}")
        from ..text.chat import Chat
        from ..text.generate import Settings

        loaded, tokenizer = load.load(path)
        report = loaded.load_report
        chat = Chat(loaded, tokenizer, Settings(**{**report.sampling, **given}))
    if interactive:
        print(f"{neutralize(path.name)}; /help shows what there is to say", file=sys.stderr)
    interrupts = _Interrupts()
    before = signal.signal(signal.SIGINT, interrupts)
    try:
        _converse(chat, interrupts, report, stdout, interactive, out.as_json)
    finally:
        signal.signal(signal.SIGINT, before)


def _converse(
    chat: Chat,
    interrupts: _Interrupts,
    report: LoadReport,
    stdout: TextIO,
    interactive: bool,
    as_json: bool,
) -> None:
    last: Result | None = None
    for message in _messages(interactive):
        match message.strip():
            case "":
                continue
            case "/exit":
                return
            case "/help":
                print(HELP, file=sys.stderr)
            case "/reset":
                chat.reset()
                print("the conversation is forgotten", file=sys.stderr)
            case "/stats":
                print(f"{chat.cached_tokens} tokens in the cache", file=sys.stderr)
                print(last.footer() if last else "no answer yet", file=sys.stderr)
                show_report(report)
            case text if text.startswith("/") and text[1:].isalpha():
                fail(f"no command {text}; /help lists them")
            case _:
                last = _answer(chat, interrupts, text_opt.clean(message), stdout, as_json) or last


def _answer(
    chat: Chat, interrupts: _Interrupts, text: str, stdout: TextIO, as_json: bool
) -> Result | None:
    with redirect_stdout(sys.stderr), status_line(not as_json) as say, interrupts.answering():
        say("reading")
        writer = AnswerWriter(stdout, say, shown=not as_json)
        result = chat.say(
            text,
            write=None if as_json else writer.write,
            think=None if as_json else writer.think,
            on_prompt=lambda done, total: say(f"reading: {done:,} of {total:,} tokens"),
            stop=interrupts.stop.is_set,
        )
    if result is not None:
        line = json.dumps(asdict(result)) if as_json else ""
        print(line, file=stdout, flush=True)
    return result


class _Interrupts:
    """Ctrl-C for as long as a conversation lasts.

    While an answer is made it sets ``stop`` instead of raising somewhere inside the model.
    """

    def __init__(self) -> None:
        self.stop = Event()
        self._answering = False

    def __call__(self, *_: Any) -> None:
        if not self._answering:
            raise KeyboardInterrupt
        self.stop.set()

    @contextmanager
    def answering(self) -> Iterator[None]:
        self.stop.clear()
        self._answering = True
        try:
            yield
        finally:
            self._answering = False


def _messages(interactive: bool) -> Iterator[str]:
    """What the user says, message by message."""
    while (line := _line(">>> ", interactive)) is not None:
        if line.lstrip().startswith(FENCE):
            lines = [line.lstrip().removeprefix(FENCE)]
            while not lines[-1].rstrip().endswith(FENCE):
                if (more := _line("... ", interactive)) is None:
                    break
                lines.append(more)
            yield "\n".join(lines).rstrip().removesuffix(FENCE).strip("\n")
            continue
        while line.endswith("\\"):
            line = line[:-1] + "\n" + (_line("... ", interactive) or "")
        yield line


def _line(prompt: str, interactive: bool) -> str | None:
    """One line of stdin without its end; None after the last."""
    if not interactive:
        line = sys.stdin.readline()
        return line.rstrip("\r\n") if line else None
    with suppress(ImportError):
        import readline  # noqa: F401 (gives `input` its editing and history)
    interrupts = 0
    while True:
        try:
            return input(prompt)
        except EOFError:
            print(file=sys.stderr)
            return None
        except KeyboardInterrupt:
            interrupts += 1
            if interrupts > 1:
                raise typer.Exit(INTERRUPTED) from None
            print("\nCtrl-C again, Ctrl-D or /exit to leave", file=sys.stderr)
