"""What Metal would have compiled, where there is none."""

from __future__ import annotations

from typing import Any

import mlx.core as mx


class Compiled:
    """In the place of `mx.fast.metal_kernel`: zeros, and what Metal would have compiled."""

    def __init__(self) -> None:
        self.programs: set[object] = set()

    def __call__(self, **what: Any) -> Any:
        text = what["name"], what["source"], what["header"]

        def launch(inputs: Any, output_shapes: Any, output_dtypes: Any, template: Any, **_: Any):
            small = tuple(a.size < 8 for a in inputs)
            self.programs.add((text, tuple(template), small))
            zeros = [mx.zeros(s, d) for s, d in zip(output_shapes, output_dtypes, strict=True)]
            return list(mx.depends(zeros, inputs))

        return launch
