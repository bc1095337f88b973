"""What moving a launch's bytes takes at least: ``metal/floor.metal``, for measuring."""

from __future__ import annotations

import math

import mlx.core as mx

from ..kernels.runtime.kernel import Launch, Program

_EACH = 4  # of 16 bytes, that a thread moves of the largest array


def floor(launch: Launch) -> Launch:
    """A dispatch that reads every input of another once, and writes as much as that writes.

    Arrays of less than 16 bytes are left out, and what is left of others beyond a multiple of 16.
    """
    held = [a for a in launch.arrays if a.nbytes >= 16]
    sizes = zip(launch.shapes, launch.dtypes, strict=True)
    written = -(-sum(math.prod(s) * d.size for s, d in sizes) // 16)
    counts = [a.nbytes // 16 for a in held]
    threads = 256 * -(-max([*counts, written]) // (256 * _EACH))
    names = [f"in{i}" for i in range(len(held))]
    place = "thread_position_in_grid.x, threads_per_grid.x"
    reads = [f"found ^= read_all({n}, counts[{i}], {place});" for i, n in enumerate(names)]
    lines = [
        "uint4 found = uint4(0);",
        *reads,
        f"write_all(out, found, counts[{len(held)}], {place});",
    ]
    return Launch(
        program=Program(
            op="floor",
            inputs=(*names, "counts"),
            outputs=("out",),
            body="\n".join(lines) + "\n",
            parts=("floor.metal",),
        ),
        arrays=(*held, mx.array([*counts, written], mx.uint32)),
        grid=(threads, 1, 1),
        threadgroup=(256, 1, 1),
        template=(),
        shapes=((4 * written,),),
        dtypes=(mx.uint32,),
    )
