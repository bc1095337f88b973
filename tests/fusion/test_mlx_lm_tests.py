"""mlx-lm's own tests of its models pass on patched ones."""

import os
import re
import subprocess
import sys
from importlib.metadata import version

import pytest

SOURCE = os.environ.get("MLX_LM_TESTS", "")
# Models of a size that CI can hold; of the others' some take tens of gigabytes.
NAMES = ("test_llama", "test_qwen3", "test_qwen3_moe", "test_gpt_oss")


@pytest.mark.slow
@pytest.mark.skipif(
    not SOURCE,
    reason=f"mlx-lm's tests are in its source only: unpack that of mlx-lm {version('mlx-lm')} and "
    "name its folder tests in MLX_LM_TESTS",
)
def test_mlx_lms_own_tests_pass_on_patched_models():
    command = [sys.executable, "-m", "tests.fusion.mlx_lm_tests", SOURCE, *NAMES]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    tried, fused = map(int, re.findall(r"\d+", result.stdout.splitlines()[-1]))
    assert tried == fused == len(NAMES)
