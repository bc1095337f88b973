"""Starts ranks on this machine, over the ring on 127.0.0.1, and never waits for ever.

``python -m tests.distributed.launch RANKS MODULE ARGUMENTS`` imports a module once and forks into
so many ranks, each of which calls its ``main``: most of a small test's time is imports.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import traceback
from importlib import import_module
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


def hosts(ranks: int) -> str:
    """A file that tells MLX's ring of so many ranks on this machine."""
    handle, name = tempfile.mkstemp(suffix=".json")
    with os.fdopen(handle, "w") as file:
        json.dump([[f"127.0.0.1:{port}"] for port in free_ports(ranks)], file)
    return name


def start(
    ranks: int, module: str, *arguments: str | tuple[str, ...], **more: Any
) -> list[subprocess.Popen[str]]:
    """``python -m MODULE ARGUMENTS`` as so many ranks; a tuple has one argument for each.

    Args:
        more: of `subprocess.Popen`.
    """
    more = {"stdin": subprocess.DEVNULL, "stderr": subprocess.STDOUT, **more}
    told = hosts(ranks)
    return [
        subprocess.Popen(
            [sys.executable, "-m", module]
            + [one if isinstance(one, str) else one[rank] for one in arguments],
            cwd=ROOT,
            env={**os.environ, "MLX_HOSTFILE": told, "MLX_RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
            **more,
        )
        for rank in range(ranks)
    ]


def start_forked(ranks: int, module: str, *arguments: str) -> subprocess.Popen[str]:
    """One process that becomes so many ranks; see above."""
    return subprocess.Popen(
        [sys.executable, "-m", "tests.distributed.launch", str(ranks), module, *arguments],
        cwd=ROOT,
        # Threads of a BLAS would not live in the forked processes.
        env={**os.environ, "MLX_HOSTFILE": hosts(ranks), "OPENBLAS_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str], timeout: float) -> str:
    """What forked ranks printed; they are killed after so many seconds.

    Raises:
        RuntimeError: one failed, or did not end in time; with what was printed.
    """
    try:
        printed, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise RuntimeError(f"a rank did not end in time:\n{process.communicate()[0]}") from None
    if process.returncode:
        raise RuntimeError(f"a rank failed:\n{printed}")
    return printed


def wait_for_others_quietly() -> None:
    """Let MLX's ring sleep where it has nothing to receive; it would ask again and again.

    Called by a rank once its group is there. On few cores that takes the time of those it waits
    for. Its sockets give up after a millisecond, as if they did not block at all.
    """
    for name in os.listdir("/proc/self/fd") if sys.platform == "linux" else ():
        try:
            own = socket.socket(fileno=os.dup(int(name)))
        except OSError:
            continue
        with own:
            if own.family == socket.AF_INET:
                os.set_blocking(int(name), True)
                own.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", 0, 1000))


def _rank(rank: int, module: str, arguments: list[str]) -> int:
    """The exit code of one rank."""
    os.environ["MLX_RANK"] = str(rank)
    try:
        import_module(module).main(*arguments)
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


def main(ranks: str, module: str, *arguments: str) -> int:
    """Fork into ranks; the exit code of the first one that fails, which ends the others."""
    import_module(module)
    left = set()
    for rank in range(int(ranks)):
        child = os.fork()
        if not child:
            os._exit(_rank(rank, module, list(arguments)))
        left.add(child)
    code = 0
    while left:
        child, status = os.wait()
        left.discard(child)
        if status and not code:
            code = 1
            for other in left:
                os.kill(other, signal.SIGKILL)
    return code


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
