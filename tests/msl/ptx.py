"""The same Metal source through the same front end to PTX, for an NVIDIA GPU (warps of 32 lanes).

It needs CUDA's libdevice for the mathematical functions. A GPU adds what the host cannot show: real
concurrency and a real memory model, though not Apple's. Atomics are plain accesses there.
"""

from __future__ import annotations

import functools
import os
import sysconfig
import tempfile
from pathlib import Path

from .build import DEFAULT_VERSION, LANGUAGE, cache_dir, compiler, digest, produce, shim_hash
from .errors import MslCompileError, MslSetupError
from .source import Parameter, prefix, translate

ENTRY = "msl_entry"
ARCHITECTURE = "sm_80"


def _register(name: str) -> str:
    return f"__mk_uint3({', '.join(f'__nvvm_read_ptx_sreg_{name}_{c}()' for c in 'xyz')})"


# Thread attributes (MSL specification 5.2.3.6); a launch covers the grid with whole threadgroups.
_VECTORS = {
    "thread_position_in_grid": f"({_register('ctaid')} * {_register('ntid')} + {_register('tid')})",
    "thread_position_in_threadgroup": _register("tid"),
    "threadgroup_position_in_grid": _register("ctaid"),
    "threads_per_threadgroup": _register("ntid"),
    "dispatch_threads_per_threadgroup": _register("ntid"),
    "threadgroups_per_grid": _register("nctaid"),
    "threads_per_grid": f"({_register('nctaid')} * {_register('ntid')})",
}
_SCALARS = {
    "thread_index_in_threadgroup": "__msl_linear()",
    "thread_index_in_simdgroup": "(__msl_linear() % 32)",
    "simdgroup_index_in_threadgroup": "(__msl_linear() / 32)",
    "simdgroups_per_threadgroup": "((__msl_threads() + 31) / 32)",
    "dispatch_simdgroups_per_threadgroup": "((__msl_threads() + 31) / 32)",
    "threads_per_simdgroup": "32u",
    "thread_execution_width": "32u",
}
_INDICES = """
METAL_FUNC uint __msl_linear() {
  return __nvvm_read_ptx_sreg_tid_x() + __nvvm_read_ptx_sreg_ntid_x() *
      (__nvvm_read_ptx_sreg_tid_y() + __nvvm_read_ptx_sreg_ntid_y() * __nvvm_read_ptx_sreg_tid_z());
}
METAL_FUNC uint __msl_threads() {
  return __nvvm_read_ptx_sreg_ntid_x() * __nvvm_read_ptx_sreg_ntid_y() *
      __nvvm_read_ptx_sreg_ntid_z();
}
"""


def _argument(p: Parameter) -> str:
    if p.index is not None:
        return f"b{p.index}" if p.ref == "*" else f"*b{p.index}"
    if p.attribute in _VECTORS:
        components = {"2": ".xy", "3": ""}.get(p.type[-1], ".x")
        return _VECTORS[p.attribute] + components
    if p.attribute not in _SCALARS:
        raise MslCompileError(f"the PTX route has no '{p.attribute}'")
    return f"({p.type})({_SCALARS[p.attribute]})"


def _wrapper(parameters: tuple[Parameter, ...], call: str) -> str:
    buffers = ", ".join(f"{p.type} *b{p.index}" for p in parameters if p.index is not None)
    arguments = ", ".join(_argument(p) for p in parameters)
    return f"{_INDICES}__kernel void {ENTRY}({buffers}) {{ {call}({arguments}); }}\n"


@functools.cache
def libdevice() -> Path:
    """CUDA's ``libdevice.10.bc``, from ``$CUDA_HOME``, /usr/local or the wheel nvidia-nvvm."""
    homes = [Path(p) for p in (os.environ.get("CUDA_HOME"),) if p]
    homes += sorted(Path("/usr/local").glob("cuda*"), reverse=True)
    homes += sorted((Path(sysconfig.get_path("purelib")) / "nvidia").glob("*"), reverse=True)
    for home in homes:
        path = home / "nvvm/libdevice/libdevice.10.bc"
        if path.is_file():
            return path
    raise MslSetupError(
        "the PTX route needs libdevice.10.bc: set CUDA_HOME, or install nvidia-nvvm"
    )


# As a GPU compiler must: loops over a thread's own arrays unrolled, loops over memory left alone;
# a product and a sum become one fma, so that writing fma out is no advantage.
AS_METAL = (
    *("-ffp-contract=fast", "-mllvm", "-unroll-threshold=10000"),
    *("-mllvm", "-unroll-runtime=false", "-mllvm", "-unroll-allow-partial=false"),
)


def compile_ptx(
    source: str, name: str, version: int = DEFAULT_VERSION, options: tuple[str, ...] = ()
) -> str:
    """PTX of a kernel whose entry point is ``ENTRY`` and takes the buffers in order.

    ``options`` are added to clang's.

    Raises:
        MslCompileError: with clang's messages.
        MslSetupError: without libdevice.
    """
    translation = translate(source, name)
    body = translation.body + _wrapper(translation.parameters, translation.call)
    text = prefix(version) + body
    # The language's extensions, plus the generic address space that device code has.
    language = [f"{x},+__opencl_c_generic_address_space" if "-cl-ext" in x else x for x in LANGUAGE]
    command = [*compiler().command, *language, "-O2", "-target", "nvptx64-nvidia-cuda"]
    for option in (
        *("-target-cpu", ARCHITECTURE, "-target-feature", "+ptx80"),
        *("-mlink-builtin-bitcode", str(libdevice())),
    ):
        command += ["-Xclang", option]
    command += options
    path = cache_dir() / f"ptx-{digest(*command, compiler().version, shim_hash(), text)}.ptx"
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=cache_dir()) as folder:
            file = Path(folder) / "kernel.clcpp"
            file.write_text(text, encoding="utf-8")
            produce(path, [*command, "-S", str(file)])
    return path.read_text(encoding="utf-8")
