"""The README's tables and commands are those of the code."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from mlxfuse import env

from .picture import PICTURE, counts, draw
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


def test_bench_example_runs(demo: Path, tmp_path: Path) -> None:
    assert demo.is_file()
    script = _block("bench").replace("mlxfuse ", f"{sys.executable} -m mlxfuse ")
    env = {**os.environ, "PYTHONPATH": str(README.parent)}
    done = subprocess.run(
        ["sh", "-ec", script], capture_output=True, text=True, timeout=300, cwd=tmp_path, env=env
    )
    assert done.returncode == 0, done.stderr
    assert "| tg4" in done.stdout
    assert (tmp_path / "again.svg").read_bytes() == (tmp_path / "speeds.svg").read_bytes()


def _offences(name: str, text: str) -> list[str]:
    """Reads of the environment outside env.py, and switches that its table does not have."""
    found = ["os.environ"] if "os.environ" in text and name not in ALLOWED_ENVIRON else []
    switches = set(re.findall(r"MLXFUSE_[A-Z_]+", text))
    return found + sorted(switches - env.VARIABLES.keys())


# Sets transformers' variables, reads none.
ALLOWED_ENVIRON = {"_common.py"}


def test_every_switch_is_read_in_one_place() -> None:
    for path in (README.parent / "mlxfuse").rglob("*.py"):
        if path.name != "env.py":
            assert _offences(path.name, path.read_text()) == [], path
    assert _offences("x.py", 'os.environ["MLXFUSE_NO_SUCH"]') == ["os.environ", "MLXFUSE_NO_SUCH"]
