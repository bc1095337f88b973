"""``mlxfuse tune``."""

from __future__ import annotations

import json
import sys
from contextlib import redirect_stdout
from dataclasses import asdict
from typing import Annotated

from ..terminal import one_line
from . import _options as opt
from ._common import command
from ._models import before_imports
from .progress import status_line


@command("Measure", "mlxfuse tune model-Q4_K_M.gguf")
def tune_command(
    model: opt.Model,
    out: opt.Output,
    dtype: opt.Type = None,
    repetitions: Annotated[
        int,
        opt.of_tests("Runs of each, in turns.", "--repetitions", "-r", min=2, max=1000),
    ] = 10,
    delay: opt.Delay = 0.0,
) -> None:
    """Measure which kernel variants and which fusions are the fastest here, and use those.

    The winners' names go to tuning.json in the cache folder; delete it to forget them.
    """
    before_imports()
    with redirect_stdout(sys.stderr), status_line(True) as say:
        from ..bench import tune as engine
        from ..bench.kernels import on_device
        from ..bench.run import load_model
        from ..kernels.runtime import tuning

        on_device("tune measures")  # before anything is fetched
        path = model.fetch()
        say(f"loading {path.name}")
        loaded, _ = load_model(path, dtype and dtype.value)
        found = engine.tune(loaded, repetitions=repetitions, pause=delay, say=say)
        say(None)
    if out.as_json:
        stored = asdict(found.winners)
        print(json.dumps({"file": str(tuning.path()), **stored, "seconds": found.times}))
        return
    names = dict(found.winners.fusions)
    for cases in found.winners.variants.values():
        names |= cases
    for case, name in names.items():
        times = ", ".join(f"{n} {t * 1e6:.1f} us" for n, t in found.times[case].items())
        print(f"{one_line(case)}: {name} ({times})")
    print(f"stored in {tuning.path()}; delete it to forget")
