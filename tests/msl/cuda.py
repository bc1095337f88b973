"""Kernels as PTX on an NVIDIA GPU, through the CUDA driver."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Sequence
from typing import Any

from .emulate import Capture, EmulatedKernel, _real_metal_kernel
from .errors import MslRunError, MslSetupError
from .ptx import ENTRY, compile_ptx
from .run import Buffer, Report

_Pointer = ctypes.c_uint64


class Gpu:
    """The first GPU. Raises MslSetupError where there is none."""

    def __init__(self) -> None:
        try:
            self.driver = ctypes.CDLL("libcuda.so.1")
        except OSError as e:
            raise MslSetupError(f"no NVIDIA GPU: {e}") from e
        count = ctypes.c_int()
        if self.driver.cuInit(0) or self.driver.cuDeviceGetCount(ctypes.byref(count)):
            raise MslSetupError("no NVIDIA GPU: the driver does not start")
        if count.value == 0:
            raise MslSetupError("no NVIDIA GPU: the driver finds none")
        device, context, name = ctypes.c_int(), ctypes.c_void_p(), ctypes.create_string_buffer(128)
        self("cuDeviceGet", ctypes.byref(device), 0)
        self("cuDeviceGetName", name, len(name), device)
        self("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        self("cuCtxSetCurrent", context)
        self.name = name.value.decode()

    def __call__(self, function: str, *arguments: Any) -> None:
        """A call of the driver that must succeed."""
        code = getattr(self.driver, function)(*arguments)
        if code:
            text = ctypes.c_char_p()
            self.driver.cuGetErrorString(code, ctypes.byref(text))
            found = text.value.decode() if text.value else f"error {code}"
            raise MslRunError("cuda", f"{function}: {found}")

    def function(self, ptx: str) -> ctypes.c_void_p:
        """The entry point of a PTX text."""
        module, function = ctypes.c_void_p(), ctypes.c_void_p()
        self("cuModuleLoadData", ctypes.byref(module), ptx.encode())
        self("cuModuleGetFunction", ctypes.byref(function), module, ENTRY.encode())
        return function

    def allocate(self, nbytes: int) -> _Pointer:
        pointer = _Pointer()
        self("cuMemAlloc_v2", ctypes.byref(pointer), ctypes.c_size_t(max(nbytes, 1)))
        return pointer

    def milliseconds(self, work: Callable[[], None], times: int) -> float:
        """Of one call of ``work``, which is asynchronous, as the mean of several after one."""
        start, end = ctypes.c_void_p(), ctypes.c_void_p()
        for event in (start, end):
            self("cuEventCreate", ctypes.byref(event), 0)
        work()
        self("cuEventRecord", start, None)
        for _ in range(times):
            work()
        self("cuEventRecord", end, None)
        self("cuEventSynchronize", end)
        elapsed = ctypes.c_float()
        self("cuEventElapsedTime", ctypes.byref(elapsed), start, end)
        for event in (start, end):
            self("cuEventDestroy_v2", event)
        return elapsed.value / times


@functools.cache
def gpu() -> Gpu:
    """The GPU, once."""
    return Gpu()


class CudaKernel(EmulatedKernel):
    """Called as the emulated kernel is; runs on the GPU.

    Attributes:
        repeats: launches to time after the first; 0 for none.
        milliseconds: of one of them.
    """

    repeats = 0
    milliseconds = 0.0

    def _launch(self, buffers: Sequence[Buffer], captured: Capture) -> Report:
        groups = [-(-g // t) for g, t in zip(captured.grid, captured.threadgroup, strict=True)]
        if any(g % t for g, t in zip(captured.grid, captured.threadgroup, strict=True)):
            raise MslRunError("launch", f"{captured.name}: CUDA launches whole threadgroups only")
        device = gpu()
        function = device.function(compile_ptx(captured.source, captured.name))
        pointers = [device.allocate(b.array.nbytes) for b in buffers]
        for pointer, b in zip(pointers, buffers, strict=True):
            size = ctypes.c_size_t(b.array.nbytes)
            if b.use == "out":
                device("cuMemsetD8_v2", pointer, ctypes.c_ubyte(0xFF), size)
            elif b.array.nbytes:
                device("cuMemcpyHtoD_v2", pointer, ctypes.c_void_p(b.array.ctypes.data), size)
        arguments = (ctypes.c_void_p * len(pointers))(*map(ctypes.addressof, pointers))

        def work() -> None:
            device(
                "cuLaunchKernel",
                function,
                *groups,
                *captured.threadgroup,
                0,
                None,
                arguments,
                None,
            )

        work()
        device("cuCtxSynchronize")
        if self.repeats:
            self.milliseconds = device.milliseconds(work, self.repeats)
        for pointer, b in zip(pointers, buffers, strict=True):
            if b.use != "in" and b.array.nbytes:
                data = ctypes.c_void_p(b.array.ctypes.data)
                device("cuMemcpyDtoH_v2", data, pointer, ctypes.c_size_t(b.array.nbytes))
            device("cuMemFree_v2", pointer)
        return Report(0, 0, 0)


def cuda_kernel(
    name: str,
    input_names: Sequence[str],
    output_names: Sequence[str],
    source: str,
    header: str = "",
) -> CudaKernel:
    """``mx.fast.metal_kernel`` on an NVIDIA GPU, for contiguous inputs and no atomics."""
    real = _real_metal_kernel(
        name=name,
        input_names=list(input_names),
        output_names=list(output_names),
        source=source,
        header=header,
    )
    return CudaKernel(real, input_names, output_names, True, False)


def copy_bandwidth(nbytes: int) -> float:
    """GB/s read and written by a copy within the GPU's memory."""
    device = gpu()
    source, target = device.allocate(nbytes), device.allocate(nbytes)
    size = ctypes.c_size_t(nbytes)
    took = device.milliseconds(lambda: device("cuMemcpyDtoD_v2", target, source, size), 20)
    for pointer in (source, target):
        device("cuMemFree_v2", pointer)
    return 2 * nbytes / took / 1e6
