"""What the gated delta nets with a known body are, and which of their linears go together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby

import mlx.core as mx
import mlx.nn as nn

from ..errors import NotFusible
from ..nn.delta_net import GatedDeltaForm
from ..nn.join_linears import describe
from ..nn.snapshot import Snapshot
from .certify import Match, certify, is_known
from .forms import check_modules, has


def gated_delta_form(module: nn.Module, match: Match) -> GatedDeltaForm:
    """The variant of gated delta net that a module with a known body has."""
    names = tuple(match.names[slot] for slot in match.form["linears"])
    check_modules(module, *names, match.names["OUT"])
    tiled = has(module, "norm") and is_known(type(module.norm), "gated_norm")
    return GatedDeltaForm(
        type(module),
        together(module, names),
        inputs=names,
        output=match.names["OUT"],
        tiled=tiled and certify(type(module.norm), "gated_norm").form["tiled"],
    )


def together(module: nn.Module, linears: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    """Those that are neighbours and of one kind."""
    runs = [tuple(run) for _, run in groupby(linears, lambda one: describe(module[one]))]
    return tuple(run for run in runs if len(run) > 1)


def recurrence(module: nn.Module) -> Snapshot:
    """What the kernels of a gated delta net read of it."""
    check_modules(module, "conv1d", "norm")
    conv, norm = module.conv1d, module.norm
    own = certify(type(norm), "gated_norm").names
    weight = conv.get("weight")
    if type(conv) is not nn.Conv1d or not isinstance(weight, mx.array):
        raise NotFusible(f"its convolution is {type(conv).__name__}")
    plain = (conv.stride, conv.padding, conv.dilation, conv.groups) == (1, 0, 1, len(weight))
    if not plain or weight.shape[2] != 1:
        raise NotFusible("its convolution is not one of each channel alone")
    if own["WEIGHT"] != "weight" or own["EPS"] != "eps":
        raise NotFusible("its norm has other names")
    held: list[tuple[Callable[[str], object], str]] = [
        *((module.get, name) for name in ("conv1d", "norm", "A_log", "dt_bias")),
        *((conv.get, name) for name in ("weight", "bias")),
        *((norm.get, "weight"), (vars(norm).get, "eps")),
    ]
    return Snapshot(held)
