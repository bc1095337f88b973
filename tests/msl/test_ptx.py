"""The route to an NVIDIA GPU: same source, same front end, another target."""

from __future__ import annotations

import mlx.core as mx
import pytest

from tests import msl
from tests.msl import ptx
from tests.msl.test_bench import RMS_NORM


def rms_norm(source):
    kernel = msl.metal_kernel(
        name="rms_norm", input_names=["x", "w", "eps"], output_names=["y"], source=source
    )
    return msl.capture(
        kernel,
        [mx.zeros((2, 256)), mx.zeros((256,)), mx.array(1e-5)],
        template=[("T", mx.bfloat16)],
        grid=(128, 1, 1),
        threadgroup=(64, 1, 1),
        output_shapes=[(2, 256)],
        output_dtypes=[mx.bfloat16],
    )


def test_a_kernel_becomes_ptx():
    try:
        ptx.libdevice()
    except msl.MslSetupError as e:
        pytest.skip(str(e))
    found = rms_norm(RMS_NORM)
    text = ptx.compile_ptx(found.source, found.name)
    assert f".entry {ptx.ENTRY}(" in text
    assert "shfl.sync" in text
    assert "bar.sync" in text or "barrier.sync" in text
    unsynchronised = rms_norm(
        RMS_NORM.replace("threadgroup_barrier(mem_flags::mem_threadgroup);", "")
    )
    text = ptx.compile_ptx(unsynchronised.source, unsynchronised.name)
    assert "bar.sync" not in text
    assert "barrier.sync" not in text
    broken = rms_norm(RMS_NORM.replace("if (lane ==", "if (lanes =="))
    with pytest.raises(msl.MslCompileError, match="undeclared identifier 'lanes'"):
        ptx.compile_ptx(broken.source, broken.name)
