"""Starts ranks on this machine, over the ring on 127.0.0.1, and never waits for ever."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 that nothing listens on."""
    held = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in held]
    for one in held:
        one.close()
    return ports


def start(
    ranks: int, module: str, *arguments: str | tuple[str, ...], **more: Any
) -> list[subprocess.Popen[str]]:
    """``python -m MODULE ARGUMENTS`` as so many ranks; a tuple has one argument for each.

    Args:
        more: of `subprocess.Popen`.
    """
    more = {"stdin": subprocess.DEVNULL, "stderr": subprocess.STDOUT, **more}
    handle, hosts = tempfile.mkstemp(suffix=".json")
    with os.fdopen(handle, "w") as file:
        json.dump([[f"127.0.0.1:{port}"] for port in free_ports(ranks)], file)
    return [
        subprocess.Popen(
            [sys.executable, "-m", module]
            + [one if isinstance(one, str) else one[rank] for one in arguments],
            cwd=ROOT,
            env={**os.environ, "MLX_HOSTFILE": hosts, "MLX_RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
            **more,
        )
        for rank in range(ranks)
    ]


def finish(processes: list[subprocess.Popen[str]], timeout: float) -> list[str]:
    """What each rank printed; they are killed after so many seconds.

    Raises:
        RuntimeError: one failed, or did not end in time; with what it printed.
    """
    try:
        printed = [process.communicate(timeout=timeout)[0] for process in processes]
    except subprocess.TimeoutExpired:
        for process in processes:
            process.kill()
        printed = [process.communicate()[0] for process in processes]
        raise RuntimeError("a rank did not end in time:\n" + "\n".join(printed)) from None
    if any(process.returncode for process in processes):
        raise RuntimeError("a rank failed:\n" + "\n".join(printed))
    return printed
