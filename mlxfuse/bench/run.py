"""`mlxfuse bench MODEL`: stock MLX-LM beside mlxfuse in one run."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn

from .. import env
from ..errors import KernelError
from ..fusion import PatchReport, patch_model
from ..fusion.checks import Reference, logits
from ..fusion.dispatches import per_token
from ..gguf.exported import open_model
from ..hub.folders import is_checkpoint
from ..loader import load
from ..nn.kv.options import KVOptions, compress_caches
from .arms import Arm, Runner, compare, copy_of, decoded, nbytes, stock_of
from .doctor import device
from .machine import environment
from .measure import Test, alternate, speeds

STOCK, OURS = "mlx-lm", "mlxfuse"
_SEALED = 192  # tokens of which a compressed cache has compressed some
Say = Callable[[str], None]


class Extra(Protocol):
    """Another program that takes its turn, without a match: `LlamaBench`."""

    name: str
    what: str

    def __call__(self, test: Test) -> float:
        """Seconds of one run."""


def bench(
    path: Path,
    tests: Sequence[Test],
    *,
    repetitions: int,
    pause: float = 0.0,
    dtype: str | None = None,
    fuse: Sequence[str] = ("auto",),
    act_quant: str = "auto",
    stock: str = "exact",
    kv: KVOptions | None = None,
    kv_start: int = 0,
    kv_force: bool = False,
    extras: Sequence[Extra] = (),
    say: Say = lambda text: None,
    group: mx.distributed.Group | None = None,
    pipeline: bool = False,
) -> dict[str, Any]:
    """Compare, then time, both forms of a model; everything as plain data, ready for JSON.

    Bytes, nanoseconds (``_ns``) and tokens a second (``_ts``); ``read`` is what one decoded token
    reads, weights and cache, ``gb_s`` that by time, ``share`` that of ``bandwidth``;
    ``dispatches`` are those of one decoded token, on Metal.

    Args:
        path: a GGUF file, or a folder with an MLX-LM checkpoint.
        pause: seconds to cool down before every timed run.
        fuse: one arm for each; they share the model's weights.
        act_quant: as in `patch_model`. An arm with rounded activations is timed although it
            differs; how far is told.
        stock: what stock MLX-LM's weights are where MLX's types cannot hold the file's: ``exact``,
            dense ones, or ``affine``, requantised ones of about the same size.
        kv: how mlxfuse compresses its key-value cache, after ``kv_start`` tokens; mlx-lm's is
            plain. Outputs are compared with those of mlx-lm's attention on the same compressed
            cache, decompressed.
        kv_force: compress keys of models that are known to suffer from it.
        group: the ranks that share the model, stock MLX-LM's form of it too. Each must call this;
            bytes are those of this rank.
        pipeline: each rank has some layers, as of `load`.

    Raises:
        KernelError: kernels are emulated, whose time means nothing.
        MLXFuseError: the forms disagree; nothing is timed then.
    """
    from mlx_lm.generate import wired_limit

    compress = Compress(kv, kv_start, kv_force)
    how: dict[str, Any] = {
        "dtype": dtype,
        "group": group,
        "pipeline": pipeline and group is not None,
    }
    arms, matches, vocabulary = _compared(path, how, fuse, act_quant, stock, compress, say)
    if env.get("MLXFUSE_KERNELS") == "emulated":
        raise KernelError(
            f"outputs agree to {matches[-1]['error']:.2g}, but emulated kernels are not timed: "
            "that would measure the emulation"
        )
    if kv is not None:
        del arms[0].model.make_cache
        for arm in arms[1:]:
            compress_caches(arm.model, kv, kv_start, force=kv_force)
    say("measuring the machine's bandwidth")
    found: dict[str, Any] = {
        "bench": "model",
        "environment": environment(),
        "model": about(path, arms[0].model),
        "repetitions": repetitions,
        "pause": pause,
        "arms": [
            *(
                {"name": arm.name, "what": arm.what, "kv": asdict(kv) if kv and i else None, **how}
                for i, (arm, how) in enumerate(zip(arms, matches, strict=True))
            ),
            *({"name": e.name, "what": e.what, "match": "-", "error": None} for e in extras),
        ],
        "dispatches": _dispatches(arms),
        "rows": [],
    }
    with wired_limit(arms[-1].model):
        for test in tests:
            say(f"timing {test.name}")
            found["rows"] += _rows(test, arms, extras, vocabulary, found, repetitions, pause)
    return found


@dataclass(frozen=True, slots=True)
class Compress:
    """How mlxfuse's arms compress their caches: see the arguments of `bench`."""

    kv: KVOptions | None
    start: int
    force: bool

    def __call__(self, *models: nn.Module) -> None:
        """Let the models make compressed caches, if any are to be, from the first token on."""
        if self.kv is not None:
            for model in models:
                compress_caches(model, self.kv, force=self.force)


def _compared(
    path: Path,
    how: Mapping[str, Any],
    fuse: Sequence[str],
    act_quant: str,
    stock: str,
    compress: Compress,
    say: Say,
) -> tuple[list[Arm], list[dict[str, Any]], int]:
    """The arms, stock first, how each matches, and the size of the vocabulary.

    Args:
        how: arguments of `load_model`.
    """
    say(f"loading {path.name}")
    model, vocabulary = load_model(path, **how)
    models = [model, *(copy_of(model) for _ in fuse[1:])]
    left = device()["budget"] - mx.get_active_memory()
    other, weights = stock_of(model, requantize=stock == "affine", budget=left)
    compress(other, *models)
    kv, before = compress.kv, _SEALED if compress.kv else 0
    # Requantised weights are other numbers: kernels are held to the file's, decoded.
    exact = stock == "exact"
    where = f"; shared by {how['group'].size()} ranks" if how["group"] is not None else ""
    where += ", in a pipeline" if where and how["pipeline"] else ""
    reference = Reference(logits(other, before), before) if exact else decoded(model, before)
    arms = [Arm(STOCK, f"mlx-lm's classes, MLX's operations, {weights}{where}", other)]
    matches = [_match(reference, other, weights)]
    for model, choice in zip(models, fuse, strict=True):
        words = [OURS, kv.name if kv else "", choice if len(fuse) > 1 else ""]
        name = " ".join(filter(None, [*words, "int8" if act_quant == "on" else ""]))
        patch = patch_model(model, fuse=choice, act_quant=act_quant)
        what = _describe(model, patch) + (f"; its {kv}" if kv else "") + where
        arms.append(Arm(name, what, model, compress.start if kv else 0))
        say("comparing outputs")
        matches.append(_agreement(reference, model, rounded=act_quant == "on"))
    return arms, matches, vocabulary


def load_model(path: Path, dtype: str | None, **how: Any) -> tuple[nn.Module, int]:
    """The model, not fused, and the size of its vocabulary.

    Args:
        how: more arguments of `load`.
    """
    model, tokenizer = load(path, dtype=dtype, fuse="off", **how)
    return model, tokenizer.vocab_size


def _describe(model: nn.Module, patch: PatchReport) -> str:
    types = ", ".join(dict.fromkeys(str(patch).splitlines()))
    where = "on Metal" if mx.default_device() == mx.gpu else "on the CPU, without kernels"
    return f"mlxfuse {where}: {types}"


def _match(reference: Reference, stock: nn.Module, weights: str) -> dict[str, Any]:
    if "requantised" not in weights:
        return {"match": "reference", "error": 0.0}
    return {"match": "no, requantised", "error": reference.compare(stock).typical}


def _agreement(reference: Reference, model: nn.Module, *, rounded: bool) -> dict[str, Any]:
    """How far the arm is from the reference, which must be near unless it rounds activations."""
    if rounded:
        return {"match": "no, int8", "error": reference.compare(model).typical}
    return {"match": "yes", "error": compare(reference, model).error}


def _dispatches(arms: Sequence[Arm]) -> dict[str, int]:
    """Of one decoded token, on Metal; counted in the graph."""
    if mx.default_device() != mx.gpu:
        return {}
    return {arm.name: per_token(arm.model)[1] for arm in arms}


def _rows(
    test: Test,
    arms: Sequence[Arm],
    extras: Sequence[Extra],
    vocabulary: int,
    found: dict[str, Any],
    repetitions: int,
    pause: float,
) -> list[dict[str, Any]]:
    runners = {arm.name: Runner(arm, test, vocabulary) for arm in arms}
    for runner in runners.values():
        runner.warm_up()
    turns: dict[str, Callable[[], float]] = {**runners}
    turns |= {extra.name: partial(extra, test) for extra in extras}
    taken = alternate(turns, repetitions, pause=pause)
    rows = []
    for name, times in taken.items():
        measured = speeds(test, times)
        runner_of = runners.get(name)
        row = row_of(name, test, measured)
        if runner_of is not None:
            row["memory"] = runner_of.memory
            if runner_of.read is not None:
                row["dispatches"] = found["dispatches"].get(name)
                rate = runner_of.read * row["median_ts"]
                row |= {
                    "read": round(runner_of.read),
                    "gb_s": rate / 1e9,
                    "share": rate / found["environment"]["bandwidth"],
                }
        rows.append(row)
    return rows


def row_of(name: str, test: Test, measured: dict[str, Any]) -> dict[str, Any]:
    """A row of one arm; what is not known of it is None."""
    sizes = {"n_prompt": test.prompt, "n_gen": test.generated, "n_depth": test.depth}
    unknown = dict.fromkeys(("memory", "read", "gb_s", "share", "dispatches"))
    return {"arm": name, "test": test.name, **sizes, **measured, **unknown}


def about(path: Path, model: nn.Module | None = None) -> dict[str, Any]:
    """What the model is, under llama-bench's names; ``model_size`` in bytes of its tensors.

    Args:
        model: needed for an MLX-LM checkpoint only.
    """
    if is_checkpoint(path):
        from mlx_lm.utils import get_total_parameters

        kind = str(getattr(getattr(model, "args", None), "model_type", ""))
        size, count = nbytes(model), get_total_parameters(model)
    else:
        with open_model(path) as file:
            tensors = file.tensors.values()
            kind = file.architecture
            size = sum(t.nbytes for t in tensors)
            count = sum(math.prod(t.shape) for t in tensors)
    return {
        "model_filename": path.name,
        "model_type": kind,
        "model_size": size,
        "model_n_params": count,
    }
