"""`mlxfuse chat` in a real terminal, which tmux is: pastes, history, resizing, saving, loading."""

import itertools
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

import mlxfuse

from ..models import tiny

pytestmark = pytest.mark.skipif(shutil.which("tmux") is None, reason="there is no tmux here")
REPOSITORY = Path(mlxfuse.__file__).parents[1]
TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}"
PASTE = "first line\nsecond line\n\nfourth line"


_COUNT = itertools.count()


class Terminal:
    """A tmux server of its own with one window."""

    def __init__(self, folder: Path, command: list[str]):
        self.name, self.folder = f"mlxfuse-{os.getpid()}-{next(_COUNT)}", folder
        environment = {
            "PYTHONPATH": REPOSITORY,
            "MLXFUSE_CACHE": folder / "cache",
            "TERM": "screen",
        }
        words = ["env", *(f"{k}={v}" for k, v in environment.items()), *command]
        line = f"{shlex.join(map(str, words))}; echo ended; sleep 60"
        self.tmux("-f", "/dev/null", "new-session", "-d", "-x", "100", "-y", "40", line)

    def tmux(self, *args: str) -> str:
        return subprocess.run(
            ["tmux", "-L", self.name, *args], capture_output=True, text=True, check=True, timeout=60
        ).stdout

    def screen(self) -> str:
        return self.tmux("capture-pane", "-p", "-J", "-S", "-200")

    def wait(self, text: str, times: int = 1, seconds: float = 90) -> str:
        end = time.monotonic() + seconds
        while (found := self.screen()).count(text) < times:
            assert time.monotonic() < end, f"no {text!r} in:\n{found}"
            time.sleep(0.1)
        return found

    def type(self, text: str, *keys: str) -> None:
        self.tmux("send-keys", "-l", text)
        self.tmux("send-keys", *(keys or ("Enter",)))

    def paste(self, text: str) -> None:
        (self.folder / "paste.txt").write_text(text)
        self.tmux("load-buffer", str(self.folder / "paste.txt"))
        self.tmux("paste-buffer", "-p")  # bracketed, if the program asks for that


@pytest.fixture
def terminal(tmp_path):
    made = tiny.build("llama", 0)
    made.metadata["tokenizer.chat_template"] = TEMPLATE
    model = tiny.write(tmp_path / "m.gguf", made)
    opened = []

    def open_one(*options):
        command = [sys.executable, "-m", "mlxfuse", "chat", model, "-m", "4", *options]
        opened.append(Terminal(tmp_path, command))
        return opened[-1]

    yield open_one
    for one in opened:
        subprocess.run(["tmux", "-L", one.name, "kill-server"], check=False, capture_output=True)


def test_a_conversation(terminal, tmp_path):
    saved = tmp_path / "talk.json"
    screen = terminal()
    screen.wait(">>>")
    screen.paste(PASTE)
    screen.wait("fourth line")
    screen.tmux("send-keys", "Enter")
    screen.wait("the answer was cut: 4 tokens")
    screen.tmux("resize-window", "-x", "60", "-y", "20")
    screen.tmux("send-keys", "C-c")
    screen.wait("Ctrl-C again")
    screen.type("and now?")
    screen.wait("the answer was cut", 2)
    screen.type("/system be brief")
    screen.type(f"/save {saved}")
    screen.wait("5 messages are in")
    messages = json.loads(saved.read_text())["messages"]
    assert [m["content"] for m in messages if m["role"] == "user"] == [PASTE, "and now?"]
    assert messages[0] == {"role": "system", "content": "be brief"}
    screen.type("/bye")
    screen.wait("ended")

    again = terminal()
    again.wait(">>>")
    again.tmux("send-keys", "Up", "Up", "Up", "Up", "C-e")
    again.wait("and now?")  # of the session before
    again.tmux("send-keys", "C-c")
    again.wait("Ctrl-C again")
    again.type(f"/load {saved}")
    again.wait("5 messages are read")
    again.type("/load /dev/null")
    again.wait("expected a conversation")
    again.type("/system")
    again.wait("be brief")
    again.tmux("send-keys", "C-c")
    again.wait("Ctrl-C again", 2)
    time.sleep(0.5)  # the prompt is there again
    again.tmux("send-keys", "C-c")
    again.wait("ended")


def test_a_full_context_is_told(terminal):
    """The model was made for 256 tokens, and the vocabulary has a token a byte."""
    screen = terminal()
    screen.wait(">>>")
    for word in ("a", "b", "c"):
        screen.type(word * 60)
    screen.wait("% of 256 tokens")
    screen.wait("% full: the oldest messages will be forgotten")
    screen.type("d" * 60)
    screen.wait("the context of 256 tokens is full: the 2 oldest messages are forgotten")
    screen.type("e" * 300)
    screen.wait("the message has")
    assert "Traceback" not in screen.screen()
