"""Each kernel variant runs once on a small case against its reference, before it is used.

`calls` finds out which variants a model uses, by building its graph without running it; `check`
runs those that have not passed on this machine yet. Each is a program to compile, which takes
tenths of a second: what decoding needs is tried when a model is loaded, the rest `on_first_use`.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import warnings
from collections.abc import Callable, Iterable
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ... import env
from ...errors import KernelError
from ...files import write_text
from ...ranks import all_values
from ..matmul.shapes import MAX_BATCH
from . import kernel as _kernel
from .backend import Recorder, disabled, trials, using
from .kernel import Kernel, Launch, Program, Recorded
from .source import header

# Rows of x of which a model's calls use every variant, for ranks, which try all of them at once:
# one by one up to a whole batch, tiles of every height, and so many that the weight is dequantised.
LENGTHS = (1, 2, 4, MAX_BATCH, 16, 32, 64, 128, 192, 257)

# Largest error, of the largest value: sums in another order, then one rounding to the type.
_BOUNDS: dict[object, float] = {mx.float32: 1e-5, mx.float16: 2e-3, mx.bfloat16: 1.6e-2}
# What one int8 code that is rounded the other way is of the largest, and of a sum of 32; and what
# Metal's fast sine, which mx.fast.rope takes, may be off.
_CODE, _SUM, _SINE = 1e-2, 2e-3, 1e-3
# Words, of packed codes or of ids, that may differ: a code may be rounded the other way where a
# reciprocal is off by a bit.
_WORDS = 0.02
_ERRORS = 3  # lines of a compiler that are kept


def calls(run: Callable[[], object]) -> list[Recorded]:
    """The kernel calls of ``run``, which must not look at a value; none of them is launched."""
    found: list[Recorded] = []
    with using(Recorder(found)):
        run()
    return found


_tried: set[object] = set()  # variants that were tried in this process


def on_first_use() -> None:
    """From now on, try every variant before Metal first runs it.

    That may be while a graph is traced: a small case has no array of the call itself but weights,
    which are no inputs of the graphs that are kept.
    """
    if _first not in trials:
        trials.append(_first)


def _first(kernel: Kernel[Any], arguments: tuple[Any, ...], launch: Launch) -> None:
    if _variant(launch) not in _tried:
        check([(kernel, arguments)])


def _variant(launch: Launch) -> object:
    """What is compiled: the programs, their template arguments and address spaces."""
    return tuple(
        (one.program, one.template, tuple(a.size < 8 for a in one.arrays)) for one in launch.chain()
    )


def check(recorded: Iterable[Recorded], *, emulated: bool = False) -> dict[Program, str]:
    """Run every variant of ``recorded`` that has no result yet; disable those that are wrong.

    What passed is kept in the user's cache by device, operating system, MLX version, source text
    and types. What failed warns once in a process, its calls run as reference from then on, and
    the next process tries it again: a GPU may have been out of memory.

    Returns:
        The programs among them that are disabled now, with the reason.
    """
    path = env.cache_dir() / "self-tests.json"
    passed = _read(path)
    before = len(passed)
    failed = {}
    seen = set()
    for kernel, arguments in recorded:
        launch = kernel.launch(*arguments)
        variant = _variant(launch)
        if variant in seen:
            continue
        seen.add(variant)
        if not emulated:
            _tried.add(variant)
        key = _key(launch)
        if key in passed:
            continue
        reason = disabled.get(launch.program)
        if reason is None:
            reason = compare(kernel, kernel.small(*arguments), emulated=emulated)
            if reason:
                warnings.warn(
                    f"mlxfuse: {kernel.name} failed its self-test and will not be used: {reason}",
                    RuntimeWarning,
                    stacklevel=2,
                )
        if reason:
            disabled[launch.program] = failed[launch.program] = reason
        else:
            passed.add(key)
    if len(passed) != before:
        _write(path, passed)
    return failed


def agree(of: mx.distributed.Group) -> dict[Program, str]:
    """Disable what the self-test of another rank disabled. All ranks must call it.

    Returns:
        The programs that are disabled by this, with the reason.
    """
    own = [(asdict(program), reason) for program, reason in disabled.items()]
    found: dict[Program, str] = {}
    for rank, told in enumerate(all_values(own, of)):
        for fields, reason in told:
            names = ("inputs", "outputs", "parts")
            program = Program(**{**fields, **{name: tuple(fields[name]) for name in names}})
            if program not in disabled:
                disabled[program] = found[program] = f"on rank {rank}: {reason}"
    return found


def _key(launch: Launch) -> str:
    """What the result depends on: the machine, MLX, and what MLX compiles."""
    info = mx.device_info() if mx.metal.is_available() else {}
    text = repr(
        (
            info.get("device_name"),
            info.get("architecture"),
            platform.platform(),
            version("mlx"),
            *(
                (
                    header(one.program.parts),
                    one.program,
                    one.template,
                    tuple((a.dtype, a.ndim, a.size < 8) for a in one.arrays),
                )
                for one in launch.chain()
            ),
        )
    )
    return hashlib.sha256(text.encode()).hexdigest()


def attempt(launch: Launch, *, emulated: bool) -> list[mx.array]:
    """The computed outputs.

    Raises:
        KernelError: with all that was said: by a compiler, of a too large threadgroup, of memory.
    """
    try:
        got = _kernel.run(launch, emulated=emulated)
        mx.eval(got)
    except Exception as error:  # whatever it is, the kernel cannot be used
        raise KernelError(str(error).strip() or type(error).__name__) from error
    return got


def compare(kernel: Kernel[Any], arguments: tuple[Any, ...], *, emulated: bool) -> str:
    """Empty where the outputs agree, else how they differ."""
    launch = kernel.launch(*arguments)
    try:
        got = attempt(launch, emulated=emulated)
    except KernelError as error:
        return _reason(error)
    # On the CPU, where float32 products are not TF32.
    with mx.stream(mx.cpu):
        want = kernel.reference(*arguments)
        mx.eval(want)
    # All outputs follow from values rounded to the type the program is made for.
    bound = _BOUNDS[dict(launch.template)["T"]]
    if mx.int8 in launch.dtypes:
        bound = max(bound, _SUM)
    if kernel.name == "norm_rope":
        bound = max(bound, _SINE)
    for a, b in zip(got, want, strict=True):
        if a.dtype == mx.uint32:
            differ = float(mx.mean(a != b))
            if differ > _WORDS:
                return f"{differ:.1%} of the words differ"
            continue
        x, y = (np.array(v.astype(mx.float32)) for v in (a, b))
        worst = float(np.abs(x - y.reshape(x.shape)).max())
        largest = float(np.abs(y).max())
        allowed = _CODE if a.dtype == mx.int8 else bound
        if not worst <= allowed * largest:  # a NaN is no agreement
            return f"largest error {worst:.3g}, largest value {largest:.3g}, in {a.dtype}"
    return ""


def _reason(error: Exception) -> str:
    """What an exception says: a compiler's errors, else its first line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    errors = [line for line in lines if "error:" in line][:_ERRORS]
    return "; ".join(errors or lines[:1])


def _read(path: Path) -> set[str]:
    """Variants that passed; a file that is not ours to believe is as none."""
    try:
        if path.stat().st_uid != os.getuid():
            return set()
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return set()
    if not isinstance(found, dict):
        return set()
    return {key for key, failure in found.items() if failure == ""}


def _write(path: Path, passed: set[str]) -> None:
    """Replace the file in one step; a cache that cannot be written is no error."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_text(path, json.dumps(dict.fromkeys(sorted(passed), "")))
    except OSError as error:
        warnings.warn(f"mlxfuse: self-test results cannot be kept: {error}", stacklevel=2)
