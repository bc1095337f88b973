"""Host time of a request to an idle server: mlxfuse's beside mlx_lm.server, in the same run.

    python -m tests.bench.bench_server [--pairs 100]

Both serve one tiny checkpoint, each in a process of its own, so that next to nothing is computed.
A request has a prompt of 32 tokens that was never sent before and asks for 1 token; the servers
take turns. Printed are the medians, the median of the ratios of neighbours, and the CPU's time,
which does not depend on what else the machine does.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mlxfuse.export.mlx_checkpoint import export_mlx
from tests.models import tiny

TOKENS = 32  # of a prompt: one for each byte


def cpu_seconds(process: int) -> float:
    """CPU time that a process has taken."""
    stat = Path(f"/proc/{process}/stat")
    if stat.is_file():
        fields = stat.read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    told = subprocess.check_output(["ps", "-o", "time=", "-p", str(process)], text=True)
    minutes, _, seconds = told.strip().rpartition(":")
    return 60 * float(minutes or 0) + float(seconds)


@contextmanager
def serving(*command: str) -> Iterator[tuple[int, int]]:
    """The port of a server that answers, and its process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-m", *command, "--port", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        end = time.monotonic() + 300
        while True:
            with contextlib.suppress(OSError, http.client.HTTPException):
                request(port, 0)
                break
            if process.poll() is not None or time.monotonic() > end:
                raise SystemExit(f"{command[0]} does not answer")
            time.sleep(0.2)
        yield port, process.pid
    finally:
        process.terminate()
        process.wait()


def request(port: int, number: int) -> float:
    """Seconds until the answer is read."""
    prompt = f"{number:06}" + "x" * (TOKENS - 6)
    body = json.dumps({"prompt": prompt, "max_tokens": 1, "temperature": 0})
    start = time.perf_counter()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
    answer = connection.getresponse()
    found = json.loads(answer.read())
    connection.close()
    taken = time.perf_counter() - start
    usage = found["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (TOKENS, 1), usage
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=100)
    pairs = parser.parse_args().pairs
    names = ("mlxfuse", "mlx_lm.server")
    with tempfile.TemporaryDirectory() as folder:
        file = tiny.write(Path(folder) / "tiny.gguf", tiny.build("llama", 0))
        model = Path(folder) / "tiny"
        export_mlx(file, model)
        ours = serving("mlxfuse", "server", str(model))
        with ours as a, serving("mlx_lm", "server", "--model", str(model)) as b:
            for number in range(1, 11):
                for port, _ in (a, b):
                    request(port, number)
            before = [cpu_seconds(process) for _, process in (a, b)]
            taken: tuple[list[float], list[float]] = [], []
            for number in range(11, pairs + 11):
                for which in (0, 1) if number % 2 else (1, 0):
                    taken[which].append(request((a, b)[which][0], number))
            after = [cpu_seconds(process) for _, process in (a, b)]
    cpu = [1e3 * (y - x) / pairs for x, y in zip(before, after, strict=True)]
    print("| server | median of a request, ms | CPU of a request, ms |\n| --- | --- | --- |")
    for name, seconds, each in zip(names, taken, cpu, strict=True):
        print(f"| {name} | {1e3 * statistics.median(seconds):.2f} | {each:.2f} |")
    ratios = [x / y for x, y in zip(*taken, strict=True)]
    print(f"ratios: {statistics.median(ratios):.2f} of time, {cpu[0] / cpu[1]:.2f} of CPU")


if __name__ == "__main__":
    main()
