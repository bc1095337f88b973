"""The command for an NVIDIA GPU, as far as a machine without one can show it."""

from __future__ import annotations

import ctypes.util
import itertools

import pytest

from tests import msl
from tests.msl import cuda, gpu


@pytest.fixture
def some(monkeypatch):
    """A few of the variants, run by the bench in the GPU's place."""
    few = list(itertools.islice(gpu.variants(), 0, None, 12))
    monkeypatch.setattr(gpu, "variants", lambda: iter(few))
    monkeypatch.setattr(cuda, "cuda_kernel", msl.metal_kernel)
    return few


def test_variants_agree_with_their_references(some, capsys):
    assert gpu.check() == 0
    assert (
        capsys.readouterr().out
        == f"{len(some)} of {len(some)} variants agree with their reference\n"
    )


def test_a_wrong_result_is_counted_and_named(some, monkeypatch, capsys):
    whole = type(some[0]).reference
    first, last = some[0], some[-1]

    factors = {first: 1.01, last: float("nan")}

    def reference(variant):
        return [r * factors.get(variant, 1) for r in whole.fget(variant)]

    monkeypatch.setattr(type(first), "reference", property(reference))
    assert gpu.check() == 2
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{first}: error")
    assert lines[1] == f"{last}: error nan"


@pytest.mark.skipif(ctypes.util.find_library("cuda") is not None, reason="a GPU's driver is here")
def test_without_a_gpu_it_says_so(capsys):
    assert gpu.main() == 0
    assert capsys.readouterr().out.startswith("nothing was run: no NVIDIA GPU: ")
