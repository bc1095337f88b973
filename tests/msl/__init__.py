"""The Metal test bench: runs the Metal source that MLX generates on a machine without Metal.

clang compiles the exact text MLX hands to Metal (with a shim for ``<metal_stdlib>``) for the host;
a runtime gives every GPU thread a fiber, so SIMD-groups and barriers behave as on the GPU. Two
builds: ``fast`` and ``checked``, which also finds out-of-bounds accesses, races, uninitialised
reads, divergence, misalignment, unwritten outputs and undefined behaviour. Apple's compiler,
occupancy, memory model and speed are not exercised.

Public names:

* ``metal_kernel`` (same call as ``mx.fast.metal_kernel``), ``install()``, ``uninstall()``,
  ``installed(build=..., order=...)``, ``using(...)``, ``options``, ``log`` (list of ``Launch``);
* ``capture(kernel, inputs, **call) -> Capture``;
* ``compile_kernel(source, name, build, version) -> Library``, ``BUILDS``;
* ``launch(library, buffers, grid, threadgroup, schedule) -> Report``, ``Buffer``, ``Schedule``,
  ``ORDERS``, ``KINDS``;
* ``counting() -> [Counts, ...]``, ``Traffic``: what launches read and write;
* modules to import by name: ``instructions`` (of inner loops, from PTX), ``mlx_kernels`` (MLX's
  own, from its headers), ``registers`` (and spills, from ``ptxas``), ``gpu`` (the command for an
  NVIDIA GPU);
* ``check(source, name, version) -> (Finding, ...)``, ``check_languages(source, name)``,
  ``LANGUAGES``;
* ``compiler()``, ``cache_dir()``, ``preamble()``;
* ``MslError`` and its ``MslCompileError``, ``MslRunError`` (``.kind``), ``MslSetupError``.

``MLXFUSE_KERNELS=emulated`` takes ``metal_kernel`` of the module that ``MLXFUSE_BENCH`` names, by
default of this package. All imports inside are relative; nothing of ``mlxfuse`` is imported.
"""

from .build import BUILDS, Build, Compiler, Library, cache_dir, compile_kernel, compiler
from .counts import Counts, Traffic
from .emulate import (
    Capture,
    EmulatedKernel,
    Launch,
    Options,
    capture,
    counting,
    install,
    installed,
    log,
    metal_kernel,
    options,
    to_numpy,
    uninstall,
    using,
)
from .errors import MslCompileError, MslError, MslRunError, MslSetupError
from .lint import LANGUAGES, Finding, check, check_languages
from .run import KINDS, ORDERS, Buffer, Report, Schedule, launch
from .source import mlx_include, preamble

__all__ = [
    "BUILDS",
    "KINDS",
    "LANGUAGES",
    "ORDERS",
    "Buffer",
    "Build",
    "Capture",
    "Compiler",
    "Counts",
    "EmulatedKernel",
    "Finding",
    "Launch",
    "Library",
    "MslCompileError",
    "MslError",
    "MslRunError",
    "MslSetupError",
    "Options",
    "Report",
    "Schedule",
    "Traffic",
    "cache_dir",
    "capture",
    "check",
    "check_languages",
    "compile_kernel",
    "compiler",
    "counting",
    "install",
    "installed",
    "launch",
    "log",
    "metal_kernel",
    "mlx_include",
    "options",
    "preamble",
    "to_numpy",
    "uninstall",
    "using",
]
