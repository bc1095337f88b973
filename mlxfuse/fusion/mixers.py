"""Mamba-2 mixers: where they are, and what is fused of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import mlx.core as mx
import mlx.nn as nn

from ..errors import NotFusible
from ..nn.mamba2 import FusedMamba2, Mamba2Form
from ..nn.snapshot import Snapshot
from .bodies.mambas import MIXER
from .candidates import Candidate, Skip, Tree, register_detector
from .certify import certify, certify_method
from .emit import Piece, candidate, same
from .forms import has
from .places import joined


@register_detector("ssm")
def _ssm(tree: Tree) -> Iterator[Candidate | Skip]:
    """What a mixer does with a decoded token in five dispatches."""
    for path, module in tree.modules:
        if has(module, "in_proj", "conv1d", "norm", "out_proj") and hasattr(module, "dt_bias"):
            try:
                yield _place(tree, path, module)
            except NotFusible as reason:
                yield Skip("ssm", path, str(reason))


def _place(tree: Tree, path: str, module: nn.Module) -> Candidate:
    form = _form(module)
    names = ("conv1d", "norm")
    tree.check_alone(module, names)
    heads = module.num_heads
    rows = (module.intermediate_size, module.conv_dim, heads)
    pieces = [Piece(module, FusedMamba2, form, "steps", same(_steps(module)))]
    formats: tuple[str, ...] = ()
    if not isinstance(module.in_proj, nn.Linear):  # MLX splits a dense one's result itself
        make, formats = joined(tree, module, ("in_proj",), rows)
        pieces.append(Piece(module, FusedMamba2, form, "parts", make))
    explain = f"convolution, step and norm of {path} in one dispatch each"
    return candidate("ssm", 60, path, names, pieces, explain, formats)


def _form(module: nn.Module) -> Mamba2Form:
    for name, bodies in MIXER.items():
        if name in vars(module):
            raise NotFusible(f"its {name} is not that of its class")
        certify_method(type(module), name, bodies)
    norm = module.norm
    found = certify(type(norm), "group_norm").names
    inner = module.intermediate_size
    size = getattr(norm, found["SIZE"]) if "SIZE" in found else inner
    if size < 1 or inner % size or norm.weight.shape != (inner,):
        raise NotFusible("its norm is not of equal groups")
    return Mamba2Form(type(module), getattr(norm, found["EPS"]), inner // size)


def _steps(module: nn.Module) -> Snapshot:
    """What the kernels read of a mixer."""
    conv, norm = module.conv1d, module.norm
    weight = conv.get("weight")
    if type(conv) is not nn.Conv1d or not isinstance(weight, mx.array):
        raise NotFusible(f"its convolution is {type(conv).__name__}")
    plain = (conv.stride, conv.padding, conv.dilation, conv.groups) == (1, 0, 1, len(weight))
    if not plain or weight.shape != (module.conv_dim, module.conv_kernel_size, 1):
        raise NotFusible("its convolution is not one of each channel alone")
    held: list[tuple[Callable[[str], object], str]] = [
        *((module.get, name) for name in ("conv1d", "norm", "A_log", "dt_bias", "D")),
        *((conv.get, name) for name in ("weight", "bias")),
        (norm.get, "weight"),
    ]
    return Snapshot(held)
