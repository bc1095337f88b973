"""What a kernel is: a pure description.

Given arguments, a `Kernel` names a program, a grid and outputs (`Launch`), or the reason why it
cannot run; `backend` decides what becomes of that.

A Metal kernel has no gradient. MLX itself raises under `mx.grad`; a wrapper that says more would
add a fifth to the host time of every launch (`mx.custom_function`). The emulated launches,
which MLX does not see, have it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, Generic, ParamSpec

import mlx.core as mx
import numpy as np

from .backend import METAL, Backend, backend, disabled, fallbacks, launches
from .backend import emulated as _emulated
from .source import header

P = ParamSpec("P")

__all__ = [
    "Kernel",
    "Launch",
    "Prepared",
    "Program",
    "Recorded",
    "disabled",
    "fallbacks",
    "header",
    "launches",
    "normal",
    "run",
]


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

    def dispatch(self, arrays: Sequence[mx.array], factory: Callable[..., Any]) -> list[mx.array]:
        """The outputs of this dispatch alone.

        Args:
            factory: `mx.fast.metal_kernel`, or what stands for it.
        """
        return _compiled(self.program, factory)(inputs=list(arrays), **self.options())

    def options(self) -> dict[str, Any]:
        """Arguments of MLX's kernel but for the inputs."""
        return {
            "grid": self.grid,
            "threadgroup": self.threadgroup,
            "template": list(self.template),
            "output_shapes": list(self.shapes),
            "output_dtypes": list(self.dtypes),
        }


@dataclass(frozen=True, slots=True)
class Kernel(Generic[P]):
    """A Metal kernel and its meaning in MLX operations; four functions of the same arguments.

    name       stem of ``metal/<name>.metal``.
    launch     the dispatch; reads shapes and types only, so it needs no GPU.
    refuse     None, or why this call cannot run on Metal.
    reference  the outputs, by MLX's own operations.
    small      arguments of a small random case of the same variant, for its self-test.
    """

    name: str
    launch: Callable[P, Launch]
    refuse: Callable[P, str | None]
    reference: Callable[P, list[mx.array]]
    small: Callable[P, tuple[Any, ...]]

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> list[mx.array]:
        return backend().call(self, *args, **kwargs)


def normal(dtype: mx.Dtype) -> Callable[..., mx.array]:
    """A source of random arrays of given shapes, for small cases; the same ones each time."""
    random = np.random.default_rng(20)

    def draw(*shape: int) -> mx.array:
        return mx.array(random.standard_normal(shape, np.float32)).astype(dtype)

    return draw


Recorded = tuple[Kernel[Any], tuple[Any, ...]]


def run(launch: Launch, *, emulated: bool = False) -> list[mx.array]:
    """Dispatch on Metal or emulated, unconditionally."""
    return (_emulated() if emulated else METAL).run(launch)


class Prepared:
    """A launch that is repeated with other values of some of its inputs.

    Building a launch costs the host more than MLX's own operations do; a prepared one does not.

    Args:
        free: names of the inputs that change, of the program's.
        shapes: of the outputs, each with as many elements as the launch's.
    """

    __slots__ = ("_inputs", "_places", "kernel", "launch", "name", "options")

    def __init__(
        self, launch: Launch, free: Sequence[str], shapes: Sequence[tuple[int, ...]]
    ) -> None:
        self.name = launch.program.op
        self._places = [launch.program.inputs.index(n) for n in free]
        # Nothing of the first call's activations stays.
        self.launch = replace(launch, arrays=(), shapes=tuple(shapes))
        self._inputs = [
            None if i in self._places else array for i, array in enumerate(launch.arrays)
        ]
        self.kernel = _compiled(launch.program, mx.fast.metal_kernel)
        self.options = self.launch.options()
        # What does not change is cast now, not in every call.
        mx.eval([array for array in self._inputs if array is not None])

    def __call__(self, *arrays: mx.array, on: Backend | None = None) -> list[mx.array] | None:
        """The outputs; None if a self-test found the program to be wrong.

        Args:
            on: the `backend`, for who has asked already.
        """
        if disabled and self.launch.program in disabled:
            return None
        inputs: list[Any] = self._inputs.copy()
        for place, array in zip(self._places, arrays, strict=True):
            inputs[place] = array
        return (on or backend()).repeat(self, inputs)


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
