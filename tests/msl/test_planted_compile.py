"""Bugs that Metal's compiler refuses, or that no run is needed to find: each is found, and where.

Every bug is planted in a kernel that is correct and gives no finding, and is recognised by the
message it deserves: clang's own (its C++-for-OpenCL front end says what Apple's says, or nearly), a
rule of ``lint.py``, or a warning.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal

import mlx.core as mx
import pytest

from tests import msl
from tests.msl import subjects

SUBJECTS = {
    "q4_k": subjects.q4_k_gemv,
    "q4_k bf16": functools.partial(subjects.q4_k_gemv, dtype=mx.bfloat16),
    "rms": subjects.rms_int8,
    "rms bf16": functools.partial(subjects.rms_int8, dtype=mx.bfloat16),
    "gemm": subjects.gemm,
}


@dataclass(frozen=True)
class Bug:
    """A bug, and what is to be said of it.

    Attributes:
        subject: the kernel it is planted in.
        edits: ``(old, new)`` replacements in the kernel.
        finding: a part of the message.
        at: a part of the source line it names.
        severity: of the finding. A warning stands where Metal may accept the code.
        header: text added before the kernel.
    """

    subject: str
    edits: tuple[tuple[str, str], ...]
    finding: str
    at: str
    severity: Literal["error", "warning"] = "error"
    header: str = ""

    def capture(self) -> msl.Capture:
        return SUBJECTS[self.subject]().planted(self.edits, self.header).capture()


LOOP = "  for (int b = 0;"


def at_start(subject: str, code: str, finding: str, header: str = "") -> Bug:
    """A bug in a line of its own before the main loop of ``q4_k``."""
    return Bug(subject, ((LOOP, f"  {code}\n{LOOP}"),), finding, code, header=header)


BUGS = {
    # -- address spaces
    "local pointer to device memory without address space": Bug(
        "q4_k",
        (("const device T* xb", "const T* xb"),),
        "pointer 'xb' must have an explicit address space qualifier",
        "const T* xb",
    ),
    "local pointer to thread memory without address space": at_start(
        "q4_k",
        "float* pa = acc; pa[0] = 0;",
        "pointer 'pa' must have an explicit address space qualifier",
    ),
    "pointer parameter without address space": Bug(
        "q4_k",
        (("device const uchar* q", "const uchar* q"),),
        "pointer 'q' must have an explicit address space qualifier",
        "const uchar* q",
    ),
    "reference parameter without address space": Bug(
        "q4_k",
        ((LOOP, f"  inc(acc[0]);\n{LOOP}"),),
        "reference 'a' without address space qualifier means thread memory",
        "float& a",
        severity="warning",
        header="inline void inc(float& a) { a += 1; }\n",
    ),
    "cast to a pointer without address space": Bug(
        "q4_k",
        (("(const device block_q4_K*)w", "(const block_q4_K*)w"),),
        "with an rvalue of type 'const __generic block_q4_K *'",
        "(const block_q4_K*)w",
    ),
    "device pointer for a thread parameter": Bug(
        "q4_k",
        (("device const uchar* q", "thread const uchar* q"),),
        "no matching function for call to 'scale_min'",
        "scale_min(2 * j,",
    ),
    "device pointer for a threadgroup pointer": Bug(
        "rms",
        (("const device T* xr", "const threadgroup T* xr"),),
        "cannot initialize a variable of type 'const __local half",
        "threadgroup T* xr",
    ),
    "device pointer for a constant pointer": Bug(
        "rms",
        (("const device T* xr", "const constant T* xr"),),
        "cannot initialize a variable of type 'const __constant half",
        "constant T* xr",
    ),
    "write through an input": at_start("q4_k", "x[0] = 0;", "read-only variable is not assignable"),
    "method without address space on a device object": Bug(
        "q4_k",
        (
            ("uchar qs[128]; };", "uchar qs[128]; float scale() const { return float(d); } };"),
            ("float(block->d)", "block->scale()"),
        ),
        "'scale' has no address space qualifier but is called on an object in global",
        "block->scale()",
    ),
    "threadgroup variable in a helper": Bug(
        "q4_k",
        (),
        "threadgroup variable 't' declared outside a kernel function",
        "t[4]",
        header="inline float f() { threadgroup float t[4]; return t[0]; }\n",
    ),
    "program-scope variable": Bug(
        "q4_k",
        (),
        "program scope variable must reside in constant address space",
        "table",
        header="float table[2] = {1, 2};\n",
    ),
    "program-scope const": Bug(
        "q4_k",
        (),
        "program scope variable must reside in constant address space",
        "table",
        header="static const float table[2] = {1, 2};\n",
    ),
    "program-scope constexpr": Bug(
        "q4_k",
        (),
        "program scope variable must reside in constant address space",
        "tile",
        header="constexpr int tile = 4;\n",
    ),
    # -- types and conversions
    "double variable": Bug(
        "rms",
        (("float acc = 0", "double acc = 0"),),
        "use of type 'double' requires cl_khr_fp64",
        "double acc",
    ),
    "cast to double": Bug(
        "rms",
        (("const float v = float(xr[i]);", "auto v = (double)xr[i];"),),
        "use of type 'double' requires cl_khr_fp64",
        "(double)",
    ),
    "float stored to bfloat": Bug(
        "q4_k bf16", (("= T(t)", "= t"),), "implicit conversion from 'float' to bfloat", "= t"
    ),
    "bfloat initialised with a float": at_start(
        "q4_k bf16", "T z = 0.0f; y[0] = z;", "implicit conversion from 'float' to bfloat"
    ),
    "bfloat += float": at_start(
        "q4_k bf16",
        "T z = T(0); z += 1.5f; y[0] = z;",
        "compound assignment to bfloat computes in float",
    ),
    "max(float, int)": Bug(
        "rms", (("metal::abs(v)", "max(v, 0)"),), "call to 'max' is ambiguous", "max(v, 0)"
    ),
    "max(bfloat, float)": Bug(
        "rms bf16", (("metal::abs(v)", "max(xr[i], v)"),), "call to 'max' is ambiguous", "max(xr"
    ),
    "C cast of a vector": at_start(
        "q4_k",
        "acc[0] = ((float4)uint4(1)).x;",
        "vector cast to float4: write the conversion as a constructor call",
    ),
    "static_cast of a vector": at_start(
        "q4_k", "acc[0] = static_cast<float4>(uint4(1)).x;", "static_cast from 'uint4'"
    ),
    "vector of the wrong number of components": Bug(
        "q4_k",
        (("float4(q4 & 15,", "float4("),),
        "vector constructor: wrong number of components",
        "float4(",
    ),
    "simd_sum of an array": Bug(
        "q4_k",
        (("simd_sum(acc[r])", "simd_sum(acc)"),),
        "SIMD-group functions take scalars and vectors",
        "simd_sum(acc)",
    ),
    "simdgroup_load of another type": Bug(
        "gemm",
        (("simdgroup_matrix<half, 8, 8> ma", "simdgroup_matrix<float, 8, 8> ma"),),
        "no matching function for call to 'simdgroup_load'",
        "simdgroup_load(ma",
    ),
    "atomic of an order other than relaxed": at_start(
        "q4_k",
        "atomic_fetch_add_explicit((device atomic_uint*)y, 1u, memory_order_seq_cst);",
        "use of undeclared identifier 'memory_order_seq_cst'",
    ),
    "variable named as a type": at_start(
        "q4_k", "int half = 3;", "cannot combine with previous 'int' declaration specifier"
    ),
    # -- what Metal's C++ does not have
    "recursion": Bug(
        "q4_k",
        ((LOOP, f"  acc[0] = f(3);\n{LOOP}"),),
        "recursive call (f -> f)",
        "n * f(n - 1)",
        header="inline int f(int n) { return n < 2 ? 1 : n * f(n - 1); }\n",
    ),
    "mutual recursion": Bug(
        "q4_k",
        ((LOOP, f"  acc[0] = f(3);\n{LOOP}"),),
        "recursive call (f -> g)",
        "g(n - 1)",
        header="inline int g(int n);\ninline int f(int n) { return n < 2 ? 1 : g(n - 1); }\n"
        "inline int g(int n) { return f(n); }\n",
    ),
    "static local variable": at_start(
        "q4_k",
        "static int count = 0; count++;",
        "static local variable must reside in constant address space",
    ),
    "lambda before Metal 3.2": at_start(
        "q4_k",
        "auto f = [](int a) { return a; }; acc[0] = f(0);",
        "lambda expressions need Metal 3.2",
    ),
    "goto": at_start("q4_k", "goto L; L: ;", "goto is not allowed"),
    "exceptions": at_start(
        "q4_k", "try { acc[0] = 0; } catch (...) {}", "cannot use 'try' with exceptions disabled"
    ),
    "new": at_start("q4_k", "auto p = new float[2];", "'default new' is not supported"),
    "derived class": Bug(
        "q4_k",
        (),
        "derived class 'D'",
        "struct D",
        header="struct E { int e; };\nstruct D : E { int d; };\n",
    ),
    "derived class of a template": Bug(
        "q4_k",
        (),
        "derived class 'D'",
        "struct D",
        header="template <typename T> struct E { T e; };\n"
        "template <typename T> struct D : E<T> { int f() const { return int(this->e); } };\n"
        "inline int made() { D<int> d{}; return d.f(); }\n",
    ),
    "virtual method": Bug(
        "q4_k",
        (),
        "virtual functions are not supported",
        "virtual",
        header="struct V { virtual int f() { return 1; } };\n",
    ),
    "function pointer": at_start(
        "q4_k",
        "int (*p)(int) = f; acc[0] = p(0);",
        "pointers to functions are not allowed",
        "inline int f(int a) { return a; }\n",
    ),
    "std::": at_start(
        "q4_k", "acc[0] = std::max(0.0f, 1.0f);", "use of undeclared identifier 'std'"
    ),
    "standard header": Bug(
        "q4_k", (), "'cmath' file not found", "#include", header="#include <cmath>\n"
    ),
    "printf": at_start("q4_k", 'printf("x");', "use of undeclared identifier 'printf'"),
    "array of variable length": at_start(
        "q4_k", "float v[lane + 1]; v[0] = 1;", "array size is not a constant expression"
    ),
    "typeid": at_start("q4_k", "acc[0] = sizeof(typeid(acc[0]));", "'typeid' is not supported"),
    "asm": at_start("q4_k", 'asm("nop");', "inline assembly is not allowed"),
    "structured binding": at_start(
        "q4_k",
        "P p{1, 2}; auto [a, c] = p; acc[0] = a + c;",
        "declarations are incompatible with C++ standards before C++17",
        "struct P { int a; int b; };\n",
    ),
    "class template argument deduction": at_start(
        "q4_k",
        "P p(1); acc[0] = p.a;",
        "C++17 feature (Metal before 4.0 is C++14): class template argument deduction",
        "template <class T> struct P { T a; P(T x) : a(x) {} };\n",
    ),
    "inline variable": Bug(
        "q4_k",
        (),
        "C++17 feature (Metal before 4.0 is C++14): inline variables",
        "kk",
        header="inline constant constexpr int kk = 3;\n",
    ),
    "attribute of an unknown name": Bug(
        "q4_k",
        (("thread_index_in_simdgroup", "thread_index_in_simd_group"),),
        "use of undeclared identifier 'thread_index_in_simd_group'",
        "thread_index_in_simd_group",
    ),
    # -- plain mistakes
    "uninitialised scalar": Bug(
        "rms",
        (("float acc = 0;", "float acc;"),),
        "variable 'acc' is uninitialized when used here",
        "acc +=",
    ),
    "uninitialised array": Bug(
        "q4_k", (("acc[4] = {0, 0, 0, 0}", "acc[4]"),), "[core.uninitialized.Assign]", "acc[r] +="
    ),
    "index past a private array": at_start(
        "q4_k", "acc[4] = 0;", "array index 4 is past the end of the array"
    ),
    "shift by the width": Bug(
        "q4_k",
        (("q4 >> 28", "q4 >> 32"),),
        "shift count 32 is not less than the width of uint",
        "q4 >> 32",
    ),
    "missing return": Bug(
        "q4_k",
        (),
        "non-void function does not return a value in all control paths",
        "if (a)",
        header="inline int f(int a) { if (a) return 1; }\n",
    ),
}


@pytest.mark.parametrize("name", SUBJECTS)
def test_the_correct_kernel_has_no_finding(name):
    found = SUBJECTS[name]().capture()
    assert msl.check_languages(found.source, found.name) == {310: (), 320: (), 400: ()}
    assert msl.check(found.source, found.name) == ()  # no warning either


@pytest.mark.parametrize("name", BUGS)
def test_bug_is_found(name):
    bug = BUGS[name]
    found = bug.capture()
    findings = msl.check(found.source, found.name)
    lines = ["", *found.source.splitlines()]
    assert any(
        bug.finding in f.message and f.severity == bug.severity and bug.at in lines[f.line]
        for f in findings
    ), "\n".join(f"{f}  [{lines[f.line].strip()}]" for f in findings) or "no finding"


@pytest.mark.parametrize(
    ("name", "version"),
    [
        ("lambda before Metal 3.2", 320),
        ("structured binding", 400),
        ("class template argument deduction", 400),
        ("inline variable", 400),
    ],
)
def test_what_a_later_language_version_allows(name, version):
    found = BUGS[name].capture()
    errors = msl.check_languages(found.source, found.name)
    assert [v for v in msl.LANGUAGES if not errors[v]] == [v for v in msl.LANGUAGES if v >= version]
