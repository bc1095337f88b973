"""What the system says is left."""

import os
from pathlib import Path

import pytest

from mlxfuse import memory


def test_no_more_than_the_machine_has() -> None:
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0 < memory.available() <= physical


def test_a_macs_budget_is_two_thirds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available", lambda: 5)
    monkeypatch.setattr(memory, "_physical", lambda: 9)
    monkeypatch.setattr(memory.sys, "platform", "linux")
    assert memory.budget() == 5
    monkeypatch.setattr(memory.sys, "platform", "darwin")
    assert memory.budget() == 6


def test_a_control_group_leaves_its_limit_less_what_is_held(tmp_path: Path) -> None:
    assert memory._cgroup(tmp_path) is None
    (tmp_path / "memory.stat").write_text("file 5000\nanon 300\nkernel 7\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert memory._cgroup(tmp_path) is None
    (tmp_path / "memory.max").write_text("1000\n")
    assert memory._cgroup(tmp_path) == 700
    (tmp_path / "memory.max").write_text("200\n")
    assert memory._cgroup(tmp_path) == 0
