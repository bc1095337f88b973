"""What becomes of a kernel's call: one answer, in one place.

`backend` gives it: `using` chooses one for a while, in this thread alone; else it follows from
``MLXFUSE_KERNELS`` and the device:

* ``auto``: `Metal` where there is a Metal device, it is MLX's default device and nothing speaks
  against it; else `Reference`, MLX's own operations. Every fallback is counted with its reason,
  none raises.
* ``metal``: as above, but a fallback raises `KernelError`.
* ``reference``: always the reference.
* ``emulated``: the Metal source, run on the CPU by the test bench of a checkout.
"""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from copy import copy
from functools import cache
from typing import TYPE_CHECKING, Any, cast

import mlx.core as mx

from ... import env
from ...errors import KernelError

if TYPE_CHECKING:
    from .kernel import Kernel, Launch, Prepared, Program, Recorded

MODES = ("auto", "metal", "reference", "emulated")
_depends = mx.depends  # while dispatches are counted, a model's own have another

launches: Counter[str] = Counter()
"""Launches of each ``metal/<op>.metal`` since the start of the process, by op."""

fallbacks: Counter[tuple[str, str]] = Counter()
"""Calls that ran as reference although a kernel was wanted, by op and reason."""

disabled: dict[Program, str] = {}
"""Programs that must not run, with the reason; a failed self-test writes here."""

Trial = Callable[["Kernel[Any]", tuple[Any, ...], "Launch"], None]

trials: list[Trial] = []
"""What is to happen before Metal runs a program; `self_test.on_first_use` is the one there is."""


class Backend:
    """Metal, or what stands for it.

    reason    why no kernel runs, or None.
    fused     whether patched modules run what is fused of them, and not their own code.
    keeps     whether parts of a model's graph may be kept from call to call.
    prepares  whether launches may be prepared, see `Prepared`.
    values    whether arrays have the model's values, which may be looked at.
    """

    reason: str | None = None
    fused = True
    keeps = False
    prepares = True
    values = True

    def takes(self, name: str, refusal: str | None) -> bool:
        """Whether kernel ``name`` is to run, for a caller with a better reference than its own.

        Args:
            refusal: why this call cannot run on Metal, if so.
        """
        if refusal is not None:
            self.fall_back(name, refusal)
        return refusal is None

    def expect(self, kernel: Kernel[Any], args: tuple[Any, ...], launch: Launch) -> None:
        """Note that the kernel's launch of such arguments is about to run."""

    def call(self, kernel: Kernel[Any], *args: Any) -> list[mx.array]:
        """The outputs of a kernel's call."""
        reason = kernel.refuse(*args)
        if reason is None:
            launch = kernel.launch(*args)
            self.expect(kernel, args, launch)
            reason = disabled.get(launch.program)
            if reason is None:
                self.count(kernel.name)
                return self.run(launch)
        self.fall_back(kernel.name, reason)
        return kernel.reference(*args)

    def run(self, launch: Launch) -> list[mx.array]:
        """Dispatch the launch without asking whether it may run."""
        raise KernelError(f"kernels do not run: {self.reason}")

    def repeat(self, prepared: Prepared, inputs: list[mx.array]) -> list[mx.array]:
        """Dispatch a prepared launch with these inputs."""
        raise KernelError(f"kernels do not run: {self.reason}")

    def count(self, name: str) -> None:
        launches[name] += 1

    def fall_back(self, name: str, reason: str) -> None:
        """Note that a kernel is wanted and does not run."""
        fallbacks[name, reason] += 1


class Metal(Backend):
    """The GPU.

    Args:
        strict: a fallback raises.
    """

    keeps = True

    def __init__(self, *, strict: bool = False) -> None:
        self.strict = strict

    def expect(self, kernel: Kernel[Any], args: tuple[Any, ...], launch: Launch) -> None:
        for trial in trials:
            trial(kernel, args, launch)

    def run(self, launch: Launch) -> list[mx.array]:
        return launch.results(lambda one: one.dispatch(one.arrays, mx.fast.metal_kernel))

    def repeat(self, prepared: Prepared, inputs: list[mx.array]) -> list[mx.array]:
        launches[prepared.name] += 1
        return prepared.kernel(inputs=inputs, **prepared.options)

    def fall_back(self, name: str, reason: str) -> None:
        if self.strict:
            raise KernelError(f"{name} cannot run on Metal: {reason}")
        super().fall_back(name, reason)


class Emulated(Backend):
    """The Metal source, run on the CPU by a stand-in for `mx.fast.metal_kernel`."""

    def __init__(self, factory: Callable[..., Any]) -> None:
        self._factory = factory

    def run(self, launch: Launch) -> list[mx.array]:
        return launch.results(lambda one: self._dispatch(list(one.arrays), one))

    def repeat(self, prepared: Prepared, inputs: list[mx.array]) -> list[mx.array]:
        launches[prepared.name] += 1
        return self._dispatch(inputs, prepared.launch)

    def _dispatch(self, arrays: list[mx.array], launch: Launch) -> list[mx.array]:
        return cast(list[mx.array], _without_gradient(arrays, launch, self._factory))


class Reference(Backend):
    """MLX's own operations.

    Args:
        reason: why no kernel runs.
        wanted: a kernel is wanted, so that its fallback is counted.
        strict: it is demanded, so that its fallback raises.
    """

    prepares = False

    def __init__(self, reason: str, *, wanted: bool = False, strict: bool = False) -> None:
        self.reason = reason
        self.strict = strict
        self._wanted = wanted

    def takes(self, name: str, refusal: str | None) -> bool:
        if self._wanted:
            self.fall_back(name, self.reason or "")
        return False

    def call(self, kernel: Kernel[Any], *args: Any) -> list[mx.array]:
        self.takes(kernel.name, None)
        return kernel.reference(*args)

    def fall_back(self, name: str, reason: str) -> None:
        if self.strict:
            raise KernelError(f"{name} cannot run on Metal: {reason}")
        super().fall_back(name, reason)


class Recorder(Backend):
    """Runs nothing: calls that could be launched are noted, and zeros stand for their outputs.

    Args:
        found: gets them.
    """

    prepares = False
    values = False

    def __init__(self, found: list[Recorded]) -> None:
        self._found = found

    def call(self, kernel: Kernel[Any], *args: Any) -> list[mx.array]:
        if kernel.refuse(*args) is not None:
            return kernel.reference(*args)
        self._found.append((kernel, args))
        return kernel.launch(*args).results(lambda one: one.blank())

    def fall_back(self, name: str, reason: str) -> None:
        """Note nothing now: a fallback is counted when it happens."""


class Counting(Backend):
    """The graphs that would be built on Metal: one opaque operation stands for each dispatch.

    A kernel that refuses is a fallback here too, also where that would raise.

    Args:
        counted: gets the name of each.
        fused: as of `Backend`.
    """

    values = False

    def __init__(self, counted: Counter[str], *, fused: bool = True) -> None:
        self.counted = counted
        self.fused = fused

    def run(self, launch: Launch) -> list[mx.array]:
        def stand_in(one: Launch) -> list[mx.array]:
            self.counted[one.program.op] += 1
            return opaque(one.arrays, one.shapes, one.dtypes)

        return launch.results(stand_in)

    def repeat(self, prepared: Prepared, inputs: list[mx.array]) -> list[mx.array]:
        self.counted[prepared.name] += 1
        launch = prepared.launch
        return opaque(inputs, launch.shapes, launch.dtypes)

    def count(self, name: str) -> None:
        """Count nothing here: `run` does."""

    def fall_back(self, name: str, reason: str) -> None:
        """Count nothing, since nothing runs."""


METAL = Metal()
_STRICT = Metal(strict=True)
_REFERENCE = Reference("MLXFUSE_KERNELS is reference")
_chosen: ContextVar[Backend | None] = ContextVar("mlxfuse_backend", default=None)


def backend() -> Backend:
    """What runs kernels now, in this thread.

    Raises:
        KernelError: ``MLXFUSE_KERNELS`` has no such value, or there is nothing to emulate with.
    """
    return _chosen.get() or _default()


@contextmanager
def using(chosen: Backend) -> Iterator[None]:
    """Within, `backend` is this one, in this thread."""
    token = _chosen.set(chosen)
    try:
        yield
    finally:
        _chosen.reset(token)


@contextmanager
def unfused() -> Iterator[None]:
    """Within, patched modules run their own code, in this thread."""
    now = copy(backend())
    now.fused = False
    with using(now):
        yield


def unavailable() -> str | None:
    """None where kernels can run now, on Metal or emulated; else why they cannot.

    Raises:
        KernelError: as `backend`; or ``MLXFUSE_KERNELS`` is ``metal`` without a device.
    """
    now = backend()
    if isinstance(now, Reference) and now.strict:
        raise KernelError(f"kernels cannot run on Metal: {now.reason}")
    return now.reason


def _default() -> Backend:
    mode = env.get("MLXFUSE_KERNELS")
    if mode == "reference":
        return _REFERENCE
    if mode == "emulated":
        return emulated()
    if mode not in MODES:
        raise KernelError(f"MLXFUSE_KERNELS is one of {', '.join(MODES)}; found {mode!r}")
    reason = _no_device()
    if reason is not None:
        return _without_device(reason, mode == "metal")
    return METAL if mode == "auto" else _STRICT


@cache
def _without_device(reason: str, strict: bool) -> Reference:
    return Reference(reason, wanted=True, strict=strict)


def _no_device() -> str | None:
    if not mx.metal.is_available():
        return "this MLX has no Metal device"
    if mx.default_device() != mx.gpu:
        return "MLX's default device is the CPU"
    return None


@cache
def emulated() -> Emulated:
    """The backend of the test bench: ``metal_kernel`` of the module ``MLXFUSE_BENCH``.

    Raises:
        KernelError: there is no such module, or it is no bench.
    """
    name = env.get("MLXFUSE_BENCH")
    try:
        found = importlib.import_module(name)
        return Emulated(found.metal_kernel)
    except (ImportError, AttributeError) as error:
        raise KernelError(
            f"MLXFUSE_KERNELS=emulated needs the test bench of a checkout: module {name} cannot be "
            f"used ({error}); run it in the checkout's folder as `python -m mlxfuse`, or install "
            "the checkout with `pip install -e .`"
        ) from error


@mx.custom_function
def _without_gradient(
    arrays: list[mx.array], launch: Launch, factory: Callable[..., Any]
) -> list[mx.array]:
    return launch.dispatch(arrays, factory)


@_without_gradient.vjp
def _no_gradient(arrays: Any, cotangents: Any, outputs: Any) -> None:
    raise KernelError(
        "a Metal kernel has no gradient: call model.train(), or set MLXFUSE_KERNELS=reference"
    )


def opaque(
    inputs: Sequence[mx.array], shapes: Sequence[tuple[int, ...]], dtypes: Sequence[mx.Dtype]
) -> list[mx.array]:
    """One operation from ``inputs`` to zeros, of which the primitive is ``Depends``."""
    zeros = [mx.zeros(shape, dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]
    mx.eval(zeros)
    return list(_depends(zeros, list(inputs)))


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
