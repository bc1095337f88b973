"""What a GPU's compiler makes of a kernel: registers, stack and spills, without a GPU.

The Metal text goes through the same front end to PTX, and ``ptxas`` allocates registers for it.
That is another compiler for another GPU; what an Apple GPU has in common is that a thread has some
128 registers of 32 bits, and that what does not fit, or is indexed by a variable, lies in memory.
"""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import subprocess
import sysconfig
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from .build import cache_dir, digest, write_atomically
from .errors import MslCompileError, MslSetupError
from .ptx import ARCHITECTURE, AS_METAL, compile_ptx

APPLE_REGISTERS = 128

_PROPERTIES = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill")
_USED = re.compile(r"Used (\d+) registers")


@dataclass(frozen=True)
class Registers:
    """What a program needs of a thread's own.

    Attributes:
        registers: of 32 bits, where there are enough.
        stack: bytes of memory of its own then: arrays that are indexed by variables, or whose
            address is taken.
        spilled: bytes written to memory and read again because there are `APPLE_REGISTERS` only.
    """

    registers: int
    stack: int
    spilled: int


@functools.cache
def ptxas() -> str:
    """The assembler: on PATH, in CUDA's home, or of the wheel nvidia-cuda-nvcc.

    Raises:
        MslSetupError: there is none.
    """
    places = [Path(p) / "bin" for p in (os.environ.get("CUDA_HOME"),) if p]
    places += sorted(Path("/usr/local").glob("cuda*/bin"), reverse=True)
    places += sorted((Path(sysconfig.get_path("purelib")) / "nvidia").glob("*/bin"), reverse=True)
    for found in (shutil.which("ptxas"), *(str(p / "ptxas") for p in places)):
        if found and os.access(found, os.X_OK):
            return found
    raise MslSetupError("no ptxas: install CUDA or `pip install nvidia-cuda-nvcc`")


def _assemble(text: str, limit: int | None) -> tuple[int, int, int]:
    """Registers, bytes of stack and bytes spilled; the latter two of all functions together."""
    with tempfile.TemporaryDirectory(dir=cache_dir()) as folder:
        file = Path(folder) / "kernel.ptx"
        file.write_text(text, encoding="utf-8")
        capped = [] if limit is None else [f"-maxrregcount={limit}"]
        command = [ptxas(), f"-arch={ARCHITECTURE}", "-v", *capped, str(file)]
        done = subprocess.run(
            [*command, "-o", str(Path(folder) / "kernel.cubin")],
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode:
        raise MslCompileError(done.stdout + done.stderr)
    functions = [tuple(map(int, f)) for f in _PROPERTIES.findall(done.stderr)]
    used = max(map(int, _USED.findall(done.stderr)))
    return used, max(f[0] for f in functions), sum(f[1] + f[2] for f in functions)


def registers(source: str, name: str) -> Registers:
    """Of a kernel's text as MLX hands it to Metal. Results are kept in the bench's cache.

    Raises:
        MslSetupError: without ``ptxas`` or CUDA's libdevice.
        MslCompileError: with the compiler's messages.
    """
    ptxas()
    text = compile_ptx(source, name, options=AS_METAL)
    path = cache_dir() / f"registers-{digest(ARCHITECTURE, text)}.json"
    if not path.exists():
        used, stack, spilled = _assemble(text, None)
        if used > APPLE_REGISTERS:
            _, _, spilled = _assemble(text, APPLE_REGISTERS)
        write_atomically(path, json.dumps(asdict(Registers(used, stack, spilled))))
    return Registers(**json.loads(path.read_text(encoding="utf-8")))
