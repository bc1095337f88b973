"""The fusions of this package: where their places are, and what is done there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import groupby
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..nn.attention import AttentionForm, FusedAttention, FusedSharedAttention
from ..nn.block import FusedBlock
from ..nn.delta_net import DeltaNetForm, FusedDeltaNet
from ..nn.embedding import EmbeddingForm, FusedEmbedding
from ..nn.fused import Form, FusedModule, adopt, release
from ..nn.join_linears import (
    copies,
    cut,
    describe,
    embedding_rows,
    experts_refusal,
    format_of,
    join,
    join_experts,
    refusal,
    single,
)
from ..nn.linear import PLAIN
from ..nn.mlp import FusedMLP, MLPForm
from ..nn.moe import FusedExperts, FusedMoE, MoEForm
from ..nn.norm import FusedNorm
from ..nn.projection import Projection
from .candidates import Candidate, Skip, Tree, register_detector
from .certify import Match, certify, summing
from .forms import (
    attention_form,
    block_form,
    experts_form,
    has,
    mlp_form,
    norm_options,
    rotation,
    row_count,
)

# (module, class, form, name of the piece, what makes it)
_Piece = tuple[nn.Module, type[FusedModule], Form, str, Callable[[], Any]]


def _emit(pieces: list[_Piece]) -> None:
    for module, mixin, form, name, make in pieces:
        held = adopt(module, mixin, form)
        if not getattr(held, name):
            setattr(held, name, make())


def _undo(pieces: list[_Piece]) -> None:
    for module, _, form, name, _ in pieces:
        held = vars(module).get("_fused")
        if held is not None:
            setattr(held, name, getattr(type(form), name))
            release(module)


def _candidate(
    name: str,
    score: float,
    path: str,
    absorbed: list[str],
    pieces: list[_Piece],
    explain: str,
    formats: tuple[str, ...] = (),
) -> Candidate:
    return Candidate(
        name,
        score,
        path,
        frozenset(),
        frozenset(_below(path, child) for child in absorbed),
        lambda: _emit(pieces),
        lambda: _undo(pieces),
        explain,
        formats,
    )


def _same(value: Any) -> Callable[[], Any]:
    return lambda: value


def _below(path: str, child: str) -> str:
    return f"{path}.{child}" if path else child


def _attention_class(form: AttentionForm) -> type[FusedAttention]:
    return FusedSharedAttention if form.shares else FusedAttention


@register_detector("qkv")
def _qkv(tree: Tree) -> Iterator[Candidate | Skip]:
    """Q, k and v in one dispatch, or their one matrix with three results."""
    for path, module in tree.modules:
        match = certify(type(module), "attention")
        if isinstance(match, str):
            if has(module, "q_proj", "k_proj", "v_proj") or has(module, "qkv_proj"):
                yield Skip("qkv", path, match)
            continue
        form = attention_form(module, match)
        if isinstance(form, str):
            yield Skip("qkv", path, form)
            continue
        if len(form.rows) == 1:
            continue
        made = _joined(tree, module, form.linears, form.rows)
        if isinstance(made, str):
            yield Skip("qkv", path, made)
            continue
        make, formats = made
        piece = (module, _attention_class(form), form, "qkv", make)
        explain = f"{', '.join(form.linears)} of {path} in one dispatch"
        yield _candidate("qkv", 80, path, list(form.linears), [piece], explain, formats)


def _looks_gated(module: nn.Module) -> bool:
    return has(module, "gate_proj", "up_proj") or has(module, "gate_up_proj")


@register_detector("gate_up")
def _gate_up(tree: Tree) -> Iterator[Candidate | Skip]:
    """``act(gate) * up`` in one dispatch."""
    for path, module in tree.modules:
        match = certify(type(module), "mlp")
        if isinstance(match, str):
            switch = isinstance(certify(type(module), "experts"), Match)
            if not switch and _looks_gated(module):
                yield Skip("gate_up", path, match)
            continue
        form = mlp_form(module, match)
        if isinstance(form, str):
            yield Skip("gate_up", path, form)
            continue
        if form.activation in PLAIN:
            continue
        rows = [row_count(module[name]) for name in form.linears]
        if len(rows) == 1:
            rows = [rows[0] // 2] * 2
        made = _joined(tree, module, form.linears, rows)
        if isinstance(made, str):
            yield Skip("gate_up", path, made)
        elif rows[0] != rows[1]:
            yield Skip("gate_up", path, f"gate has {rows[0]} rows and up {rows[1]}")
        else:
            make, formats = made
            piece = (module, FusedMLP, form, "up", make)
            explain = f"{form.activation} of {' and '.join(form.linears)} of {path} in one dispatch"
            yield _candidate("gate_up", 70, path, list(form.linears), [piece], explain, formats)


@register_detector("experts")
def _experts(tree: Tree) -> Iterator[Candidate | Skip]:
    """``act(gate) * up`` of the chosen experts in one dispatch."""
    for path, module in tree.modules:
        match = certify(type(module), "experts")
        if isinstance(match, str):
            continue
        form = experts_form(module, match)
        if isinstance(form, str):
            yield Skip("experts", path, form)
            continue
        names = list(form.linears)
        made = _experts_joined(tree, module, names)
        if isinstance(made, str):
            yield Skip("experts", path, made)
            continue
        make, formats = made
        explain = f"{form.activation} of {' and '.join(names)} of {path} in one dispatch"
        piece = (module, FusedExperts, form, "up", make)
        yield _candidate("experts", 70, path, names, [piece], explain, formats)


def _experts_joined(
    tree: Tree, module: nn.Module, names: list[str]
) -> tuple[Callable[[], Projection], tuple[str, ...]] | str:
    """`_joined` for switch linears."""
    linears = [module[name] for name in names]
    reason = tree.shared(module, names, arrays=False) or experts_refusal(linears)
    if reason is not None:
        return reason
    return partial(join_experts, module, names), tuple(format_of(x) for x in linears)


@register_detector("experts_sum")
def _experts_sum(tree: Tree) -> Iterator[Candidate | Skip]:
    """The sum over a token's experts, by the router's scores, where down is multiplied."""
    for path, module in tree.modules:
        held = {n: c for n, c in module.children().items() if isinstance(c, nn.Module)}
        known = {n: certify(type(c), "experts") for n, c in held.items()}
        if not any(isinstance(match, Match) for match in known.values()):
            continue
        found = summing(type(module))
        if isinstance(found, str):
            yield Skip("experts_sum", path, found)
            continue
        name, body = found
        match = known.get(name, f"{name} is no module")
        form = match if isinstance(match, str) else experts_form(held[name], match)
        if isinstance(form, str):
            yield Skip("experts_sum", path, form)
            continue
        shared = tree.shared(module, [name], arrays=False)
        made = shared or _experts_joined(tree, held[name], [form.output])
        if isinstance(made, str):
            yield Skip("experts_sum", path, made)
            continue
        make, formats = made
        pieces: list[_Piece] = [
            (held[name], FusedExperts, form, "down", make),
            (module, FusedMoE, MoEForm(type(module), name, body), "sums", _same(True)),
        ]
        output = f"{name}.{form.output}"
        explain = f"the sum over experts of {path} in {output}"
        yield _candidate("experts_sum", 55, path, [output], pieces, explain, formats)


@register_detector("activation")
def _activation(tree: Tree) -> Iterator[Candidate | Skip]:
    """The activation of an MLP without a gate, where its linear is multiplied."""
    for path, module in tree.modules:
        match = certify(type(module), "mlp")
        form = match if isinstance(match, str) else mlp_form(module, match)
        if isinstance(form, str) or form.activation not in PLAIN:
            continue
        (name,) = form.linears
        made = tree.shared(module, [name], arrays=False) or single(module, name)
        if isinstance(made, str):
            yield Skip("activation", path, made)
            continue
        piece = (module, FusedMLP, form, "up", _same(made))
        explain = f"{form.activation} of {name} of {path} in one dispatch"
        yield _candidate("activation", 60, path, [name], [piece], explain, made.formats)


@register_detector("residual")
def _residual(tree: Tree) -> Iterator[Candidate | Skip]:
    """The additions of a decoder layer, where o and down are multiplied."""
    for path, module in tree.modules:
        match = certify(type(module), "block")
        if isinstance(match, str):
            if has(module, "self_attn", "mlp"):
                yield Skip("residual", path, match)
            continue
        form = block_form(module, match)
        if isinstance(form, str):
            yield Skip("residual", path, form)
            continue
        if reason := tree.shared(module, []):
            yield Skip("residual", path, reason)
            continue
        adding = [("mixer_adds", form.mixer), ("mlp_adds", form.mlp)]
        found = [_adder(tree, module[child], child) for _, child in adding]
        pieces: list[_Piece] = []
        absorbed = []
        for (flag, child), made in zip(adding, found, strict=True):
            if not isinstance(made, str):
                output, piece = made
                absorbed.append(f"{child}.{output}")
                pieces += [piece, (module, FusedBlock, form, flag, _same(True))]
        if pieces:
            explain = f"residual of {path} added in {' and '.join(absorbed)}"
            yield _candidate("residual", 50, path, absorbed, pieces, explain)
        else:
            yield Skip("residual", path, "; ".join(made for made in found if isinstance(made, str)))


@register_detector("norm_rope")
def _norm_rope(tree: Tree) -> Iterator[Candidate | Skip]:
    """The norms of q and k and the rotary embedding of both in one dispatch."""
    for path, module in tree.modules:
        match = certify(type(module), "attention")
        form = match if isinstance(match, str) else attention_form(module, match)
        if isinstance(form, str) or not form.rope:
            continue  # the reason is given by qkv
        made = tree.shared(module, []) or rotation(module, form)
        if isinstance(made, str):
            yield Skip("norm_rope", path, made)
            continue
        piece = (module, _attention_class(form), form, "rotation", _same(made))
        names = [*(form.norms if form.norm else ()), form.rope]
        explain = f"{', '.join(names)} of {path} in one dispatch"
        yield _candidate("norm_rope", 65, path, names, [piece], explain)


def _adder(tree: Tree, module: nn.Module, name: str) -> tuple[str, _Piece] | str:
    """The last linear of an attention or MLP, and what lets it add; or why it cannot."""
    form: AttentionForm | MLPForm | str
    attention = certify(type(module), "attention")
    mlp = certify(type(module), "mlp")
    if not isinstance(attention, str):
        form = attention_form(module, attention)
    else:
        form = f"{name}: {mlp}" if isinstance(mlp, str) else mlp_form(module, mlp)
    if isinstance(form, str):
        return form
    made = tree.shared(module, [form.output], arrays=False) or single(module, form.output)
    if isinstance(made, str):
        return f"{name}: {made}"
    if isinstance(form, AttentionForm):
        return form.output, (module, _attention_class(form), form, "o", _same(made))
    return form.output, (module, FusedMLP, form, "down", _same(made))


def _joined(
    tree: Tree, module: nn.Module, names: tuple[str, ...], rows: Any
) -> tuple[Callable[[], Projection], tuple[str, ...]] | str:
    """What makes one projection of the linears, with their formats; or why there is none."""
    if len(names) == 1:
        whole = tree.shared(module, names, arrays=False) or cut(module, names[0], rows)
        return whole if isinstance(whole, str) else (_same(whole), whole.formats)
    linears = [module[name] for name in names]
    reason = tree.shared(module, names, arrays=False) or refusal(linears)
    if reason is None and copies(linears):
        reason = tree.shared(module, names)
    if reason is not None:
        return reason
    return lambda: join(module, names), tuple(format_of(x) for x in linears)


@register_detector("add_rms_norm")
def _add_rms_norm(tree: Tree) -> Iterator[Candidate | Skip]:
    """The first addition of a decoder layer with the norm behind it, where attention cannot add."""
    for path, module in tree.modules:
        match = certify(type(module), "block")
        form = match if isinstance(match, str) else block_form(module, match)
        if isinstance(form, str) or not isinstance(_adder(tree, module[form.mixer], ""), str):
            continue
        name = form.norms[1]
        found = tree.shared(module, [name]) or norm_options(module[name])
        if isinstance(found, str):
            yield Skip("add_rms_norm", path, found)
            continue
        piece = (module, FusedBlock, form, "second", _same(FusedNorm(module, name, **found)))
        explain = f"the addition before {name} of {path} in its dispatch"
        yield _candidate("add_rms_norm", 45, path, [name], [piece], explain)


@register_detector("in_proj")
def _in_proj(tree: Tree) -> Iterator[Candidate | Skip]:
    """The linears of a gated delta net's input in one dispatch; dense ones are in another."""
    for path, module in tree.modules:
        match = certify(type(module), "delta_net")
        if isinstance(match, str):
            if has(module, "in_proj_ba") or has(module, "in_proj_qkv", "in_proj_z"):
                yield Skip("in_proj", path, match)
            continue
        linears = [match.names[slot] for slot in match.body.form["linears"]]
        kinds = [describe(module[name]) for name in linears]
        runs = [
            tuple(name for _, name in run)
            for _, run in groupby(zip(kinds, linears, strict=True), lambda pair: pair[0])
        ]
        together = tuple(run for run in runs if len(run) > 1)
        made = [_joined(tree, module, run, None) for run in together]
        reasons = [m for m in made if isinstance(m, str)]
        if reasons or not made:
            reason = refusal([module[n] for n in linears])
            yield Skip("in_proj", path, reasons[0] if reasons else str(reason))
            continue
        makes, formats = zip(*made, strict=True)
        form = DeltaNetForm(type(module), together)
        piece = (module, FusedDeltaNet, form, "joined", lambda ms=makes: tuple(m() for m in ms))
        names = [name for run in together for name in run]
        explain = f"{', '.join(names)} of {path} in {len(together)} dispatch(es)"
        yield _candidate("in_proj", 80, path, names, [piece], explain, sum(formats, ()))


@register_detector("embedding")
def _embedding(tree: Tree) -> Iterator[Candidate | Skip]:
    """The look-up of MLX's quantised rows in one dispatch."""
    for path, module in tree.modules:
        if not isinstance(module, nn.QuantizedEmbedding):
            continue
        made = tree.shared(module, []) or embedding_rows(module)
        if type(module) is not nn.QuantizedEmbedding:
            made = f"it is {type(module).__name__}"
        elif tree.holders(module) > 1:
            made = "it shares its weight with another module"
        if isinstance(made, str):
            yield Skip("embedding", path, made)
            continue
        form = EmbeddingForm(type(module), module(mx.array([0])).dtype)
        piece = (module, FusedEmbedding, form, "rows", _same(made))
        explain = f"rows of {path} looked up in one dispatch"
        parent, _, name = path.rpartition(".")
        yield _candidate("embedding", 40, parent, [name], [piece], explain, made.formats)
