"""RMSNorm, with the residual before it and int8 codes behind it: ``metal/rms_norm.metal``."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from typing import NamedTuple

import mlx.core as mx

from ..activations import GROUP, Int8Activations
from ..runtime.kernel import Kernel, Launch, Program, normal
from ..weight import FLOATS, refuse_other_types
from . import quantize_int8

MAX_COLUMNS = 16384
"""Longest row the kernel keeps in registers: 64 values for each thread of a threadgroup."""

_THREADS = 256  # of a threadgroup at most; not measured on a Mac

OUTPUTS = ("y", "int8")


class Post(NamedTuple):
    """A norm of x before the residual is added; arguments as of `rms_norm`.

    factor  ``[1]`` of the type of x, multiplies the sum; None for no product.
    """

    weight: mx.array
    eps: float
    offset: float = 0.0
    factor: mx.array | None = None


@dataclass(frozen=True, slots=True)
class NormResult:
    """What `rms_norm` gives; None where it was not asked for.

    h       ``x + residual``, or ``norm(x) + residual``, where there is a residual.
    y       the normalised rows.
    int8    y as int8 codes.
    others  the normalised rows by other weights.
    """

    h: mx.array | None = None
    y: mx.array | None = None
    int8: Int8Activations | None = None
    others: tuple[mx.array, ...] = ()


def rms_norm(
    x: mx.array,
    weight: mx.array | None,
    eps: float,
    *,
    residual: mx.array | None = None,
    offset: float = 0.0,
    outputs: Collection[str] = ("y",),
    post: Post | float | None = None,
    others: tuple[mx.array, ...] = (),
    beside: tuple[Post, mx.array] | None = None,
) -> NormResult:
    """``y = h / sqrt(mean(h^2) + eps) * (offset + weight)`` with ``h = x + residual``.

    With ``post``, ``h = norm(x) + residual``, and that norm is rounded to T as y is, or
    ``h = (norm(x) + residual) * factor``, of which the sum is too; or, where ``post`` is a number,
    ``h = x * post + residual``, of which the number and the product are rounded to T, as MLX
    rounds them. h is rounded to its type T, and all else follows from the rounded h;
    mean and root are float32. As by `mx.fast.rms_norm`, the normalised value, ``offset + weight``
    and their product are each rounded to T; mlx-lm's classes for gemma do the same. ``int8`` are
    the codes of y rounded to T, whether or not y is asked for. Arguments of different types
    promote, as in MLX, and run without the kernel.

    Args:
        x: ``[..., K]``, float16, bfloat16 or float32.
        weight: ``[K]``, or None for no product.
        eps: added to the mean of the squares.
        residual: of the shape of x.
        offset: 1 for the weights of gemma.
        outputs: any of `OUTPUTS`; ``int8`` needs K to be a multiple of 32. With ``post`` there
            may be none, and h is all.
        post: what is done to x before the residual is added, which there must be.
        others: weights ``[K]``, each of which takes the place of ``weight`` in another y; y is
            asked for then.
        beside: a norm of x and what is added to it, of the shape of x, before all else; with a
            `Post` only. The norm and the sum are rounded to T.

    Raises:
        ValueError: arguments that do not fit together.
    """
    asked = tuple(o for o in OUTPUTS if o in outputs)
    call = _Call(x, weight, eps, residual, offset, asked, post, others, beside)
    call.check(outputs)
    got = dict(zip(call.names, KERNEL(call), strict=True))
    int8 = None
    if "int8" in outputs:
        int8 = Int8Activations(got["codes"], got["scales"], got["sums"], call.dtype)
    more = tuple(got[f"y_{name}"] for name in call.weights)
    return NormResult(got.get("h"), got.get("y"), int8, more)


@dataclass(frozen=True, slots=True)
class _Call:
    """The arguments of one `rms_norm`."""

    x: mx.array
    weight: mx.array | None
    eps: float
    residual: mx.array | None
    offset: float
    outputs: tuple[str, ...]
    post: Post | float | None = None
    others: tuple[mx.array, ...] = ()
    beside: tuple[Post, mx.array] | None = None

    @property
    def columns(self) -> int:
        return self.x.shape[-1]

    @property
    def dtype(self) -> mx.Dtype:
        """Of y."""
        return mx.result_type(self.x, *self.given.values())

    @property
    def given(self) -> dict[str, mx.array]:
        """The inputs besides x."""
        found = {"residual": self.residual, "weight": self.weight}
        if isinstance(self.post, Post):
            found |= {"post": self.post.weight, "factor": self.post.factor}
        if self.beside is not None:
            found |= {"aside": self.beside[0].weight, "beside": self.beside[1]}
        return {n: a for n, a in found.items() if a is not None} | self.weights

    @property
    def weights(self) -> dict[str, mx.array]:
        """The other weights, by the names of the kernel's inputs."""
        return {f"weight{i}": weight for i, weight in enumerate(self.others)}

    @property
    def names(self) -> tuple[str, ...]:
        """The kernel's outputs."""
        of = {"y": ("y",), "int8": quantize_int8.OUTPUTS}
        found = ["h"] if self.residual is not None else []
        found += [n for o in self.outputs for n in of[o]]
        return (*found, *(f"y_{name}" for name in self.weights))

    def check(self, outputs: Collection[str]) -> None:
        x = self.x
        if x.ndim < 1 or x.shape[-1] == 0:
            raise ValueError(f"x: expected [..., K] with K > 0, found {x.shape}")
        for weight in (self.weight, *self.others):
            if weight is not None and weight.shape != (self.columns,):
                raise ValueError(f"weight: expected ({self.columns},), found {weight.shape}")
        if self.beside is not None and not isinstance(self.post, Post):
            raise ValueError("beside: expected a norm as post")
        if self.beside is not None and self.beside[1].shape != x.shape:
            raise ValueError(f"beside: expected {x.shape}, found {self.beside[1].shape}")
        if self.others and "y" not in outputs:
            raise ValueError("others: expected y among the outputs")
        if self.residual is not None and self.residual.shape != x.shape:
            raise ValueError(f"residual: expected {x.shape}, found {self.residual.shape}")
        if self.post is not None and self.residual is None:
            raise ValueError("post: expected a residual to add to, found none")
        if isinstance(self.post, Post) and self.post.weight.shape != (self.columns,):
            raise ValueError(f"post: expected ({self.columns},), found {self.post.weight.shape}")
        factor = self.post.factor if isinstance(self.post, Post) else None
        if factor is not None and factor.shape != (1,):
            raise ValueError(f"factor: expected (1,), found {factor.shape}")
        if not (self.outputs or self.post is not None) or set(outputs) - set(OUTPUTS):
            raise ValueError(f"outputs: expected some of {OUTPUTS}, found {tuple(outputs)}")
        if self.columns % GROUP and self.outputs not in ((), ("y",)):
            raise ValueError(
                f"output int8 needs rows of a multiple of {GROUP} values, found {self.columns}"
            )


def _refuse(call: _Call) -> str | None:
    x = call.x
    if x.dtype not in FLOATS:
        return f"x is float16, bfloat16 or float32, not {x.dtype}"
    if x.size == 0:
        return "x has no rows"
    if call.columns > MAX_COLUMNS:
        return f"rows of more than {MAX_COLUMNS} values"
    return refuse_other_types(x, call.given)


def launch_size(columns: int) -> tuple[int, int]:
    """Pieces of four values that a thread holds of a row, and the threads of a row."""
    quads = -(-columns // 4)
    pieces = -(-quads // _THREADS)
    return pieces, 32 * -(-quads // (32 * pieces))


def _launch(call: _Call) -> Launch:
    x, given = call.x, call.given
    pieces, threads = launch_size(call.columns)
    shapes = dict.fromkeys(("h", "y", *(f"y_{name}" for name in call.weights)), x.shape)
    shapes |= zip(quantize_int8.OUTPUTS, quantize_int8.output_shapes(x.shape), strict=True)
    dtypes = dict.fromkeys(shapes, mx.float32) | {"codes": mx.int8}
    dtypes |= {name: x.dtype for name in shapes if name[0] in "hy"}
    whole = call.columns % 4 == 0
    return Launch(
        program=_program(pieces, whole, ("x", *given), call.names, isinstance(call.post, float)),
        arrays=(x, *given.values(), *_numbers(call)),
        grid=(x.size // call.columns * threads, 1, 1),
        threadgroup=(threads, 1, 1),
        template=(("T", x.dtype),),
        shapes=tuple(shapes[n] for n in call.names),
        dtypes=tuple(dtypes[n] for n in call.names),
    )


@lru_cache(maxsize=1024)
def _constants(columns: int, *numbers: float) -> tuple[mx.array, mx.array]:
    arrays = mx.array(columns, mx.int32), mx.array(numbers, mx.float32)
    mx.eval(arrays)
    return arrays


def _numbers(call: _Call) -> tuple[mx.array, mx.array]:
    post = call.post
    more = (post.eps, post.offset) if isinstance(post, Post) else (post,)
    first = () if call.beside is None else (call.beside[0].eps, call.beside[0].offset)
    numbers = () if post is None else (*more, *first)
    return _constants(call.columns, call.eps, call.offset, *numbers)


def _before_the_norm(
    held: str, moved: str, inputs: tuple[str, ...], multiplied: bool
) -> tuple[list[str], list[str]]:
    """Statements that make h of x, and the sections that they need.

    Args:
        held, moved: template arguments of what computes, and of what loads and stores.
    """
    lines, sections = list[str](), list[str]()
    weigh = f"weight_row<{moved}>"
    if "beside" in inputs:
        sections += ["weighted", "add"]
        lines += [
            "threadgroup float start[8];",
            f"const float first_scale = inverse_rms<{held}>(v, row, numbers[4], start);",
            f"{weigh}(aside, numbers[5], row, first_scale, v);",
            f"add_row<{moved}>(beside, row, v);",
        ]
    if "post" in inputs:
        sections += ["weighted"]
        lines += [
            "threadgroup float before[8];",
            f"const float scale = inverse_rms<{held}>(v, row, numbers[2], before);",
            f"{weigh}(post, numbers[3], row, scale, v);",
        ]
    if multiplied:
        sections += ["plain"]
        lines += [f"scale_row<{held}>(float(static_cast<T>(numbers[2])), v);"]
    if "residual" in inputs:
        sections += ["add"]
        lines += [f"add_row<{moved}>(residual, row, v);"]
        if "factor" in inputs:
            sections += ["plain"]
            lines += [f"scale_row<{held}>(float(factor[0]), v);"]
        lines += [f"store_row<{moved}>(v, row, h);"]
    return lines, sections


@cache
def _program(
    pieces: int,
    whole: bool,
    inputs: tuple[str, ...],
    outputs: tuple[str, ...],
    multiplied: bool,
) -> Program:
    held = f"T, {pieces}"
    moved = f"{held}, {str(whole).lower()}"
    sections = ["store"] if {"h", "y"} & set(outputs) else []
    lines = [
        "threadgroup float partial[8];",
        "const ulong first = ulong(threadgroup_position_in_grid.x) * uint(columns);",
        "const Row row = {uint(columns), simdgroups_per_threadgroup, "
        "simdgroup_index_in_threadgroup, thread_index_in_simdgroup, first};",
        f"vec<T, 4> v[{pieces}];",
        f"load_row<{moved}>(x, row, v);",
    ]
    weigh = f"weight_row<{moved}>"
    before, needed = _before_the_norm(held, moved, inputs, multiplied)
    lines, sections = lines + before, sections + needed
    if outputs != ("h",):
        lines += [f"const float inverse = inverse_rms<{held}>(v, row, numbers[0], partial);"]
        for name in (name for name in outputs if name.startswith("y_")):
            sections += ["weighted", "other"]
            lines += [f"other_row<{moved}>({name[2:]}, numbers[1], row, inverse, v, {name});"]
        if "weight" in inputs:
            sections += ["weighted"]
            lines += [f"{weigh}(weight, numbers[1], row, inverse, v);"]
        else:
            sections += ["plain"]
            lines += [f"scale_row<{held}>(inverse, v);"]
    if "y" in outputs:
        lines += [f"store_row<{moved}>(v, row, y);"]
    groups = []
    if "codes" in outputs:
        groups, sections = ["quantize_int8.metal:codes"], [*sections, "codes"]
        lines += [f"quantize_row<{held}>(v, row, codes, scales, sums);"]
    return Program(
        op="rms_norm",
        inputs=(*inputs, "columns", "numbers"),
        outputs=outputs,
        body="\n".join(lines) + "\n",
        parts=(*groups, *(f"rms_norm.metal:{s}" for s in dict.fromkeys(sections))),
    )


def _reference(call: _Call) -> list[mx.array]:
    h = call.x
    if call.beside is not None:
        h = _normed(call, h, *call.beside[0][:3]) + call.beside[1]
    if isinstance(call.post, Post):
        h = _normed(call, h, *call.post[:3])
    elif call.post is not None:
        h = h * call.post
    h = h if call.residual is None else h + call.residual
    if isinstance(call.post, Post) and call.post.factor is not None:
        h = h * call.post.factor
    if not call.outputs:
        return [h]
    y = _normed(call, h, call.weight, call.eps, call.offset)
    found = {"h": h, "y": y}
    if "int8" in call.outputs:
        found |= zip(quantize_int8.OUTPUTS, quantize_int8.reference(y), strict=True)
    for name, weight in call.weights.items():
        found[f"y_{name}"] = _normed(call, h, weight, call.eps, call.offset)
    return [found[n] for n in call.names]


def _normed(
    call: _Call, x: mx.array, weight: mx.array | None, eps: float, offset: float
) -> mx.array:
    if weight is not None:
        weight = weight.astype(call.dtype)
        weight = offset + weight if offset else weight
    return mx.fast.rms_norm(x.astype(call.dtype), weight, eps)


def _small(call: _Call) -> tuple[_Call]:
    """A few random rows of the same length."""
    draw = normal(call.x.dtype)
    shape = min(call.x.size // call.columns, 8), call.columns
    small = replace(call, x=draw(*shape))
    if call.residual is not None:
        small = replace(small, residual=draw(*shape))
    if call.weight is not None:
        small = replace(small, weight=draw(call.columns))
    if isinstance(call.post, Post):
        factor = None if call.post.factor is None else draw(1)
        small = replace(small, post=call.post._replace(weight=draw(call.columns), factor=factor))
    if call.beside is not None:
        first = call.beside[0]._replace(weight=draw(call.columns))
        small = replace(small, beside=(first, draw(*shape)))
    return (replace(small, others=tuple(draw(call.columns) for _ in call.others)),)


KERNEL = Kernel("rms_norm", _launch, _refuse, _reference, _small)
