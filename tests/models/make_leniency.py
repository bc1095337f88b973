"""Make `golden_leniency.json`: what llama.cpp makes of the files of `tests.models.leniency`.

    pip install xllamacpp && python -m tests.models.make_leniency [CASE ...]

A verdict is a list of logits, or null where llama.cpp does not load the file, ends, or computes
what is no number, or nothing for `SECONDS`.
"""

import json
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import numpy as np

from tests.models import leniency

SECONDS = 30
GOLDEN = Path(__file__).with_name("golden_leniency.json")


def serve() -> None:
    """A verdict for each path on stdin; llama.cpp may end the process."""
    from tests.models.make_golden import llama_cpp_logits

    for line in sys.stdin:
        try:
            rows = llama_cpp_logits(Path(line.strip()), np.array(leniency.PROMPT, np.int32))
            found = [round(float(x), 4) for x in rows[-1, : leniency.COUNT]]
        except (RuntimeError, ValueError):
            found = None
        if found is not None and not np.isfinite(found).all():
            found = None
        print("verdict", json.dumps(found), flush=True)


class Judge:
    """llama.cpp in a process of its own, begun anew where it ended."""

    def __init__(self) -> None:
        self._process = None

    def __call__(self, path: Path) -> list[float] | None:
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.models.make_leniency", "--serve"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                env={**os.environ, "GGML_NO_BACKTRACE": "1"},
            )
        print(path, file=self._process.stdin, flush=True)
        timer = threading.Timer(SECONDS, self._process.kill)
        timer.start()
        try:
            for line in self._process.stdout:
                if line.startswith("verdict "):
                    return json.loads(line.removeprefix("verdict "))
        finally:
            timer.cancel()
        self._process = None
        return None


def main() -> None:
    golden = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    judge = Judge()
    for case in sys.argv[1:] or leniency.CASES:
        metadata, tensors = leniency.model(case)
        golden[case] = {}
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "x.gguf")
            path.write_bytes(leniency.file(metadata, tensors))
            golden[case]["as it is"] = judge(path)
            for change in leniency.changes(metadata, leniency.asked(case, path)):
                path.write_bytes(leniency.file(metadata, tensors, change))
                golden[case][f"{change[0]}: {change[1]}"] = judge(path)
        print(case, len(golden[case]), golden[case]["as it is"], flush=True)
        GOLDEN.write_text(json.dumps(golden, indent=0) + "\n")


if __name__ == "__main__":
    serve() if "--serve" in sys.argv else main()
