"""A drop-in for ``mx.fast.metal_kernel`` on machines without Metal.

What is compiled is the text MLX generates: ``mx.export_function`` accepts a Metal kernel on any
platform and hands back its source, name, grid and threadgroup.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np

from . import lint
from .build import DEFAULT_VERSION, Build, Library, compile_kernel
from .counts import Counts
from .errors import MslCompileError, MslRunError
from .run import Buffer, Order, Report, Schedule, Size, launch

_NAME = "metal_kernel"
_real_metal_kernel = mx.fast.metal_kernel

# bfloat16 travels as its bits.
_NUMPY: dict[mx.Dtype, Any] = {
    mx.bool_: np.bool_,
    mx.uint8: np.uint8,
    mx.uint16: np.uint16,
    mx.uint32: np.uint32,
    mx.uint64: np.uint64,
    mx.int8: np.int8,
    mx.int16: np.int16,
    mx.int32: np.int32,
    mx.int64: np.int64,
    mx.float16: np.float16,
    mx.bfloat16: np.uint16,
    mx.float32: np.float32,
    mx.complex64: np.complex64,
}


@dataclass
class Options:
    """How emulated kernels are compiled and run; read at each launch.

    Attributes:
        build: ``"fast"``, ``"checked"`` or ``"counted"``.
        version: ``__METAL_VERSION__``.
        lint: add the rules of ``lint.py`` to clang's own.
        schedule: how threads are run.
        orders: more thread orders to run a ``fast`` launch in. Its outputs must be the same bytes
            in each, except of a kernel with atomic outputs, where float sums depend on the order.
        count: count what a launch moves; not in ``fast``.
    """

    build: Build = "fast"
    version: int = DEFAULT_VERSION
    lint: bool = True
    schedule: Schedule = field(default_factory=Schedule)
    orders: tuple[Order, ...] = ()
    count: bool = False


@dataclass(frozen=True)
class Launch:
    """A launch as logged: kernel, geometry, threadgroup memory in bytes, seconds of host time.

    ``counts`` is what it moved, inside ``counting``.
    """

    name: str
    grid: Size
    threadgroup: Size
    threadgroup_bytes: int
    seconds: float
    counts: Counts | None = None


options = Options()
log: list[Launch] = []


@contextlib.contextmanager
def using(**changes: Any) -> Iterator[Options]:
    """Change options for a ``with`` block; fields of ``Schedule`` may be given directly."""
    before = dataclasses.replace(options)
    known = {f.name for f in dataclasses.fields(Options)}
    schedule = {k: v for k, v in changes.items() if k not in known}
    try:
        for name in changes.keys() & known:
            setattr(options, name, changes[name])
        options.schedule = dataclasses.replace(options.schedule, **schedule)
        yield options
    finally:
        for f in dataclasses.fields(Options):
            setattr(options, f.name, getattr(before, f.name))


@contextlib.contextmanager
def counting() -> Iterator[list[Counts]]:
    """Count what emulated launches move; after the block the list has an entry for each."""
    counted: list[Counts] = []
    first = len(log)
    with using(build="counted", count=True):
        yield counted
    counted += [entry.counts for entry in log[first:] if entry.counts is not None]


@dataclass(frozen=True)
class Capture:
    """A call of a Metal kernel as MLX would make it.

    Attributes:
        name: the kernel's function in ``source``.
        source: what MLX hands to Metal, without its preamble.
        grid, threadgroup: threads along each axis.
        shape_infos: for each input, whether its shape, strides and ndim are arguments.
    """

    name: str
    source: str
    grid: Size
    threadgroup: Size
    shape_infos: tuple[tuple[bool, bool, bool], ...]


def capture(kernel: Callable[..., Any], inputs: Sequence[mx.array], **call: Any) -> Capture:
    """Record the call ``kernel(inputs=inputs, **call)`` of a real ``mx.fast.metal_kernel``.

    ``call`` has ``grid``, ``threadgroup``, ``output_shapes``, ``output_dtypes`` and, if wanted,
    ``template`` and ``init_value``. Nothing runs.
    """
    recorded: list[dict[str, Any]] = []
    kernel = getattr(kernel, "real", kernel)
    mx.export_function(recorded.append, lambda *a: kernel(inputs=list(a), **call), *inputs)
    primitive = next(r for r in recorded if r.get("name") == "CustomKernel")
    name, source, gx, gy, gz, tx, ty, tz, infos, *_ = primitive["arguments"]
    return Capture(name, source, (gx, gy, gz), (tx, ty, tz), tuple(tuple(i) for i in infos))


def to_numpy(a: mx.array) -> np.ndarray[Any, Any]:
    """The array's values (bfloat16: its bits), C-contiguous, without a copy where possible."""
    a = mx.contiguous(a)
    bits = a.view(mx.uint16) if a.dtype == mx.bfloat16 else a
    return np.ascontiguousarray(np.asarray(bits)).reshape(a.shape)


def _from_numpy(a: np.ndarray[Any, Any], dtype: mx.Dtype) -> mx.array:
    return mx.array(a).view(mx.bfloat16) if dtype == mx.bfloat16 else mx.array(a)


def _strides(shape: Sequence[int]) -> np.ndarray[Any, Any]:
    """Strides in elements of a contiguous array."""
    return np.array([int(np.prod(shape[i + 1 :])) for i in range(len(shape))], np.int64)


class EmulatedKernel:
    """What the emulated ``metal_kernel`` returns; called as the real one is.

    ``real`` is MLX's own kernel object, for ``capture``.
    """

    def __init__(
        self,
        real: Any,
        input_names: Sequence[str],
        output_names: Sequence[str],
        ensure_row_contiguous: bool,
        atomic_outputs: bool,
    ) -> None:
        self.real = real
        self.input_names = tuple(input_names)
        self.output_names = tuple(output_names)
        self.ensure_row_contiguous = ensure_row_contiguous
        self.atomic_outputs = atomic_outputs
        self._captures: dict[Any, Capture] = {}

    def _capture(self, inputs: Sequence[mx.array], call: Mapping[str, Any]) -> Capture:
        """The generated text depends on dtypes, ranks, smallness and template arguments only."""
        key = (
            tuple((a.dtype, a.ndim, a.size < 8) for a in inputs),
            tuple(call["output_dtypes"]),
            repr(call.get("template")),
        )
        if key not in self._captures:
            self._captures[key] = capture(self.real, inputs, **call)
        found = self._captures[key]
        grid, threadgroup = ((*call[n], 1, 1)[:3] for n in ("grid", "threadgroup"))
        return dataclasses.replace(found, grid=grid, threadgroup=threadgroup)

    def _inputs(self, captured: Capture, inputs: Sequence[mx.array]) -> list[Buffer]:
        buffers = []
        for name, a, info in zip(self.input_names, inputs, captured.shape_infos, strict=True):
            values, strides = to_numpy(a), _strides(a.shape)
            if not self.ensure_row_contiguous:
                values, strides = self._strided(a)
            buffers.append(Buffer(name, values))
            extra = {
                "shape": np.array(a.shape, np.int32),
                "strides": strides,
                "ndim": np.array([a.ndim], np.int32),
            }
            for (suffix, value), used in zip(extra.items(), info, strict=True):
                if used and a.ndim:
                    buffers.append(Buffer(f"{name}_{suffix}", value))
        return buffers

    @staticmethod
    def _strided(a: mx.array) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """The memory from the first element on, and the array's own strides in elements."""
        bits = a.view(mx.uint16) if a.dtype == mx.bfloat16 else a
        view = np.asarray(bits)
        steps = [s // view.itemsize for s in view.strides]
        span = 1 + sum((n - 1) * s for n, s in zip(view.shape, steps, strict=True))
        if view.size == 0 or min(steps, default=0) < 0 or view.flags.c_contiguous:
            return np.ascontiguousarray(view), _strides(a.shape)
        flat = np.lib.stride_tricks.as_strided(view, (span,), (view.itemsize,))
        return np.ascontiguousarray(flat), np.array(steps, np.int64)

    def _launch(self, buffers: Sequence[Buffer], captured: Capture) -> Report:
        """Run, in every order asked for; the outputs hold the first order's result."""
        library = _build(captured)
        geometry = captured.grid, captured.threadgroup
        written = [b for b in buffers if b.use != "in"]
        initial = [b.array.copy() for b in written if b.use == "inout"]
        report = launch(library, buffers, *geometry, options.schedule, options.count)
        others = options.orders if library.build == "fast" and not self.atomic_outputs else ()
        results = [b.array for b in written]
        for order in others:
            if order == options.schedule.order:
                continue
            for i, b in enumerate(written):
                b.array = initial[i].copy() if initial else np.empty_like(b.array)
            launch(library, buffers, *geometry, dataclasses.replace(options.schedule, order=order))
            for b, expected in zip(written, results, strict=True):
                if b.array.tobytes() != expected.tobytes():
                    raise MslRunError(
                        "order-dependent",
                        f"order-dependent: output '{b.name}' of {library.name} differs between "
                        f"the {options.schedule.order} and the {order} order of threads",
                    )
        return report

    def __call__(
        self,
        *,
        inputs: Sequence[Any],
        output_shapes: Sequence[Sequence[int]],
        output_dtypes: Sequence[mx.Dtype],
        grid: Sequence[int],
        threadgroup: Sequence[int],
        template: Sequence[tuple[str, Any]] | None = None,
        init_value: float | None = None,
        verbose: bool = False,
        stream: Any = None,
    ) -> list[mx.array]:
        """As ``mx.fast.metal_kernel``'s result, but eager; ``stream`` has no meaning here."""
        start = time.perf_counter()
        arrays = [a if isinstance(a, mx.array) else mx.array(a) for a in inputs]
        call: dict[str, Any] = {
            "output_shapes": output_shapes,
            "output_dtypes": output_dtypes,
            "grid": tuple(grid),
            "threadgroup": tuple(threadgroup),
        }
        if template:
            call["template"] = template
        captured = self._capture(arrays, call)
        if verbose:
            print(captured.source)
        buffers = self._inputs(captured, arrays)
        results = []
        for name, shape, dtype in zip(self.output_names, output_shapes, output_dtypes, strict=True):
            out = np.empty(tuple(shape), _NUMPY[dtype])
            if init_value is not None:
                out[...] = to_numpy(mx.array(init_value).astype(dtype))
            buffers.append(Buffer(name, out, "out" if init_value is None else "inout"))
            results.append(out)
        report = self._launch(buffers, captured)
        elapsed = time.perf_counter() - start
        log.append(
            Launch(
                captured.name,
                captured.grid,
                captured.threadgroup,
                report.threadgroup_bytes,
                elapsed,
                report.counts,
            )
        )
        return [_from_numpy(a, d) for a, d in zip(results, output_dtypes, strict=True)]


def _build(captured: Capture) -> Library:
    """Lint and compile under the current options.

    Paths are not followed for each launch of each test, but once for every variant, in
    ``tests/kernels/runtime/test_sources.py``.
    """
    if options.lint:
        findings = lint.check(captured.source, captured.name, options.version, paths=False)
        errors = [f for f in findings if f.severity == "error"]
        if errors:
            raise MslCompileError("\n".join(f"{captured.name}:{f}" for f in errors))
    return compile_kernel(captured.source, captured.name, options.build, options.version)


def metal_kernel(
    name: str,
    input_names: Sequence[str],
    output_names: Sequence[str],
    source: str,
    header: str = "",
    ensure_row_contiguous: bool = True,
    atomic_outputs: bool = False,
    **more: Any,
) -> EmulatedKernel:
    """``mx.fast.metal_kernel`` with the same arguments, run by the bench under ``options``."""
    real = _real_metal_kernel(
        name=name,
        input_names=list(input_names),
        output_names=list(output_names),
        source=source,
        header=header,
        ensure_row_contiguous=ensure_row_contiguous,
        atomic_outputs=atomic_outputs,
        **more,
    )
    return EmulatedKernel(real, input_names, output_names, ensure_row_contiguous, atomic_outputs)


def install() -> None:
    """Put the emulation in the place of ``mx.fast.metal_kernel`` and switch ``mx.compile`` off.

    A launch reads its inputs at once, which a traced array cannot give.
    """
    setattr(mx.fast, _NAME, metal_kernel)
    mx.disable_compile()


def uninstall() -> None:
    """Undo ``install``."""
    setattr(mx.fast, _NAME, _real_metal_kernel)
    mx.enable_compile()


@contextlib.contextmanager
def installed(**changes: Any) -> Iterator[Options]:
    """``install`` for a ``with`` block, with options as in ``using``."""
    with using(**changes) as current:
        install()
        try:
            yield current
        finally:
            uninstall()
