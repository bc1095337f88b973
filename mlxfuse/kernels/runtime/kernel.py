"""What a kernel is, and the one place that decides what runs: Metal, or the reference.

A `Kernel` is a pure description: given arguments it names a program, a grid and outputs
(`Launch`), or the reason why it cannot run. ``MLXFUSE_KERNELS`` chooses:

* ``auto``: Metal where there is a Metal device, it is MLX's default device and nothing
  speaks against it; else the reference in MLX operations. Every fallback is counted with its
  reason, none raises.
* ``metal``: as above, but a fallback raises `KernelError`.
* ``reference``: always the reference.
* ``emulated``: the Metal source, run on the CPU by the test bench of a checkout.

A Metal kernel has no gradient. MLX itself raises under `mx.grad`; a wrapper that says more would
add a fifth to the host time of every launch (`mx.custom_function`). The emulated launches,
which MLX does not see, have it.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, Generic, ParamSpec, cast

import mlx.core as mx

from ... import env
from ...errors import KernelError
from .source import bench, header

P = ParamSpec("P")

MODES = ("auto", "metal", "reference", "emulated")

launches: Counter[str] = Counter()
"""Launches of each ``metal/<op>.metal`` since the start of the process, by op."""

fallbacks: Counter[tuple[str, str]] = Counter()
"""Calls that ran as reference although a kernel was wanted, by op and reason."""

disabled: dict[Program, str] = {}
"""Programs that must not run, with the reason; a failed self-test writes here."""


@dataclass(frozen=True, slots=True)
class Program:
    """The Metal source of one variant of a kernel.

    op        stem of ``metal/<op>.metal``.
    inputs    names of the input arrays in ``body``, in order.
    outputs   names of the output arrays.
    body      body of the Metal function: scratch declarations, if any, and one call.
    parts     what ``body`` needs of ``metal/``; see `header`.
    """

    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    body: str
    parts: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Launch:
    """One dispatch.

    arrays       the inputs of the program, in order.
    grid         threads, not threadgroups, along x, y and z.
    threadgroup  threads of a threadgroup.
    template     template arguments; never a length that grows, since each value compiles anew.
    shapes       shape of each output.
    dtypes       type of each output.
    then         None, or a second dispatch, which makes the first result out of all outputs but
                 the last ``extra``; those are the other results.
    """

    program: Program
    arrays: tuple[mx.array, ...] = field(compare=False)
    grid: tuple[int, int, int]
    threadgroup: tuple[int, int, int]
    template: tuple[tuple[str, mx.Dtype | int | bool], ...]
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[mx.Dtype, ...]
    then: Callable[[list[mx.array]], Launch] | None = field(default=None, compare=False)
    extra: int = 0

    def chain(self) -> list[Launch]:
        """This dispatch and the one after it, if there is one; nothing runs."""
        if self.then is None:
            return [self]
        return [self, self.then(self.blank()[: len(self.shapes) - self.extra])]

    def blank(self) -> list[mx.array]:
        """Zeros that are never computed, in place of the outputs of this dispatch."""
        return [mx.zeros(s, d) for s, d in zip(self.shapes, self.dtypes, strict=True)]

    def results(self, dispatch: Callable[[Launch], list[mx.array]]) -> list[mx.array]:
        """The results, where ``dispatch`` gives the outputs of one dispatch."""
        outputs = dispatch(self)
        if self.then is None:
            return outputs
        split = len(outputs) - self.extra
        return dispatch(self.then(outputs[:split])) + outputs[split:]


@dataclass(frozen=True, slots=True)
class Kernel(Generic[P]):
    """A Metal kernel and its meaning in MLX operations; three functions of the same arguments.

    name       stem of ``metal/<name>.metal``.
    launch     the dispatch; reads shapes and types only, so it needs no GPU.
    refuse     None, or why this call cannot run on Metal.
    reference  the outputs, by MLX's own operations.
    """

    name: str
    launch: Callable[P, Launch]
    refuse: Callable[P, str | None]
    reference: Callable[P, list[mx.array]]

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> list[mx.array]:
        if _recording.found is not None:
            return self._record(_recording.found, *args, **kwargs)
        mode = _mode()
        if mode == "reference":
            return self.reference(*args, **kwargs)
        reason = _unavailable(mode) or self.refuse(*args, **kwargs)
        if reason is None:
            launch = self.launch(*args, **kwargs)
            reason = disabled.get(launch.program)
            if reason is None:
                if _recording.assumed is None:
                    launches[self.name] += 1
                return run(launch, emulated=mode == "emulated")
        _fall_back(self.name, mode, reason)
        return self.reference(*args, **kwargs)

    def _record(self, found: list[Recorded], *args: P.args, **kwargs: P.kwargs) -> list[mx.array]:
        """Note the call; zeros that are never computed stand for its outputs."""
        if self.refuse(*args, **kwargs) is not None:
            return self.reference(*args, **kwargs)
        found.append((self, args))
        return self.launch(*args, **kwargs).results(Launch.blank)


Recorded = tuple[Kernel[Any], tuple[Any, ...]]


class _Recording(threading.local):
    """Of this thread alone, so that other models go on: where calls are noted, if they are."""

    found: list[Recorded] | None = None
    assumed: Counter[str] | None = None


_recording = _Recording()


@contextmanager
def recording(found: list[Recorded]) -> Iterator[None]:
    """Within, calls of this thread that could be launched are added to ``found`` instead."""
    before, _recording.found = _recording.found, found
    try:
        yield
    finally:
        _recording.found = before


@contextmanager
def assuming_metal(counted: Counter[str]) -> Iterator[None]:
    """Within, this thread builds the graphs that it would build on Metal.

    An opaque operation stands for each kernel, of which the results are zeros; ``counted`` gets
    the name of each.
    """
    before, _recording.assumed = _recording.assumed, counted
    try:
        yield
    finally:
        _recording.assumed = before


def noted() -> bool:
    """Whether this thread is within `recording`."""
    return _recording.found is not None


def assumed() -> bool:
    """Whether this thread is within `assuming_metal`."""
    return _recording.assumed is not None


def opaque(
    inputs: Sequence[mx.array], shapes: Sequence[tuple[int, ...]], dtypes: Sequence[mx.Dtype]
) -> list[mx.array]:
    """One operation from ``inputs`` to zeros, of which the primitive is ``Depends``."""
    zeros = [mx.zeros(shape, dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]
    mx.eval(zeros)
    return list(mx.depends(zeros, list(inputs)))


def wanted(name: str, refusal: str | None) -> bool:
    """Whether kernel ``name`` is to run, for a caller with a better reference than the kernel's.

    Args:
        refusal: why this call cannot run on Metal, if so.
    """
    if _recording.found is not None:
        return refusal is None
    mode = _mode()
    if mode == "reference":
        return False
    reason = _unavailable(mode) or refusal
    if reason is not None:
        _fall_back(name, mode, reason)
    return reason is None


def _fall_back(name: str, mode: str, reason: str) -> None:
    if mode == "metal":
        raise KernelError(f"{name} cannot run on Metal: {reason}")
    fallbacks[name, reason] += 1


def counts() -> dict[str, dict[str, int]]:
    """`launches` and `fallbacks` so far, the latter by ``"op: reason"``."""
    return {
        "launches": dict(sorted(launches.items())),
        "fallbacks": {f"{op}: {reason}": n for (op, reason), n in sorted(fallbacks.items())},
    }


def summary() -> list[str]:
    """`counts` in words, one line for what ran and one for each reason of a fallback."""
    where = "emulated on the CPU" if env.get("MLXFUSE_KERNELS") == "emulated" else "on Metal"
    ran = ", ".join(f"{op}.metal {n} times" for op, n in sorted(launches.items()))
    return [f"Kernels {where}: {ran}"] * bool(ran) + [
        f"Without its kernel: {op} {n} times: {reason}"
        for (op, reason), n in sorted(fallbacks.items())
    ]


def run(launch: Launch, *, emulated: bool = False) -> list[mx.array]:
    """Dispatch, unconditionally."""
    if (counted := _recording.assumed) is not None:

        def stand_in(one: Launch) -> list[mx.array]:
            counted[one.program.op] += 1
            return opaque(one.arrays, one.shapes, one.dtypes)

        return launch.results(stand_in)
    if emulated:
        return launch.results(lambda one: cast(list[mx.array], _emulate(list(one.arrays), one)))
    return launch.results(lambda one: _dispatch(one.arrays, one, mx.fast.metal_kernel))


def _dispatch(
    arrays: Sequence[mx.array], launch: Launch, factory: Callable[..., Any]
) -> list[mx.array]:
    kernel = _compiled(launch.program, factory)
    outputs: list[mx.array] = kernel(
        inputs=list(arrays),
        grid=launch.grid,
        threadgroup=launch.threadgroup,
        template=list(launch.template),
        output_shapes=list(launch.shapes),
        output_dtypes=list(launch.dtypes),
    )
    return outputs


class Prepared:
    """A launch that is repeated with other values of some of its inputs.

    Building a launch costs the host more than MLX's own operations do; a prepared one does not.

    Args:
        free: names of the inputs that change, of the program's.
        shapes: of the outputs, each with as many elements as the launch's.
    """

    __slots__ = ("_emulated", "_inputs", "_kernel", "_launch", "_options", "_places", "name")

    def __init__(
        self, launch: Launch, free: Sequence[str], shapes: Sequence[tuple[int, ...]]
    ) -> None:
        self.name = launch.program.op
        self._places = [launch.program.inputs.index(n) for n in free]
        # Nothing of the first call's activations stays.
        self._launch = replace(launch, arrays=(), shapes=tuple(shapes))
        self._inputs = [
            None if i in self._places else array for i, array in enumerate(launch.arrays)
        ]
        self._emulated = _mode() == "emulated"
        self._kernel = _compiled(
            launch.program, bench() if self._emulated else mx.fast.metal_kernel
        )
        self._options: dict[str, Any] = {
            "grid": launch.grid,
            "threadgroup": launch.threadgroup,
            "template": list(launch.template),
            "output_shapes": list(shapes),
            "output_dtypes": list(launch.dtypes),
        }
        # What does not change is cast now, not in every call.
        mx.eval([array for array in self._inputs if array is not None])

    def __call__(self, *arrays: mx.array) -> list[mx.array] | None:
        """The outputs; None if a self-test found the program to be wrong."""
        if disabled and self._launch.program in disabled:
            return None
        inputs: list[Any] = self._inputs.copy()
        for place, array in zip(self._places, arrays, strict=True):
            inputs[place] = array
        options = self._options
        if _recording.assumed is not None:
            _recording.assumed[self.name] += 1
            return opaque(inputs, options["output_shapes"], options["output_dtypes"])
        launches[self.name] += 1
        if self._emulated:
            return cast(list[mx.array], _emulate(inputs, self._launch))
        return self._kernel(inputs=inputs, **options)


def ready() -> str:
    """The mode in which kernels are launched now; empty where they are not."""
    if _recording.found is not None:
        return ""
    mode = _mode()
    return "" if mode == "reference" or _unavailable(mode) is not None else mode


@mx.custom_function
def _emulate(arrays: list[mx.array], launch: Launch) -> list[mx.array]:
    return _dispatch(arrays, launch, bench())


@_emulate.vjp
def _no_gradient(arrays: Any, cotangents: Any, outputs: Any) -> None:
    raise KernelError(
        "a Metal kernel has no gradient: call model.train(), or set MLXFUSE_KERNELS=reference"
    )


@cache
def _compiled(program: Program, factory: Callable[..., Any]) -> Callable[..., list[mx.array]]:
    kernel: Callable[..., list[mx.array]] = factory(
        name=f"mlxfuse_{program.op}",
        input_names=list(program.inputs),
        output_names=list(program.outputs),
        source=program.body,
        header=header(program.parts),
    )
    return kernel


def unavailable() -> str | None:
    """None where kernels can run now, on Metal or emulated; else why they cannot.

    Raises:
        KernelError: ``MLXFUSE_KERNELS`` has no such value, or is ``metal`` without a device.
    """
    mode = _mode()
    if mode == "reference":
        return "MLXFUSE_KERNELS is reference"
    reason = _unavailable(mode)
    if reason is not None and mode == "metal":
        raise KernelError(f"kernels cannot run on Metal: {reason}")
    return reason


def _mode() -> str:
    return "metal" if _recording.assumed is not None else env.get("MLXFUSE_KERNELS")


def _unavailable(mode: str) -> str | None:
    if mode == "emulated" or _recording.assumed is not None:
        return None
    if mode not in MODES:
        raise KernelError(f"MLXFUSE_KERNELS is one of {', '.join(MODES)}; found {mode!r}")
    if not mx.metal.is_available():
        return "this MLX has no Metal device"
    if mx.default_device() != mx.gpu:
        return "MLX's default device is the CPU"
    return None
