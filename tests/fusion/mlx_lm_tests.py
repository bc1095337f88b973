"""mlx-lm's own tests of its models, each model patched before it is tried.

pip download --no-deps --no-binary :all: mlx-lm && tar xzf mlx_lm-*.tar.gz
python -m tests.fusion.mlx_lm_tests mlx_lm-X.Y.Z/tests [NAME ...]
"""

from __future__ import annotations

import os
import sys
import unittest
from typing import Any

from mlxfuse import patch_model

TRIED: list[bool] = []


def patched(run: Any) -> Any:
    """mlx-lm's ``model_test_runner``, for the model as `patch_model` makes it."""

    def runner(self: Any, model: Any, *arguments: Any) -> None:
        report = patch_model(model, fuse="all")
        TRIED.append(any(tally.fused for tally in report.tallies.values()))
        run(self, model, *arguments)

    return runner


def main(folder: str, *names: str) -> int:
    os.environ.setdefault("MLXFUSE_KERNELS", "reference")
    sys.path.insert(0, folder)
    import test_models

    cls = test_models.TestModels
    cls.model_test_runner = patched(cls.model_test_runner)
    load = unittest.defaultTestLoader
    suite = load.loadTestsFromNames(names, cls) if names else load.loadTestsFromTestCase(cls)
    result = unittest.TextTestRunner(verbosity=2).run(suite)
    print(f"models {len(TRIED)}, fused {sum(TRIED)}")
    return 0 if result.wasSuccessful() else 1


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
