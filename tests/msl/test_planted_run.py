"""Bugs that only a run shows: the checked build names each; a wrong result is seen in any build."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass

import pytest

from tests import msl
from tests.msl import subjects

SUBJECTS = {
    "q4_k": subjects.q4_k_gemv,
    "q4_k, 13 rows": functools.partial(subjects.q4_k_gemv, rows=13),
    "rms": subjects.rms_int8,
    "gemm": subjects.gemm,
}
BARRIER = "  threadgroup_barrier(mem_flags::mem_threadgroup);\n"
LOOP = "  for (int b = 0;"
SUM = "const float t = simd_sum(acc[r]);"


@dataclass(frozen=True)
class Bug:
    """A bug and what each build makes of it.

    Attributes:
        subject: the kernel it is planted in.
        edits: ``(old, new)`` replacements in the kernel.
        checked: the kind of the checked build's report, or "wrong" for wrong results.
        about: a part of the report.
        at: parts, joined by "|", of source lines the report names.
        fast: what the fast build, in three thread orders, may make of it: a kind, "wrong", or
            "unnoticed". It is a set where memory layout decides.
        header: text added before the kernel.
    """

    subject: str
    edits: tuple[tuple[str, str], ...]
    checked: str
    about: str
    at: str
    fast: frozenset[str]
    header: str = ""

    def planted(self) -> subjects.Subject:
        return SUBJECTS[self.subject]().planted(self.edits, self.header)


def bug(subject, edits, checked, about, at, fast, header=""):
    return Bug(subject, tuple(edits), checked, about, at, frozenset(fast.split(" | ")), header)


BUGS = {
    # -- bounds
    "reads one element past each row": bug(
        "rms",
        [("i < uint(D); i += 256", "i <= uint(D); i += 256")],
        "out-of-bounds",
        "offset 4096 of buffer 'x' (4096 bytes)",
        "float(xr[i]);",
        "fault",
    ),
    "reads past the end of an input": bug(
        "rms",
        [("float(w[i])", "float(w[i + 1])")],
        "out-of-bounds",
        "offset 1024 of buffer 'w' (1024 bytes)",
        "float(w[i + 1])",
        "fault",
    ),
    "writes past the end of an output": bug(
        "q4_k",
        [("if (lane == 0 && row0 + r < uint(M)) y[row0 + r]", "if (lane == 0) y[row0 + r + 1]")],
        "out-of-bounds",
        "write of 2 bytes at offset 32 of buffer 'y' (32 bytes)",
        "y[row0 + r + 1]",
        "fault",
    ),
    "no guard of the last rows": bug(
        "q4_k, 13 rows",
        [("lane == 0 && row0 + r < uint(M)", "lane == 0")],
        "out-of-bounds",
        "write of 2 bytes at offset 26 of buffer 'y' (26 bytes)",
        "y[row0 + r] = T(t)",
        "out-of-bounds",
    ),
    "negative device index": bug(
        "q4_k",
        [("x + b * 256", "x - 16 + b * 256")],
        "out-of-bounds",
        "offset -32 of buffer 'x'",
        "float4(*(const device vec<T, 4>*)xb)",
        "wrong",
    ),
    "threadgroup array overrun": bug(
        "rms",
        [("partial[sg] = acc", "partial[sg + 28] = acc")],
        "out-of-bounds",
        "array index out of bounds",
        "partial[sg + 28]",
        "wrong",
    ),
    "threadgroup stride too large": bug(
        "gemm",
        [("As[r * 40 + c]", "As[r * 42 + c]")],
        "out-of-bounds",
        "array index out of bounds",
        "As[r * 42 + c]",
        "wrong | order-dependent",
    ),
    "private array overrun": bug(
        "q4_k",
        [
            (SUM, f"const float other = acc[r + (blocks > 1)];\n    {SUM}"),
            ("T(t)", "T(t + 0.0f * other)"),
        ],
        "out-of-bounds",
        "array index out of bounds",
        "acc[r + (blocks > 1)]",
        "wrong | unnoticed | order-dependent",
    ),
    "private array overrun through a pointer": bug(
        "q4_k",
        [(LOOP, f"  fill(acc, 4 + (blocks > 1));\n{LOOP}")],
        "out-of-bounds",
        "on a thread-private variable",
        "fill(acc",
        "wrong | unnoticed | order-dependent",
        "inline void fill(thread float* p, int n) {\n  for (int i = 0; i < n; i++) p[i] = 0;\n}\n",
    ),
    # -- races and barriers
    "no barrier after a write": bug(
        "rms",
        [(BARRIER, "")],
        "uninitialised-read",
        "threadgroup memory 'partial'",
        "partial[lane]",
        "order-dependent",
    ),
    "barrier for no memory": bug(
        "rms",
        [("mem_flags::mem_threadgroup", "mem_flags::mem_none")],
        "data-race",
        "'partial'",
        "partial[lane]",
        "unnoticed",
    ),
    "barrier for device memory": bug(
        "rms",
        [("mem_flags::mem_threadgroup", "mem_flags::mem_device")],
        "data-race",
        "'partial'",
        "partial[lane]",
        "unnoticed",
    ),
    "simdgroup_barrier for threadgroup_barrier": bug(
        "rms",
        [("threadgroup_barrier", "simdgroup_barrier")],
        "uninitialised-read",
        "threadgroup memory 'partial'",
        "partial[lane]",
        "order-dependent",
    ),
    "no barrier before the next tile is written": bug(
        "gemm",
        [(f"  {BARRIER}    for (uint e", "    for (uint e")],
        "data-race",
        "s' byte",
        "s[r * 40 + c] =",
        "order-dependent",
    ),
    "no barrier after a tile is written": bug(
        "gemm",
        [(f"  {BARRIER}    for (int kk", "    for (int kk")],
        "data-race",
        "'As' byte",
        "simdgroup_load(ma[i], As",
        "order-dependent",
    ),
    "threadgroups write the same rows": bug(
        "q4_k",
        [("threadgroup_position_in_grid.x * 8", "threadgroup_position_in_grid.x * 4")],
        "data-race",
        "data race on 'y' byte 8: write by threadgroup 1 after write by threadgroup 0",
        "y[row0 + r]",
        "wrong",
    ),
    "all lanes write one value": bug(
        "q4_k", [("lane == 0 && ", "")], "data-race", "data race on 'y'", "y[row0 + r]", "unnoticed"
    ),
    "all lanes write a group's scale": bug(
        "rms",
        [("if (lane == 0) scales", "scales")],
        "data-race",
        "data race on 'scales'",
        "scales[",
        "unnoticed",
    ),
    # -- memory that nobody wrote
    "uninitialised threadgroup memory": bug(
        "rms",
        [("lane < simdgroups_per_threadgroup ? partial[lane] : 0.0f", "partial[lane]")],
        "uninitialised-read",
        "threadgroup memory 'partial'",
        "partial[lane]",
        "wrong",
    ),
    "uninitialised threadgroup memory, without effect": bug(
        "rms",
        [("const float r =", "if (partial[31] == 12345.0f) total += 1;\n  const float r =")],
        "uninitialised-read",
        "threadgroup memory 'partial'",
        "partial[31]",
        "unnoticed",
    ),
    "uninitialised private array": bug(
        "q4_k", [("acc[4] = {0, 0, 0, 0}", "acc[4]")], "wrong", "", "", "wrong"
    ),
    "output read before it is written": bug(
        "q4_k",
        [("y[row0 + r] = T(t)", "y[row0 + r] += T(t)")],
        "uninitialised-read",
        "device memory 'y'",
        "+= T(t)",
        "wrong",
    ),
    "output written in part": bug(
        "rms",
        [("g < uint(D) / 32", "g < uint(D) / 32 - 1")],
        "unwritten-output",
        "output 'q': 128 of 2048 bytes never written (first at byte 480)",
        "",
        "wrong",
    ),
    "output never written": bug(
        "rms",
        [("if (lane == 0) scales", "if (lane == 32) scales")],
        "unwritten-output",
        "output 'scales': 256 of 256 bytes never written",
        "",
        "wrong",
    ),
    "input written through a cast": bug(
        "q4_k",
        [(LOOP, f"  if (lane == 0) ((device half*)x)[0] = x[0];\n{LOOP}")],
        "read-only-write",
        "read-only buffer 'x'",
        "x)[0]",
        "unnoticed",
    ),
    # -- divergence
    "threadgroup_barrier in one branch": bug(
        "rms",
        [("threadgroup_barrier", "if (sg < 4) threadgroup_barrier")],
        "data-race",
        "'partial'",
        "partial[lane]",
        "divergent-barrier",
    ),
    "threadgroup_barrier after some threads returned": bug(
        "rms",
        [("  float acc = 0;", "  float acc = 0; if (tid >= 224) return;")],
        "divergent-barrier",
        "thread 224 has returned",
        "threadgroup_barrier(",
        "divergent-barrier",
    ),
    "simd_sum in half the lanes": bug(
        "q4_k",
        [(SUM, "float t = 0; if (lane < 16) t = simd_sum(acc[r]);")],
        "divergent-simd",
        "lane 31 returned while lane 0 waits",
        "t = simd_sum",
        "divergent-simd",
    ),
    "simd_sum after a lane returned": bug(
        "q4_k",
        [("  float acc[4]", "  if (lane == 31) return;\n  float acc[4]")],
        "divergent-simd",
        "lane 31 returned while lane 0 waits",
        "simd_sum(acc[r])",
        "divergent-simd",
    ),
    "simd_shuffle in both branches": bug(
        "q4_k",
        [
            (
                SUM,
                "float t = simd_sum(acc[r]);\n"
                "    if (lane & 1) t = simd_shuffle_xor(t, 2);\n"
                "    else t = simd_shuffle_xor(t, 4);",
            )
        ],
        "divergent-simd",
        "at a different place",
        "simd_shuffle_xor(t, 2)|simd_shuffle_xor(t, 4)",
        "divergent-simd",
    ),
    # -- undefined behaviour and limits
    "misaligned uint": bug(
        "q4_k",
        [("block->qs + j * 32 + l)", "block->qs + j * 32 + l - (j > 0))")],
        "misaligned",
        "misaligned",
        "q4 =",
        "wrong",
    ),
    "misaligned half4": bug(
        "q4_k",
        [("(xb + 32)", "(xb + 33 - (lane < 31))")],
        "misaligned",
        "misaligned",
        "(xb + 33",
        "fault",
    ),
    "float out of int8's range": bug(
        "rms",
        [("clamp(metal::rint(v * inverse), -127.0f, 127.0f)", "metal::rint(v * inverse * 2.0f)")],
        "undefined-behaviour",
        "float-to-integer conversion out of range",
        "int8_t(",
        "wrong",
    ),
    "signed overflow": bug(
        "q4_k",
        [(LOOP, f"  int big = 2147483647; big += blocks; if (big == 7) acc[0] = 1;\n{LOOP}")],
        "undefined-behaviour",
        "signed integer overflow in +",
        "big += blocks",
        "unnoticed",
    ),
    "division by zero": bug(
        "q4_k",
        [(LOOP, f"  if (int(lane) / (blocks - 2) == 77) acc[0] = 1;\n{LOOP}")],
        "undefined-behaviour",
        "division by zero",
        "(blocks - 2)",
        "wrong | fault | unnoticed",
    ),
    "more than 32 KiB of threadgroup memory": bug(
        "gemm",
        [("threadgroup half As[32 * 40]", "threadgroup half As[32 * 500]")],
        "threadgroup-memory",
        "34560 needed, at 'Bs'",
        "threadgroup half Bs",
        "threadgroup-memory",
    ),
    "infinite loop": bug(
        "q4_k",
        [("b < blocks; b++", "b < blocks; b += (lane == 3 ? 0 : 1)")],
        "runaway",
        "thread 3 (simdgroup 0, lane 3)",
        "",
        "fault",
    ),
    # -- logic: nothing to diagnose
    "wrong nibble": bug("q4_k", [("dot(lo, xl)", "dot(hi, xl)")], "wrong", "", "", "wrong"),
    "sum over half the lanes": bug(
        "q4_k",
        [
            (
                SUM,
                "float t = acc[r]; for (ushort m = 8; m > 0; m >>= 1) t += simd_shuffle_xor(t, m);",
            )
        ],
        "wrong",
        "",
        "",
        "wrong",
    ),
}


def outcome(planted):
    """Kind and text of the report, or "wrong" or "unnoticed"."""
    try:
        return "unnoticed" if planted.run() else "wrong", ""
    except msl.MslRunError as e:
        return e.kind, str(e)


@pytest.mark.parametrize("build", msl.BUILDS)
@pytest.mark.parametrize("name", SUBJECTS)
def test_the_correct_kernel_runs(name, build):
    for flush_denormals in (False, True):
        with msl.using(build=build, orders=msl.ORDERS, flush_denormals=flush_denormals):
            assert SUBJECTS[name]().run()


@pytest.mark.parametrize("name", BUGS)
def test_checked_build_names_the_bug(name):
    planted, expected = BUGS[name].planted(), BUGS[name]
    # The lint is off: it finds some of these without a run.
    with msl.using(build="checked", lint=False):
        kind, text = outcome(planted)
    assert kind == expected.checked, text
    assert expected.about in text
    lines = ["", *planted.capture().source.splitlines()]
    named = [lines[int(n)] for n in re.findall(r"kernel\.metal:(\d+)", text)]
    for part in filter(None, expected.at.split("|")):
        assert any(part in line for line in named), f"{text}\n{named}"


@pytest.mark.parametrize("name", BUGS)
def test_fast_build_notices(name):
    with msl.using(build="fast", orders=msl.ORDERS, lint=False, seconds=1):
        kind, text = outcome(BUGS[name].planted())
    assert kind in BUGS[name].fast, text
