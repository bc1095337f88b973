"""Int8 activations: where every reader of a norm takes them, in a model that is fused already."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from ..kernels.int8_matmul import unsupported
from ..nn.attention import FusedAttention
from ..nn.mlp import BlockForm, FusedBlock, FusedMLP
from ..nn.norm import Int8Norm
from ..nn.projection import KernelProjection, Projection
from .candidates import Candidate, Skip, Tree
from .forms import norm_options

NAME = "int8"


def places(tree: Tree) -> Iterator[Candidate | Skip]:
    """The norms, and the inputs of o and down, of each decoder layer."""
    for path, module in tree.modules:
        if not isinstance(module, FusedBlock):
            continue
        form: BlockForm = module._fused
        mixer, mlp = module[form.mixer], module[form.mlp]
        whole = None
        if not isinstance(mlp, FusedMLP):
            whole = f"{type(mlp).__name__} reads floats"
        elif not (isinstance(mixer, FusedAttention) and form.mixer_adds and form.mlp_adds):
            whole = "the additions of its layer are not fused"
        for second, name in enumerate(form.norms):
            reader = None if whole else (mlp._fused.up if second else mixer._fused.qkv)
            found = norm_options(module[name])
            reason = whole or _refusal(reader) or (found if isinstance(found, str) else None)
            if reason or isinstance(found, str):
                yield Skip(NAME, f"{path}.{name}", reason or "")
                continue
            emit = _setter(form.int8, bool(second), Int8Norm(module, name, **found))
            yield _candidate(f"{path}.{name}", emit, _remover(form.int8, bool(second)))
        for child, name, projection in (
            (form.mixer, "o", None if whole else mixer._fused.o),
            (form.mlp, "down", None if whole else mlp._fused.down),
        ):
            place = f"{path}.{child}.{name}"
            reason = whole or _refusal(projection)
            if reason:
                yield Skip(NAME, place, reason)
                continue
            linears = form.int8_linears
            yield _candidate(place, _adder(linears, name), _discarder(linears, name))


def _refusal(reader: Projection | None) -> str | None:
    """Why a reader does not take int8 activations, or None."""
    if not isinstance(reader, KernelProjection):
        return "what reads it has no kernel or is not fused"
    return unsupported(reader.weight)


def _candidate(path: str, emit: Callable[[], None], undo: Callable[[], None]) -> Candidate:
    explain = f"{path} gives int8 activations"
    return Candidate(NAME, 30, path, frozenset(), frozenset({path}), emit, undo, explain)


def _setter(held: dict[bool, Int8Norm], key: bool, value: Int8Norm) -> Callable[[], None]:
    return lambda: held.update({key: value})


def _remover(held: dict[bool, Int8Norm], key: bool) -> Callable[[], None]:
    def remove() -> None:
        held.pop(key, None)

    return remove


def _adder(held: set[str], name: str) -> Callable[[], None]:
    return lambda: held.add(name)


def _discarder(held: set[str], name: str) -> Callable[[], None]:
    return lambda: held.discard(name)
