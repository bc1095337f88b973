"""The demo model, run through its Metal source on the CPU, says what the reference path says."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import mlx.core as mx
import pytest
from mlx_lm.generate import generate_step

from mlxfuse.generate import run as generate
from mlxfuse.kernels import fallbacks, launches
from mlxfuse.loader import load

ROOT = Path(__file__).parent.parent


def greedy(demo: Path, count: int) -> list[int]:
    model, tokenizer = load(demo)
    prompt = generate.encode_prompt(tokenizer, generate.Settings(prompt="hello"))
    steps = generate_step(mx.array(prompt), model, max_tokens=count)
    return [int(token) for token, _ in steps]


@pytest.mark.slow
def test_the_first_tokens_are_the_reference_paths(
    demo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    want = greedy(demo, 8)
    monkeypatch.setenv("MLXFUSE_KERNELS", "emulated")
    launches.clear()  # other tests launch too
    fallbacks.clear()
    start = time.perf_counter()
    got = greedy(demo, 8)
    seconds = time.perf_counter() - start
    assert got == want
    assert seconds < 180
    # 30 layers of four and the head, in the prompt and in each token after the first.
    assert launches["quantized_matmul"] >= 8 * (4 * 30 + 1)
    assert not fallbacks


@pytest.mark.slow
def test_the_command_says_what_ran(demo: Path) -> None:
    found = subprocess.run(
        [sys.executable, "-m", "mlxfuse", "generate", str(demo), "-m", "2"],
        capture_output=True,
        text=True,
        timeout=180,
        check=True,
        cwd=ROOT,
        env={**os.environ, "MLXFUSE_KERNELS": "emulated"},
    )
    pattern = (
        r"Kernels emulated on the CPU: dequantize\.metal \d+ times, "
        r"norm_rope\.metal \d{2,} times, quantized_matmul\.metal \d{3,} times"
    )
    assert re.search(pattern, found.stderr)
    assert found.stdout.startswith("Hello!")
