"""What the system says is left."""

import os
from pathlib import Path

import pytest

from mlxfuse import memory
from mlxfuse.errors import MLXFuseError


def test_no_more_than_the_machine_has() -> None:
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0 < memory.available() <= physical


def test_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available", lambda: 5)
    monkeypatch.setattr(memory, "_physical", lambda: 9 << 30)
    monkeypatch.setattr(memory.sys, "platform", "linux")
    assert memory.machine() == memory.Machine(False, 5, 9 << 30)
    monkeypatch.setattr(memory.sys, "platform", "darwin")
    assert memory.machine() == memory.Machine(True, 6 << 30, 9 << 30)
    monkeypatch.setenv("MLXFUSE_MEMORY", "64")  # three quarters of a large one
    assert memory.machine() == memory.Machine(True, 48 << 30, 64 << 30)
    for wrong in ("64GB", "0", "-1", "9" * 9):
        monkeypatch.setenv("MLXFUSE_MEMORY", wrong)
        with pytest.raises(MLXFuseError, match="MLXFUSE_MEMORY"):
            memory.machine()


def test_a_control_group_leaves_its_limit_less_what_is_held(tmp_path: Path) -> None:
    assert memory._cgroup(tmp_path) is None
    (tmp_path / "memory.stat").write_text("file 5000\nanon 300\nkernel 7\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert memory._cgroup(tmp_path) is None
    (tmp_path / "memory.max").write_text("1000\n")
    assert memory._cgroup(tmp_path) == 700
    (tmp_path / "memory.max").write_text("200\n")
    assert memory._cgroup(tmp_path) == 0
