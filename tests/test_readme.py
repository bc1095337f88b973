"""The README's tables and commands are those of the code."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from mlxfuse import env

from .readme import README, render, tables

TEXT = README.read_text()


def _block(mark: str) -> str:
    found = re.search(rf"<!-- test: {mark} -->\n```\w+\n(.*?)```", TEXT, flags=re.S)
    assert found, mark
    return found[1].strip()


def test_tables_are_current() -> None:
    assert render(TEXT) == TEXT, "run: python -m tests.readme"
    assert all(table in TEXT for table in tables().values())
    changed = TEXT.replace("| Q4_K | 4.5 |", "| Q4_K | 4.6 |")
    assert changed != TEXT
    assert render(changed) == TEXT


def test_ci_runs_the_test_command() -> None:
    command = _block("suite").replace(".venv/bin/", "")
    script = (README.parent / ".ci" / "run").read_text()
    for part in command.split(" && "):
        assert part in script, part


def test_python_example_runs(demo: Path) -> None:
    assert demo.is_file()  # the example loads the demo model, which must not be fetched here
    done = subprocess.run(
        [sys.executable, "-c", _block("python")], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout


def test_every_switch_is_read_in_one_place() -> None:
    package = README.parent / "mlxfuse"
    for path in package.rglob("*.py"):
        if path.name == "env.py":
            continue
        text = path.read_text()
        assert "os.environ" not in text or path.name in ALLOWED_ENVIRON, path
        for name in set(re.findall(r"MLXFUSE_[A-Z_]+", text)):
            assert name in env.VARIABLES, (path, name)


# These read other programs' variables (indexes, certificates, transformers' advice), not ours.
ALLOWED_ENVIRON = {"demo.py", "download.py", "hub.py", "cli.py"}


def test_a_switch_outside_the_table_would_be_seen() -> None:
    assert "MLXFUSE_NO_SUCH" not in env.VARIABLES
    assert os.environ.get("MLXFUSE_NO_SUCH") is None
