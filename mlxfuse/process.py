"""The edge of the process: Ctrl-C, errors nobody expected, messages on stderr."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from types import FrameType, TracebackType
from typing import NoReturn, TextIO

from . import env
from .terminal import neutralize

INTERRUPTED = 130
# Seconds that Ctrl-C leaves the interpreter to unwind; one call into MLX can take far longer.
GRACE = 1.0


def watch_interrupts() -> None:
    """Make Ctrl-C prompt even while the main thread is inside one long native call."""
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        return
    signal.signal(signal.SIGINT, _interrupt)
    read, write = os.pipe()
    os.set_blocking(write, False)
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)

    def ours() -> bool:
        # A command that handles Ctrl-C itself, as `chat` does, has put its own handler there.
        return signal.getsignal(signal.SIGINT) is _interrupt

    def watch() -> None:
        while os.read(read, 1) != bytes([signal.SIGINT]) or not ours():
            pass
        time.sleep(GRACE)
        _leave()

    threading.Thread(target=watch, daemon=True).start()


def _interrupt(signum: int, frame: FrameType | None) -> None:
    """As Python does, but at once during an import: native modules abort if theirs is broken off,
    and Python kills itself later if the code that it broke off was made by `exec`."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            _leave()
        frame = frame.f_back
    raise KeyboardInterrupt


def _leave() -> NoReturn:
    if os.isatty(2):
        os.write(2, b"\x1b[?25h\n")  # a progress bar may have hidden the cursor
    os._exit(INTERRUPTED)


def unexpected(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """The hook for what is not an error of ours: one line, exit code 1; none after Ctrl-C."""
    if issubclass(kind, KeyboardInterrupt):
        _leave()
    where = traceback.extract_tb(trace)[-1] if trace else None
    place = f" ({Path(where.filename).name}:{where.lineno})" if where else ""
    fail(f"{kind.__name__}: {error}{place}; --debug shows the traceback", errors())


def fail(message: str, to: TextIO | None = None) -> None:
    """Print one message, safe for a terminal, on stderr or ``to``; with the rank, if it has one."""
    rank = env.launched_rank()
    who = "mlxfuse" if rank is None else f"mlxfuse: rank {rank}"
    print(f"{who}: {neutralize(message)}", file=to or sys.stderr, flush=True)


def errors() -> TextIO:
    """Where errors go: stderr, also of a rank whose notes go nowhere."""
    return (sys.__stderr__ or sys.stderr) if env.launched_rank() else sys.stderr
