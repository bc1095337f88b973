"""Mutations of a sound file: refused with the right exception, in time and in little memory.

Hypothesis is derandomised, so every run sees the same examples. The tests at the end show that the
guard itself notices each of the three failures.
"""

from __future__ import annotations

import re
import signal
import struct
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from mlxfuse.errors import GGUFError, UnsupportedError
from mlxfuse.gguf import header, open_gguf
from tests.gguf import make
from tests.gguf.make import T, Typed

EXAMPLES = 200
SECONDS = 1.0
# Python objects cost more than their bytes in the file: an empty string takes 8 there.
BYTES_PER_BYTE, BYTES_AT_LEAST = 32, 1 << 18

SEED = make.gguf(
    {
        "general.architecture": "llama",
        "general.alignment": 32,
        "n": Typed(make.I64, -5),
        "flag": True,
        "eps": 1e-5,
        "tokens": ["a", "", "ĠĠ", "日本"],
        "scores": np.array([0.5, -1.0], "f4"),
        "flags": np.array([True, False]),
        "split.count": Typed(make.U16, 1),
    },
    [T("x", "Q4_K", (2, 256)), T("y", "F32", (2, 3)), T("z", "Q8_0", (0, 32))],
)
# Numbers that have broken readers: the edges of the integer types, and around the file's size.
EDGES = [0, 1, 2, 8, 9, 12, 13, 31, 255, 256, 2**16, 2**30, 2**31 - 1, 2**31, 2**32 - 1, 2**62]
EDGES += [2**63 - 1, 2**63, 2**64 - 1, 2**64 - 32, len(SEED) - 1, len(SEED), len(SEED) + 1]

# Where a length, count, type or offset stands: mutations there reach deepest.
END = SEED.index(make.string("z")) + 9 + 4 + 2 * 8 + 4 + 8
position = st.one_of(st.integers(0, END), st.integers(0, len(SEED) - 1))
mutation = st.one_of(
    st.tuples(st.just("byte"), position, st.integers(0, 255)),
    st.tuples(st.just("u32"), position, st.sampled_from(EDGES)),
    st.tuples(st.just("u64"), position, st.sampled_from(EDGES)),
    st.tuples(st.just("cut"), position, st.integers(1, 40)),
    st.tuples(st.just("repeat"), position, st.integers(1, 40)),
    st.tuples(st.just("end"), position, st.just(0)),
)


def mutate(raw: bytes, steps: list[tuple[str, int, int]]) -> bytes:
    out = bytearray(raw)
    for kind, at, number in steps:
        if kind == "byte":
            out[at : at + 1] = bytes([number])
        elif kind == "u32":
            out[at : at + 4] = struct.pack("<I", number & 0xFFFFFFFF)
        elif kind == "u64":
            out[at : at + 8] = struct.pack("<Q", number)
        elif kind == "cut":
            del out[at : at + number]
        elif kind == "repeat":
            out[at:at] = out[at : at + number]
        else:
            del out[at:]
    return bytes(out)


def use(path: Path) -> None:
    """Open a file and touch all that it has."""
    with open_gguf(path) as f:
        for key, value in f.metadata.items():
            kind = list if isinstance(value, np.ndarray) else type(value)
            if kind is not int or 0 <= value < 2**31:
                f.get(key, kind)
        for tensor in f.tensors.values():
            assert f.view(tensor).tobytes() == f.read(tensor).tobytes()
            assert tensor.rows * tensor.row_bytes == tensor.nbytes
            assert tensor.offset + tensor.nbytes <= f.size
        assert isinstance(f.architecture, str)


@contextmanager
def _no_hang(seconds: float) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise AssertionError(f"still busy after {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def guarded(action: Callable[[Path], object], path: Path) -> str:
    """Run it; what it said. Fails on any other exception, on slowness and on waste of memory."""
    allowed = BYTES_AT_LEAST + BYTES_PER_BYTE * path.stat().st_size
    said = "accepted"
    with _no_hang(20 * SECONDS):  # a wall clock for what waits; the processor's for what is slow
        tracemalloc.start()
        begin = time.thread_time()
        try:
            action(path)
        except (GGUFError, UnsupportedError) as error:
            said = str(error)
        finally:
            spent = time.thread_time() - begin
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
    assert spent < SECONDS, f"took {spent:.2f} s"
    assert peak < allowed, f"allocated {peak} bytes for a file of {path.stat().st_size}"
    return said


def test_mutations(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(SEED)
    assert guarded(use, path) == "accepted"
    outcomes: Counter[str] = Counter()

    @settings(
        max_examples=EXAMPLES,
        derandomize=True,
        database=None,
        deadline=None,  # guarded() has its own, on a clock that other processes do not move
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.lists(mutation, min_size=1, max_size=3))
    def run(steps: list[tuple[str, int, int]]) -> None:
        path.write_bytes(mutate(SEED, steps))
        said = guarded(use, path).removeprefix(str(path))
        outcomes[re.sub(r"at byte \d+|'[^']*'|-?\d+", "_", said)[:40]] += 1

    run()
    # The mutations must reach all over the reader, and some must be harmless.
    assert sum(outcomes.values()) >= EXAMPLES
    assert 0 < outcomes["accepted"] < EXAMPLES / 2
    assert len(outcomes) >= 15, outcomes


@pytest.mark.parametrize("number", [1, 13, 2**30, 2**63, 2**64 - 1])
def test_every_position(tmp_path: Path, number: int) -> None:
    """No place in the header is left to chance."""
    path = tmp_path / "m.gguf"
    for at in range(4, END):
        path.write_bytes(mutate(SEED, [("u64", at, number)]))
        guarded(use, path)


# The guard notices what it is there for.


def _work(seconds: float) -> None:
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass


@pytest.mark.parametrize(
    ("action", "what"),
    [
        (lambda path: struct.unpack("<Q", b""), "unpack requires"),
        (lambda path: {}["x"], "x"),
        (lambda path: bytearray(1 << 20), "allocated"),
        (lambda path: _work(0.1), "took"),
        (lambda path: time.sleep(30), "still busy"),
    ],
    ids=["struct.error", "KeyError", "memory", "slow", "hang"],
)
def test_the_guard_fails(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    action: Callable[[Path], object],
    what: str,
) -> None:
    monkeypatch.setitem(globals(), "SECONDS", 0.05)
    with pytest.raises((struct.error, KeyError, AssertionError), match=what):
        guarded(action, make.write(tmp_path / "m"))


def test_a_reader_without_its_check_of_bounds_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(header.Cursor, "need", lambda self, nbytes, what: None)
    path = make.write(tmp_path / "m", {"k": 1})
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(struct.error):
        guarded(use, path)
