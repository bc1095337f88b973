"""Compilers, flags and the cache of compiled kernels.

A kernel becomes a shared library that links to the fiber runtime. Everything is kept by content
hash in the user's own cache directory; files appear by rename, so two processes may build at once.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.util
import os
import platform
import re
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from .errors import MslCompileError, MslSetupError
from .source import ENTRY, KERNEL_FILE, Translation, prefix, translate

Build = Literal["fast", "checked", "counted"]
BUILDS: tuple[Build, ...] = ("fast", "checked")  # what tests run in; "counted" is for figures
DEFAULT_VERSION = 310  # macOS 14

HERE = Path(__file__).parent
INCLUDE = HERE / "include"
OLDEST_CLANG = 19

_OPENCL = (
    "-cl_khr_fp64,-__opencl_c_fp64,+cl_khr_fp16,"
    "-__opencl_c_program_scope_global_variables,-__opencl_c_device_enqueue"
)
LANGUAGE = (
    *("-x", "clcpp", "-cl-std=clc++2021", "-cl-no-stdinc", "-nostdinc", f"-I{INCLUDE}"),
    *("-Xclang", f"-cl-ext={_OPENCL}", "-fno-strict-aliasing", "-ffp-contract=off"),
    # bfloat rounds after every operation, as half does and both do on the GPU
    *("-Xclang", "-fbfloat16-excess-precision=none"),
    *("-Wno-unknown-attributes", "-Wno-explicit-specialization-storage-class", "-Wno-psabi"),
    *("-Wno-pass-failed", "-Wno-unused-function", "-Wno-keyword-compat"),
)
# Line tables take a third of a compilation and change no code: only a fault has them made.
# GNU addr2line 2.40 loses the inlined frames of DWARF 5.
LINES = ("-g1", "-gdwarf-4")
_COMMON = ("-ftrivial-auto-var-init=pattern", "-fPIC", "-fvisibility=hidden")
_SCALAR = ("-fno-vectorize", "-fno-slp-vectorize")  # half of the time to compile, no slower to run
_ASAN = (
    "asan-instrumentation-with-call-threshold=0",  # a call for every access
    "asan-mapping-offset=0x7fff8000",
    "asan-mapping-scale=3",
    "asan-stack=1",
    "asan-globals=0",
    "asan-opt-same-temp=0",
    "asan-use-after-scope=0",
    "asan-kernel-mem-intrinsic-prefix=1",
)
_UNDEFINED = (
    "array-bounds,alignment,shift,integer-divide-by-zero,signed-integer-overflow,"
    "float-cast-overflow,unreachable,return,builtin"
)
_HOOKED = (
    *("-DMSL_CHECKED=1", *_COMMON, *_SCALAR),
    *("-fsanitize=kernel-address", *(f for a in _ASAN for f in ("-mllvm", f"-{a}"))),
)
FLAGS: dict[Build, tuple[str, ...]] = {
    "fast": ("-O2", *_COMMON, *_SCALAR),
    "checked": (
        *("-O1", *_HOOKED, f"-fsanitize={_UNDEFINED}"),
        *("-Xclang", "-fsanitize-minimal-runtime"),
    ),
    # Calls for undefined behaviour keep clang from loading a value once that is used twice.
    "counted": ("-O2", *_HOOKED),
}
_RUNTIME_FLAGS = (
    *("-std=gnu11", "-O2", "-g", "-fPIC", "-shared", "-fvisibility=hidden", "-pthread"),
    *("-ffp-contract=off", "-fno-strict-aliasing", "-fno-stack-protector", "-U_FORTIFY_SOURCE"),
)


# ---- compilers --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Compiler:
    """A clang: how to call it, its version line and number, and which choice it was."""

    command: tuple[str, ...]
    version: str
    major: int
    choice: str

    def __str__(self) -> str:
        return f"{self.version} ({self.choice}: {shlex.join(self.command)})"


def _probe(command: Sequence[str], choice: str) -> Compiler | None:
    try:
        done = subprocess.run(
            [*command, "--version"], capture_output=True, text=True, timeout=60, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    line = done.stdout.partition("\n")[0]
    found = re.search(r"clang version (\d+)", line)
    # Apple numbers its clang differently.
    if found is None or "Apple" in line or int(found[1]) < OLDEST_CLANG:
        return None
    return Compiler(tuple(command), line.strip(), int(found[1]), choice)


@functools.cache
def compiler() -> Compiler:
    """``$MSL_CLANG``, else clang 19 or newer on PATH, else the ziglang wheel's.

    Raises:
        MslSetupError: if there is none, or ``$MSL_CLANG`` is not one.
    """
    chosen = os.environ.get("MSL_CLANG")
    if chosen:
        found = _probe(shlex.split(chosen), "$MSL_CLANG")
        if found is None:
            raise MslSetupError(f"MSL_CLANG={chosen!r} is not clang {OLDEST_CLANG} or newer")
        return found
    names = [f"clang++-{v}" for v in range(OLDEST_CLANG, OLDEST_CLANG + 8)]
    for name in (*names, "clang++", "clang"):
        path = shutil.which(name)
        found = _probe([path], "PATH") if path else None
        if found:
            return found
    wheel = importlib.util.find_spec("ziglang")
    for folder in wheel.submodule_search_locations or () if wheel else ():
        found = _probe([str(Path(folder) / "zig"), "clang"], "ziglang")
        if found:
            return found
    raise MslSetupError(
        f"the Metal test bench needs clang {OLDEST_CLANG} or newer: pip install ziglang, install "
        f"clang-{OLDEST_CLANG}, or set MSL_CLANG"
    )


@functools.cache
def _c_compiler() -> str:
    for name in ("gcc", "cc"):
        path = shutil.which(name)
        if path:
            return path
    raise MslSetupError("the Metal test bench needs a C compiler to build its runtime: install gcc")


@functools.cache
def target_flags() -> tuple[str, ...]:
    """Flags for this machine's processor."""
    machine = platform.machine()
    if sys.platform != "linux" or machine not in ("x86_64", "aarch64"):
        raise MslSetupError(
            f"the Metal test bench runs on Linux on x86-64 or aarch64, not {sys.platform} {machine}"
        )
    flags = ["-target", f"{machine}-linux-gnu"]
    if machine == "x86_64":
        features = set(re.findall(r"\w+", Path("/proc/cpuinfo").read_text().partition("\n\n")[0]))
        flags += [f"-m{f}" for f in ("avx2", "fma", "f16c") if f in features]
    return tuple(flags)


# ---- the cache --------------------------------------------------------------------------------


@functools.cache
def cache_dir() -> Path:
    """The cache directory: created with mode 0700, refused unless it is this user's alone.

    ``$MSL_CACHE`` overrides the place (default ``$XDG_CACHE_HOME/mlxfuse-msl``). The libraries in
    it are loaded into this process, so nobody else may be able to write there.
    """
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    path = Path(os.environ.get("MSL_CACHE") or Path(base) / "mlxfuse-msl")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.mkdir(mode=0o700, exist_ok=True)
    info = path.lstat()
    if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.getuid() or info.st_mode & 0o077:
        raise MslSetupError(
            f"{path} must be a directory of user {os.getuid()} with mode 0700, since compiled code "
            f"is loaded from it; found mode {stat.S_IMODE(info.st_mode):04o}, owner {info.st_uid}"
        )
    return path


def digest(*parts: str) -> str:
    """A short content hash."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]


def write_atomically(path: Path, text: str) -> None:
    """Write a text file that appears complete or not at all."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    with os.fdopen(handle, "w", encoding="utf-8") as f:
        f.write(text)
    Path(temporary).replace(path)


def produce(path: Path, command: Sequence[str]) -> None:
    """Run ``command -o TEMPORARY`` and rename the result to ``path``."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        result = Path(folder) / path.name
        done = subprocess.run(
            [*command, "-o", str(result)], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise MslCompileError(done.stderr)
        result.replace(path)


@functools.cache
def shim_hash() -> str:
    files = sorted(p for p in INCLUDE.rglob("*") if p.is_file())
    return digest(*(f"{p.relative_to(INCLUDE)}\0{p.read_text(encoding='utf-8')}" for p in files))


@functools.cache
def identity(build: Build, version: int) -> str:
    """Hash of everything but the kernel that decides what a compilation yields."""
    flags = (*compiler().command, compiler().version, *LANGUAGE, *target_flags(), *FLAGS[build])
    return digest(*flags, shim_hash(), prefix(version))


@functools.cache
def runtime() -> Path:
    """The fiber runtime, built on first use."""
    folder = HERE / "runtime"
    sources = sorted(folder.glob("*.c"))
    features = [f for f in target_flags() if f.startswith("-m")]
    command = [_c_compiler(), *_RUNTIME_FLAGS, *features, f"-I{folder}"]
    command.append(f"-DCLANG={compiler().major}")
    texts = [p.read_text(encoding="utf-8") for p in (*sources, folder / "msl.h")]
    path = cache_dir() / f"runtime-{digest(*command, *texts)}.so"
    if not path.exists():
        produce(path, [*command, *map(str, sources)])
    return path


@functools.cache
def precompiled(build: Build, version: int) -> Path:
    """The shim and MLX's preamble as a precompiled header."""
    key = identity(build, version)
    header = cache_dir() / f"prefix-{key}.h"
    result = cache_dir() / f"prefix-{key}.pch"
    if not result.exists():
        if not header.exists():
            write_atomically(header, prefix(version))
        command = clang(build, ("-Xclang", "-emit-pch", "-Xclang", "-fno-pch-timestamp"))
        produce(result, [*command, "-c", str(header)])
    return result


def clang(build: Build, extra: Sequence[str] = ()) -> list[str]:
    """The command line of a build, without input and output."""
    return [*compiler().command, *LANGUAGE, *target_flags(), *FLAGS[build], *extra]


# ---- kernels ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Library:
    """A compiled kernel: its shared library and what it was compiled from."""

    path: Path
    name: str
    build: Build
    version: int
    translation: Translation


_UNROLLING = re.compile(r'_Pragma\("clang loop unroll\(full\)"\)|#pragma (?:clang loop )?unroll.*')


def _rolled(translation: Translation) -> Translation:
    """Without the wishes to unroll loops.

    They change no result, and without them a large kernel compiles in a fifth of the time.
    """
    return replace(translation, body=_UNROLLING.sub("", translation.body))


@functools.lru_cache(maxsize=4096)
def compile_kernel(
    source: str, name: str, build: Build = "fast", version: int = DEFAULT_VERSION
) -> Library:
    """Compile a kernel, or find it in the cache.

    Args:
        source: what MLX hands to Metal, without its preamble.
        name: the kernel's function in it.
        build: ``"fast"``, ``"checked"`` or ``"counted"``.
        version: ``__METAL_VERSION__``, e.g. 310.

    Raises:
        MslCompileError: with clang's messages; lines are those of ``source``.
    """
    translation = translate(source, name)
    if build != "counted":
        translation = _rolled(translation)
    stem = f"kernel-{digest(identity(build, version), translation.text, str(runtime()))}"
    path = cache_dir() / f"{stem}.so"
    if not path.exists():
        _produce_library(path, translation, build, version)
    return Library(path, name, build, version, translation)


def with_lines(library: Library) -> Path:
    """The same code once more with its line tables, for ``addr2line``."""
    path = library.path.with_suffix(".lines.so")
    if not path.exists():
        _produce_library(path, library.translation, library.build, library.version, LINES)
    return path


def _produce_library(
    path: Path, translation: Translation, build: Build, version: int, extra: Sequence[str] = ()
) -> None:
    with tempfile.TemporaryDirectory(dir=cache_dir()) as folder:
        text = Path(folder) / KERNEL_FILE
        text.write_text(translation.text, encoding="utf-8")
        included = ("-include-pch", str(precompiled(build, version)), *extra)
        compiled = text.with_suffix(".o")
        produce(compiled, [*clang(build, included), "-c", str(text)])
        linker = [_c_compiler(), "-shared", "-Wl,-z,defs", str(compiled), str(runtime()), "-lm"]
        produce(path, linker)


@functools.cache
def load_runtime() -> ctypes.CDLL:
    """The runtime, loaded into this process."""
    return ctypes.CDLL(str(runtime()))


@functools.cache
def load(path: Path) -> tuple[ctypes.CDLL, ctypes.c_void_p, int, int]:
    """A compiled kernel: library, entry point, and the address range it is mapped at."""
    load_runtime()
    library = ctypes.CDLL(str(path))
    entry = ctypes.cast(getattr(library, ENTRY), ctypes.c_void_p)
    low, high = 0, 0
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith(path.name):
            first, last = (int(x, 16) for x in line.split()[0].split("-"))
            low, high = low or first, last
    return library, entry, low, high
