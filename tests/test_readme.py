"""What the documents say of the code is so: tables, commands, files that they name."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import tomllib
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import typer
from packaging.requirements import Requirement

from mlxfuse import env
from mlxfuse.cli import app
from mlxfuse.export.mlx_checkpoint import export_mlx
from mlxfuse.generate.run import Settings
from mlxfuse.loader import load
from mlxfuse.process import INTERRUPTED
from mlxfuse.server import Server

from .models import tiny
from .picture import PICTURE, counts, draw
from .readme import CONTRIBUTING, README, render, tables

TEXT = README.read_text()


def test_tables_are_current() -> None:
    guide = CONTRIBUTING.read_text()
    assert render(TEXT) == TEXT, "run: python -m tests.readme"
    assert render(guide) == guide, "run: python -m tests.readme"
    assert all(table in TEXT + guide for table in tables().values())
    changed = guide.replace("| Q4_K | 4.5 |", "| Q4_K | 4.6 |")
    assert changed != guide
    assert render(changed) == guide


# Where the contributors' documents are, and what the paths in them are below.
PAGES = {
    CONTRIBUTING: README.parent,
    README.parent / "mlxfuse" / "README.md": README.parent / "mlxfuse",
    README.parent / "metal" / "README.md": README.parent / "mlxfuse",
    README.parent / "tests" / "README.md": README.parent / "tests",
    README.parent / "tests" / "msl" / "README.md": README.parent / "tests" / "msl",
}


def _missing(text: str, base: Path) -> list[str]:
    """Paths that a text names and that do not exist, below its own folder or the repository."""
    named = re.findall(r"`((?:[\w.]+/)+[\w.*-]*|\w+\.(?:py|metal|h|c|toml))`", text)
    folders = (base, README.parent, README.parent / "metal", README.parent / "tests" / "fusion")
    named = [n for n in named if "NAME" not in n]  # stands for any name
    return [n for n in named if not any(any(f.glob(n.rstrip("/"))) for f in folders)]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(README.parent).as_posix())
def test_what_a_page_names_exists(page: Path) -> None:
    text = page.read_text()
    assert _missing(text, PAGES[page]) == []
    assert _missing("`nn/no_such.py` and `nowhere/`", PAGES[page]) == ["nn/no_such.py", "nowhere/"]
    for module in re.findall(r"python -m (tests[\w.]*)", text):
        assert find_spec(module), module


def test_the_readme_is_a_page_for_users() -> None:
    assert len(TEXT.splitlines()) <= 200


def test_the_picture_is_current() -> None:
    rows = counts()
    assert PICTURE.read_text() == draw(rows), "run: python -m tests.readme"
    assert f"]({PICTURE.relative_to(README.parent)})" in TEXT
    assert [n.total() for _, n in rows] == [17, 10, 19, 10]
    rows[1][1]["Add"] += 1
    assert PICTURE.read_text() != draw(rows)
    with pytest.raises(ValueError, match="no colour"):
        draw([("x", Counter(NoSuch=1))])


def test_ci_runs_the_test_command() -> None:
    command = next(b for b in BLOCKS if "pytest" in b[1])[1].replace(".venv/bin/", "")
    script = (README.parent / ".ci" / "run").read_text()
    for part in command.split(" && "):
        assert part in script, part


# --- every code block is run --------------------------------------------------------------

BLOCKS = re.findall(r"```(\w+)\n(.*?)\n```", TEXT, flags=re.S)
# What no test can run, and why; it is parsed instead.
NOT_RUN = {
    "python3 -m venv .venv": "the tests' environment is there already",
    ".venv/bin/pip install -e '.[cpu]'": "installs from the network",
    ".venv/bin/pip install -e '.[cpu,test]'": "installs from the network",
    ".venv/bin/python -m pytest -n auto": "it is this very suite",
    "mlxfuse ls": "shows the user's own folders",
    "mlxfuse pull org/repo:Q4_K_M": "downloads a model",
    "mlxfuse rm org/repo:Q4_K_M": "removes one",
    "mlxfuse tune model-Q4_K_M.gguf": "needs Metal, and times it",
    "mlxfuse bench kernels --report kernels.json": "needs Metal, and times it",
}


def _commands(block: str) -> list[str]:
    lines = (re.sub(r"  # .*", "", line) for line in block.splitlines())
    return [c.strip() for line in lines for c in line.split(" && ") if c.strip()]


SHELL = [c for language, block in BLOCKS if language == "sh" for c in _commands(block)]
RUN = list(dict.fromkeys(c for c in SHELL if c not in NOT_RUN))


def test_no_block_is_left_out() -> None:
    assert {language for language, _ in BLOCKS} == {"sh", "python"}
    assert TEXT.count("```") == 2 * len(BLOCKS)
    assert NOT_RUN.keys() <= set(SHELL), "an entry of NOT_RUN is no longer in the README"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a reader has the files that the README names, small ones, and mlxfuse on the PATH."""
    folder = tmp_path_factory.mktemp("readme")
    made = tiny.build("llama-q4", 0)
    made.metadata["tokenizer.chat_template"] = "{% for m in messages %}{{ m.content }}{% endfor %}"
    path = tiny.write(folder / "model.gguf", made)
    (folder / "model-Q4_K_M.gguf").write_bytes(path.read_bytes())
    for name in ("text.txt", "question.txt", "long-question.txt"):
        (folder / name).write_text("All of this is a text. " * 100)
    export_mlx(path, folder / "mlx-community" / "Qwen3-4B-4bit")
    for name in ("bin", ".venv/bin"):
        shim = folder / name / "mlxfuse"
        shim.parent.mkdir(parents=True)
        shim.write_text(f'#!/bin/sh\nexec {sys.executable} -m mlxfuse "$@"\n')
        shim.chmod(0o755)
    return folder


def _run(folder: Path, *command: str) -> tuple[str, str]:
    path = f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(README.parent), "PATH": path},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout, done.stderr


# What is in the answers, where that is known.
ANSWERS = {
    "What is the capital of France?": "Paris",
    "inspect model": "llama",
    "doctor": "model-Q4_K_M.gguf fits",
    "-n 4 -r 2": "| tg4 ",
    "bench model-": "| tg4 ",
    "bench model.gguf": "| tg16 ",
    "--kld": "k8v4",
    "perplexity": "tokens scored",
    "gguf exported": "exported",
    "gguf checkpoint": "checkpoint",
}


@pytest.mark.parametrize("command", [c for c in RUN if " report.json --plot" not in c])
def test_a_command_of_the_readme(command: str, demo: Path, folder: Path) -> None:
    """Without a model that of the demo, which is there; the files it names are small ones."""
    if command.startswith("mlxfuse server"):
        return _serve(command, folder)
    if "bench model" in command:
        command += " -r 2"
    out, _ = _run(folder, "sh", "-ec", command)
    assert all(text.lower() in out.lower() for of, text in ANSWERS.items() if of in command), out
    if "--plot speeds.svg" in command:  # the next line of its block draws the same again
        (again,) = (c for c in RUN if " report.json --plot" in c)
        _run(folder, "sh", "-ec", again)
        assert (folder / "again.svg").read_bytes() == (folder / "speeds.svg").read_bytes()


def _serve(command: str, folder: Path) -> None:
    """On any free port, until it has said where it listens."""
    words = [sys.executable, "-m", *shlex.split(command.replace("8080", "0"))]
    with subprocess.Popen(
        words,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(README.parent)},
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        assert process.stderr is not None
        assert "at http://127.0.0.1:" in process.stderr.readline()
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
    assert process.returncode == INTERRUPTED


@pytest.mark.parametrize("block", [b for language, b in BLOCKS if language == "python"])
def test_a_script_of_the_readme(block: str, demo: Path, folder: Path) -> None:
    """The repository of MLX's community is a folder of the same name here."""
    if "8080" in block:
        server = Server(*load(demo), "demo", Settings(max_tokens=16), port=0)
        threading.Thread(target=server.serve, daemon=True).start()
        block = block.replace("http://127.0.0.1:8080", server.address)
    try:
        out, _ = _run(folder, sys.executable, "-c", block)
    finally:
        if "base_url" in block:
            server.stop()
    assert "Paris" in out or "nothing fused" in out


def _group() -> Any:
    return typer.main.get_command(app)


def _parse(command: str) -> None:
    """What can be known of a command without running it: that it means something.

    Raises:
        usage errors of typer's, InvalidRequirement, AssertionError: it does not.
    """
    program, *arguments = shlex.split(command.partition("<")[0])
    match Path(program).name, arguments:
        case "mlxfuse", [name, *rest]:
            _group().commands[name].make_context(name, rest).close()
        case "pip", ["install", "-e", target]:
            project = tomllib.loads((README.parent / "pyproject.toml").read_text())["project"]
            wanted = Requirement(target.replace(".", project["name"]))
            assert wanted.extras <= project["optional-dependencies"].keys()
            for extra in wanted.extras:
                assert [Requirement(r) for r in project["optional-dependencies"][extra]]
        case _, ["-m", module, *_]:
            assert find_spec(module), module
        case _:
            raise AssertionError(command)


@pytest.mark.parametrize("command", NOT_RUN)
def test_what_is_not_run_is_parsed(command: str) -> None:
    _parse(command)


def test_commands_in_the_text_mean_something() -> None:
    pages = "".join(page.read_text() for page in (README, *PAGES))
    modules = re.findall(r"`(?:[\w./]+/)?python -m ([\w.]+)[^`]*`", pages)
    assert len(set(modules)) >= 10
    for module in modules:
        assert find_spec(module), module
    for line in re.findall(r"`(?:MLXFUSE_KERNELS=\w+ )?(mlxfuse [a-z]+ [^`]*)`", TEXT):
        if line.split()[1] not in ("export", "--json"):
            _parse(line)


@pytest.mark.parametrize(
    "command",
    ["mlxfuse tune --no-such-flag", "pip install -e '.[no-such]'", "python -m tests.no_such", "ls"],
)
def test_a_command_without_meaning_is_found(command: str) -> None:
    usage = typer.BadParameter.__bases__[0]
    with pytest.raises((usage, AssertionError)):
        _parse(command)


def test_every_command_is_explained_and_has_an_example() -> None:
    found = _group()
    examples = {shlex.split(c)[1] for c in SHELL if c.startswith("mlxfuse ")}
    assert examples == found.commands.keys()
    for name, command in found.commands.items():
        assert len((command.help or "").split()) >= 5, name
        flags = [p for p in command.params if not (getattr(p, "hidden", False))]
        assert [p.name for p in flags if not getattr(p, "help", "")] == [], name
        # A server's output is what its clients get; two commands do something and report nothing.
        silent = name in ("server", "pull", "rm")
        assert any("--json" in p.opts for p in flags) != silent, name


def _offences(name: str, text: str) -> list[str]:
    """Reads of the environment outside env.py, and switches that its table does not have."""
    found = ["os.environ"] if "os.environ" in text and name not in ALLOWED_ENVIRON else []
    switches = set(re.findall(r"MLXFUSE_[A-Z_]+", text))
    return found + sorted(switches - env.VARIABLES.keys())


# They set variables of transformers and prompt_toolkit, and read none.
ALLOWED_ENVIRON = {"_models.py", "_lines.py"}


def test_every_switch_is_read_in_one_place() -> None:
    for path in (README.parent / "mlxfuse").rglob("*.py"):
        if path.name != "env.py":
            assert _offences(path.name, path.read_text()) == [], path
    assert _offences("x.py", 'os.environ["MLXFUSE_NO_SUCH"]') == ["os.environ", "MLXFUSE_NO_SUCH"]
