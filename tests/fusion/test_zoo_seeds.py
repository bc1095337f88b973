"""What is fused, and in which order, is the same in every process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SEEDS = 6

# mlx_lm itself, which would load transformers, stays out: it takes longer than all of this.
SCRIPT = """
import importlib.util, sys, types
package = types.ModuleType("mlx_lm")
package.__path__ = list(importlib.util.find_spec("mlx_lm").submodule_search_locations)
sys.modules["mlx_lm"] = package

from mlxfuse.fusion import Candidate, patch_model
from tests.fusion.configs import build

def rivals(tree):
    "Candidates of equal scores, of which each claims what others do too; a set has no order."
    paths = {path for path, _ in tree.modules if path.endswith("mlp")}
    nothing = lambda: None
    for path in paths:
        for name in {"b", "a", "c"}:
            claims = frozenset({f"{path}.down_proj", "model.layers.2.mlp.up_proj"})
            yield Candidate(name, 70, path, claims, nothing, nothing, "")

print({f"name {i}" for i in range(8)})
for name, form in ("llama", "affine4"), ("gpt_oss", "mxfp4"), ("gemma4_text", "float32"):
    for more in (), (rivals,):
        report = patch_model(build(name, form), fuse="all", detectors=more)
        # Reports are in the order in which detectors name their fusions.
        print(*sorted((c.name, c.path, c.formats) for c in report.fused), sep="\\n")
        print(*sorted(report.skipped), sep="\\n")
"""


def test_selection_does_not_depend_on_the_hash_seed() -> None:
    found: list[str] = []
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": root, "MLXFUSE_KERNELS": "reference"}
    for seed in range(SEEDS):
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT],
            env={**environment, "PYTHONHASHSEED": str(seed)},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        found.append(done.stdout)
    orders, selections = zip(*(text.split("\n", 1) for text in found), strict=True)
    assert len(set(orders)) > SEEDS / 2  # control: sets do come in other orders
    assert len(set(selections)) == 1
    assert "is fused there" in selections[0]
    assert "('qkv', 'model.layers.3.self_attn'" in selections[0]
