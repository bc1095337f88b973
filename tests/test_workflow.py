"""What GitHub runs: every push on Linux and on real Metal, weekly the newest mlx and mlx-lm."""

import re
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest
import yaml

from .cli.test_cli import REPOSITORY

WORKFLOW = yaml.safe_load((REPOSITORY / ".github/workflows/ci.yml").read_text())
JOBS = WORKFLOW["jobs"]
ON = WORKFLOW[True]  # what YAML 1.1 makes of the word on


def scripts(job):
    return [step["run"] for step in JOBS[job]["steps"] if "run" in step]


def test_when_and_where():
    assert {"push", "pull_request", "schedule"} <= ON.keys()
    ((minute, hour, *_, weekday),) = (entry["cron"].split() for entry in ON["schedule"])
    assert (minute.isdigit(), hour.isdigit(), weekday.isdigit()) == (True,) * 3  # once a week
    assert JOBS["linux"]["runs-on"].startswith("ubuntu")
    assert scripts("linux") == ["bash .ci/run"]
    assert JOBS["macos"]["runs-on"].startswith("macos")
    assert "if" not in JOBS["macos"]  # each push, and each week
    assert "schedule" in JOBS["newest"]["if"]
    for job in ("macos", "newest"):
        assert any("--upgrade-strategy eager" in s and "mlx-lm" in s for s in scripts(job))
        assert any("python -m pytest" in s for s in scripts(job))


def test_macos_times_nothing():
    text = "\n".join(scripts("macos"))
    assert not re.search(r"\b(bench|tune|time)\b", text)
    assert "--ignore tests/fusion/test_host.py" in text  # which compares times
    assert (REPOSITORY / "tests/fusion/test_host.py").is_file()


@pytest.mark.skipif(mx.metal.is_available(), reason="there is a device")
def test_macos_fails_without_metal_and_names_the_device():
    """The very step, where there is none."""
    (script,) = (s for s in scripts("macos") if "is_available" in s)
    assert "print(mx.device_info())" in script
    script = script.replace("python ", f"{sys.executable} ")
    done = subprocess.run(["bash", "-ec", script], capture_output=True, text=True)
    assert done.returncode != 0
    assert "no Metal device" in done.stderr


@pytest.mark.parametrize("job", JOBS)
def test_its_scripts_are_shell_and_its_paths_are_there(job):
    for script in scripts(job):
        subprocess.run(["bash", "-n", "-c", script], check=True)
    for path in re.findall(r"(?:\.ci|tests)/[\w/.]+", "\n".join(scripts(job))):
        assert Path(REPOSITORY, path).exists(), path
