"""Private arrays that are not all written before they are read: found without a run."""

from __future__ import annotations

import mlx.core as mx
import pytest

from tests import msl

HELPER = "inline void fill(thread float* v, int n) { for (int k = 0; k < n; k++) v[k] = k; }\n"
READ = "for (uint k = 0; k < 8; k++) sum += v[k];"
# Code that writes all of v[8], and the same with a bug.
FILLED = {
    "loop": ("for (uint k = 0; k < 8; k++) v[k] = k;", "for (uint k = 0; k < 7; k++) v[k] = k;"),
    "helper": ("fill(v, 8);", "fill(v, 7);"),
    "branch": (
        "if (lane > 3) fill(v, 8); else fill(v, 8);",
        "if (lane > 3) fill(v, 8);",
    ),
    "order of lanes": (
        "for (uint k = 0; k < 8; k++) v[(k + lane) % 8] = k;",
        "for (uint k = 0; k < 0; k++) v[(k + lane) % 8] = k;",
    ),
}


def errors(code):
    """What the lint finds in a kernel that runs ``code`` and then reads all of ``v``."""
    kernel = msl.metal_kernel(
        name="array",
        input_names=[],
        output_names=["y"],
        source=f"""
          const uint lane = thread_index_in_simdgroup;
          float v[8];
          float sum = 0;
          {code}
          {READ}
          y[lane] = sum;
        """,
        header=HELPER,
    )
    found = msl.capture(
        kernel,
        [],
        grid=(32, 1, 1),
        threadgroup=(32, 1, 1),
        output_shapes=[(32,)],
        output_dtypes=[mx.float32],
    )
    lines = ["", *found.source.splitlines()]
    findings = msl.check(found.source, found.name)
    return [(f.message, lines[f.line]) for f in findings if f.severity == "error"]


@pytest.mark.parametrize("name", FILLED)
def test_array_not_all_written(name):
    correct, broken = FILLED[name]
    assert errors(correct) == []
    ((message, line),) = errors(broken)
    assert message.endswith("[core.uninitialized.Assign]")
    assert READ in line


def test_an_array_written_as_vectors_is_not_reported():
    assert errors("for (uint k = 0; k < 8; k += 4) *(thread float4*)(v + k) = float4(k);") == []
