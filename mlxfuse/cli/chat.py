"""``mlxfuse chat``."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any, TextIO

import typer

from ..errors import MLXFuseError, RanksError
from ..process import INTERRUPTED, fail
from ..terminal import neutralize
from . import _options as opt
from . import _text_options as text_opt
from ._common import AnswerWriter, command, show_report
from ._ranks import ONE_MODEL, alone, of_first, team
from .generate import Drafting
from .progress import status_line

if TYPE_CHECKING:
    from ..generate.answer import Result
    from ..generate.chat import Chat
    from ..loader import LoadReport

FENCE = '"""'
HELP = f"""\
/reset         forget the conversation (not the system prompt)
/system TEXT   let the conversation begin with this system prompt; without a text show it
/save FILE     write the conversation to a file
/load FILE     go on from a conversation in a file
/stats         tokens, speeds, memory, and what was fused
/help          this
/bye           leave; so do /exit, /quit and Ctrl-D
Ctrl-C         stop the answer; twice at the prompt: leave
A pasted text is one message. For a new line: Alt-Enter, or Enter behind a \\ or between {FENCE}."""
LEAVE = ("/bye", "/exit", "/quit")
# Of the context, from where on the user is warned.
ALMOST_FULL = 0.8


@dataclass(frozen=True, kw_only=True)
class Answers(text_opt.Sampling):
    max_tokens: text_opt.MaxTokens = 1024


@command(
    "Run", 'mlxfuse chat model-Q4_K_M.gguf --system-prompt "Answer in one sentence."', ranks=True
)
def chat_command(
    model: opt.Model,
    load: opt.Loading,
    drafting: Drafting,
    prompt: text_opt.Prompt,
    cache: opt.BoundedCache,
    sampling: Answers,
    out: opt.Output,
) -> None:
    """Talk with a model. Where stdin is no terminal, each line of it is a message.

    --json prints one object for each answer.
    """
    load.check()
    drafting.check(cache.max_kv_size)
    alone(ONE_MODEL, draft_model=drafting.draft_model)
    drafts = drafting.settings()
    given = {**of_first(prompt.settings), **cache.settings(), **sampling.given(), **drafts}
    ranks, path, draft_path = team(), model.fetch(), drafting.fetch()
    stdout, interactive = sys.stdout, sys.stdin.isatty() and sys.stdout.isatty()
    with redirect_stdout(sys.stderr), status_line(True) as say:
        from ..generate.chat import Chat
        from ..generate.run import Settings

        loaded, tokenizer = load.load(path, say)
        report = loaded.load_report
        settings = Settings(**{**report.sampling, **given})
        draft = drafting.load(draft_path, tokenizer)
        chat = Chat(loaded, tokenizer, settings, ranks, draft_model=draft)
    if ranks is not None and not ranks.first:
        chat.follow()
        return
    if interactive:
        print(f"{neutralize(path.name)}; /help shows what there is to say", file=sys.stderr)
    if ranks is not None:
        # mlx.launch gives rank 0 a pipe, so that nothing else shows that it waits.
        print(f"{neutralize(path.name)}: each line is a message; /bye ends it", file=sys.stderr)
    if not tokenizer.has_chat_template:
        fail("this model has no chat template: it continues texts, and may not answer")
    interrupts = _Interrupts()
    before = signal.getsignal(signal.SIGINT)
    if ranks is None:  # where there are several Ctrl-C ends them all, as it does mlx.launch
        signal.signal(signal.SIGINT, interrupts)
    try:
        talk = _Talk(chat, interrupts, report, stdout, out.as_json)
        for message in _typed(chat) if interactive else _piped():
            if not talk.hear(message):
                break
        chat.close()
    finally:
        signal.signal(signal.SIGINT, before)


class _Talk:
    """A conversation as the user sees it: commands, answers, and notes on stderr."""

    def __init__(
        self,
        chat: Chat,
        interrupts: _Interrupts,
        report: LoadReport,
        stdout: TextIO,
        as_json: bool,
    ) -> None:
        self._chat, self._interrupts, self._report = chat, interrupts, report
        self._stdout, self._as_json = stdout, as_json
        self._last: Result | None = None
        self._commands: dict[str, Callable[[str], None]] = {
            "/help": lambda _: print(HELP, file=sys.stderr),
            "/reset": self._reset,
            "/system": self._system,
            "/save": self._save,
            "/load": self._load,
            "/stats": self._stats,
        }

    def hear(self, message: str) -> bool:
        """Do or answer what the user says; False to leave."""
        name, _, rest = message.strip().partition(" ")
        if not name:
            return True
        if name in LEAVE and not rest:
            return False
        if name.startswith("/") and name[1:].isalpha() and "\n" not in name:
            doing = self._commands.get(name)
            if doing is None:
                fail(f"no command {name}; /help lists them")
                return True
        else:
            doing, rest = self._answer, text_opt.clean(message)
        try:
            doing(rest)
        except (MLXFuseError, OSError) as error:
            if self._as_json or isinstance(error, BrokenPipeError | RanksError):
                raise
            fail(str(error))
        return True

    def _answer(self, text: str) -> None:
        shown = not self._as_json
        with redirect_stdout(sys.stderr), status_line(shown) as say, self._interrupts.answering():
            say("reading")
            writer = AnswerWriter(self._stdout, say, shown=shown)
            result = self._chat.say(
                text,
                write=writer.write if shown else None,
                think=writer.think if shown else None,
                on_prompt=lambda done, total: say(f"reading: {done:,} of {total:,} tokens"),
                stop=self._interrupts.stop.is_set,
                note=fail,
            )
        if result is None:
            return
        self._last = result
        line = json.dumps(asdict(result)) if self._as_json else ""
        print(line, file=self._stdout, flush=True)
        if shown:
            self._after(result)

    def _after(self, result: Result) -> None:
        """What the user should know about the answer and what is to come."""
        fill = self._chat.fill
        if result.finish_reason == "length":
            full = fill is not None and fill >= 1
            why = "the context is full" if full else f"{result.generation_tokens:,} tokens; see -m"
            fail(f"the answer was cut: {why}")
        if fill is not None and fill >= ALMOST_FULL:
            fail(
                f"the context is {fill:.0%} full: the oldest messages will be forgotten; "
                "/reset forgets all"
            )

    def _reset(self, _: str) -> None:
        self._chat.reset()
        print("the conversation is forgotten", file=sys.stderr)

    def _system(self, text: str) -> None:
        if text:
            self._chat.system_prompt = text_opt.clean(text)
        else:
            print(neutralize(self._chat.system_prompt or "no system prompt"), file=sys.stderr)

    def _save(self, name: str) -> None:
        from ..generate import conversation

        path = _path(name)
        conversation.save(path, self._chat.messages)
        print(f"{len(self._chat.messages)} messages are in {path}", file=sys.stderr)

    def _load(self, name: str) -> None:
        from ..generate import conversation

        path = _path(name)
        self._chat.resume(conversation.load(path))
        print(f"{len(self._chat.messages)} messages are read from {path}", file=sys.stderr)

    def _stats(self, _: str) -> None:
        fill = self._chat.fill
        share = "" if fill is None else f", {fill:.0%} of the context of {self._chat.context:,}"
        print(f"{self._chat.cached_tokens} tokens in the cache{share}", file=sys.stderr)
        print(self._last.footer() if self._last else "no answer yet", file=sys.stderr)
        show_report(self._report)


def _path(name: str) -> Path:
    if not name.strip():
        raise MLXFuseError("say which file, as in /save talk.json")
    return Path(name.strip()).expanduser()


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


def _typed(chat: Chat) -> Iterator[str]:
    """Messages from a terminal, until Ctrl-D or the second Ctrl-C in a row."""
    from ._lines import Lines

    lines, interrupts = Lines(), 0
    while True:
        fill = chat.fill
        try:
            text = lines.ask("" if not fill else f"{fill:.0%} of {chat.context:,} tokens")
        except EOFError:
            return
        except KeyboardInterrupt:
            interrupts += 1
            if interrupts > 1:
                raise typer.Exit(INTERRUPTED) from None
            print("Ctrl-C again, Ctrl-D or /bye to leave", file=sys.stderr)
            continue
        interrupts = 0
        if text.strip() in ("exit", "quit"):  # as in other programs, and no message to a model
            return
        yield text


def _piped() -> Iterator[str]:
    """Messages from a pipe or a file: lines, or what stands between fences."""
    while line := sys.stdin.readline():
        line = line.rstrip("\r\n")
        if line.lstrip().startswith(FENCE):
            lines = [line.lstrip().removeprefix(FENCE)]
            while not lines[-1].rstrip().endswith(FENCE) and (more := sys.stdin.readline()):
                lines.append(more.rstrip("\r\n"))
            yield "\n".join(lines).rstrip().removesuffix(FENCE).strip("\n")
            continue
        while line.endswith("\\"):
            line = line[:-1] + "\n" + sys.stdin.readline().rstrip("\r\n")
        yield line
