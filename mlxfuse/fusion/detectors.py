"""The fusions of this package: where their places are, and what is done there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress

import mlx.core as mx
import mlx.nn as nn

from ..errors import NotFusible
from ..nn.activations import PLAIN
from ..nn.adapted import check_unadapted
from ..nn.attention import AttentionForm
from ..nn.block import BlockForm, FusedBlock
from ..nn.delta_net import DeltaNetForm, FusedDeltaNet, FusedGatedDelta, GatedDeltaForm
from ..nn.embedding import EmbeddingForm, FusedEmbedding
from ..nn.join_linears import (
    check_joinable,
    embedding_rows,
    one_expert,
)
from ..nn.mlp import FusedMLP, MLPForm
from ..nn.moe import ExpertsForm, FusedExperts, FusedMoE, FusedWeightedExperts, MoEForm
from ..nn.routed import FusedSigmoidRouter, RoutedForm
from .candidates import Candidate, Skip, Tree, register_detector
from .certify import Match, certify, inputs, is_known
from .emit import Piece, candidate, same
from .forms import (
    attention_class,
    attention_form,
    block_class,
    block_form,
    experts_form,
    fused_norm,
    has,
    mlp_form,
    moe_class,
    moe_form,
    rotation,
    row_count,
    sigmoid_router,
)
from .places import alone, joined, joined_experts, matched, places
from .recurrent import gated_delta_form, recurrence, together


def _inputs(tree: Tree, path: str, module: nn.Module) -> Candidate:
    """The linears of an attention that its own code calls with its input, in one dispatch."""
    names = [n for n in inputs(type(module)) if has(module, n)]
    if len(names) < 2:
        certify(type(module), "attention")  # which says why it is none
    if not together(module, names):
        check_joinable([module[one] for one in names])
    form = DeltaNetForm(type(module), together(module, names))
    return _together("qkv", tree, path, module, form, FusedDeltaNet)


def _together(
    name: str,
    tree: Tree,
    path: str,
    module: nn.Module,
    form: DeltaNetForm,
    mixin: type[FusedDeltaNet],
) -> Candidate:
    """Linears of one input, those of a kind in one dispatch."""
    makes, formats = zip(*(joined(tree, module, run) for run in form.linears), strict=True)
    piece = Piece(module, mixin, form, "joined", lambda: tuple(make() for make in makes))
    names = [one for run in form.linears for one in run]
    explain = f"{', '.join(names)} of {path} in {len(form.linears)} dispatch(es)"
    return candidate(name, 80, path, names, [piece], explain, sum(formats, ()))


@places(
    "qkv",
    "attention",
    attention_form,
    lambda m: has(m, "q_proj", "k_proj", "v_proj") or has(m, "qkv_proj"),
    _inputs,
)
def _qkv(tree: Tree, path: str, module: nn.Module, form: AttentionForm) -> Candidate | None:
    """Q, k and v in one dispatch, or their one matrix with three results."""
    if len(form.rows) == 1:
        return None
    make, formats = joined(tree, module, form.linears, form.rows)
    piece = Piece(module, attention_class(form), form, "qkv", make)
    explain = f"{', '.join(form.linears)} of {path} in one dispatch"
    return candidate("qkv", 80, path, form.linears, [piece], explain, formats)


def _looks_gated(module: nn.Module) -> bool:
    gated = has(module, "gate_proj", "up_proj") or has(module, "gate_up_proj")
    return gated and not is_known(type(module), "experts")


@places("gate_up", "mlp", mlp_form, _looks_gated)
def _gate_up(tree: Tree, path: str, module: nn.Module, form: MLPForm) -> Candidate | None:
    """``act(gate) * up`` in one dispatch."""
    if form.activation in PLAIN:
        return None
    check_unadapted(module, form.linears)
    rows = [row_count(module[name]) for name in form.linears]
    if len(rows) == 1:
        rows = [rows[0] // 2] * 2
    make, formats = joined(tree, module, form.linears, rows)
    if rows[0] != rows[1]:
        raise NotFusible(f"gate has {rows[0]} rows and up {rows[1]}")
    piece = Piece(module, FusedMLP, form, "up", make)
    explain = f"{form.activation} of {' and '.join(form.linears)} of {path} in one dispatch"
    return candidate("gate_up", 70, path, form.linears, [piece], explain, formats)


@places("experts", "experts", experts_form, lambda _: False)
def _experts(tree: Tree, path: str, module: nn.Module, form: ExpertsForm) -> Candidate:
    """``act(gate) * up`` of the chosen experts in one dispatch."""
    make, formats = joined_experts(tree, module, form.linears)
    explain = f"{form.activation} of {' and '.join(form.linears)} of {path} in one dispatch"
    piece = Piece(module, FusedExperts, form, "up", make)
    return candidate("experts", 70, path, form.linears, [piece], explain, formats)


def _has_experts(module: nn.Module) -> bool:
    children = (c for c in module.children().values() if isinstance(c, nn.Module))
    return any(is_known(type(child), "experts") for child in children)


@places("experts_sum", "experts_sum", matched, _has_experts)
def _experts_sum(tree: Tree, path: str, module: nn.Module, match: Match) -> Candidate | None:
    """The sum over a token's experts, by the router's scores, where down is multiplied."""
    name = match.names["EXPERTS"]
    if not has(module, name):
        return None
    form = experts_form(module[name], certify(type(module[name]), "experts"))
    tree.check_alone(module, [name], arrays=False)
    make, formats = joined_experts(tree, module[name], (form.output,))
    whole = match.form.get("whole", False)
    sums = moe_form(module, match)
    pieces = [
        Piece(module[name], FusedExperts, form, "down", make),
        Piece(module, FusedWeightedExperts if whole else moe_class(sums), sums, "sums", same(True)),
    ]
    output = f"{name}.{form.output}"
    explain = f"the sum over experts of {path} in {output}"
    if sums.choosing is not None:
        pieces += _chosen(tree, module, sums)
        explain += ", and their choice in one dispatch"
    if isinstance(sums, RoutedForm):
        pieces += _routed(tree, module, sums)
        explain += f", with what {sums.gate} chooses and all tokens get"
    return candidate("experts_sum", 55, path, [output], pieces, explain, formats)


def _routed(tree: Tree, module: nn.Module, form: RoutedForm) -> Iterator[Piece]:
    """The router's choice, and the last linear of the shared expert, which adds."""
    with suppress(NotFusible):  # what cannot be fused is called as it is
        tree.check_alone(module, [form.gate])
        chooses, held = sigmoid_router(module[form.gate])
        yield Piece(module[form.gate], FusedSigmoidRouter, chooses, "selects", same(held))
    if form.always:
        with suppress(NotFusible):
            expert = module[form.always]
            mlp = mlp_form(expert, certify(type(expert), "mlp"))
            made = alone(tree, expert, mlp.output)
            yield Piece(expert, FusedMLP, mlp, "down", same(made))


def _chosen(tree: Tree, module: nn.Module, form: MoEForm) -> Iterator[Piece]:
    """What chooses a token's experts, and their router, so that its bias is added where it is
    multiplied.
    """
    assert form.choosing is not None
    tree.check_alone(module)
    holder = form.choosing.holder(module)
    tree.check_alone(holder)
    yield Piece(module, FusedMoE, form, "chooses", same(True))
    router, shared = form.choosing.router, form.choosing.shared
    with suppress(NotFusible):  # what cannot be fused is called as it is
        if shared:
            make = joined(tree, module, (router, *shared[1:]))[0]
        else:
            make = same(alone(tree, holder, router))
        yield Piece(module, FusedMoE, form, "router", make)
    if shared:
        with suppress(NotFusible):
            expert = module[shared[0]]
            output = mlp_form(expert, certify(type(expert), "mlp")).output
            yield Piece(module, FusedMoE, form, "shared", same(one_expert(expert, output)))


@places("activation", "mlp", mlp_form)
def _activation(tree: Tree, path: str, module: nn.Module, form: MLPForm) -> Candidate | None:
    """The activation of an MLP without a gate, where its linear is multiplied."""
    if form.activation not in PLAIN:
        return None
    (name,) = form.linears
    check_unadapted(module, form.linears)
    made = alone(tree, module, name)
    piece = Piece(module, FusedMLP, form, "up", same(made))
    explain = f"{form.activation} of {name} of {path} in one dispatch"
    return candidate("activation", 60, path, [name], [piece], explain, made.formats)


def _adder(tree: Tree, module: nn.Module, name: str) -> tuple[str, Piece]:
    """The last linear of the attention or MLP ``name``, and what lets it add."""
    child = module[name]
    try:
        if is_known(type(child), "delta_net"):
            net = gated_delta_form(child, certify(type(child), "delta_net"))
            made = alone(tree, child, net.output)
            return net.output, Piece(child, FusedGatedDelta, net, "o", same(made))
        if is_known(type(child), "attention"):
            form = attention_form(child, certify(type(child), "attention"))
            made = alone(tree, child, form.output)
            return form.output, Piece(child, attention_class(form), form, "o", same(made))
        mlp = mlp_form(child, certify(type(child), "mlp"))
        made = alone(tree, child, mlp.output)
    except NotFusible as reason:
        raise NotFusible(f"{name}: {reason}") from reason
    return mlp.output, Piece(child, FusedMLP, mlp, "down", same(made))


def _looks_layer(module: nn.Module) -> bool:
    return has(module, "self_attn", "mlp") and not is_known(type(module), "post_norm")


@places("residual", "block", block_form, _looks_layer)
def _residual(tree: Tree, path: str, module: nn.Module, form: BlockForm) -> Candidate:
    """The additions of a decoder layer, where o and down are multiplied."""
    tree.check_alone(module)
    pieces: list[Piece] = []
    absorbed, reasons = [], []
    for flag, child in (("mixer_adds", form.mixer), ("mlp_adds", form.mlp)):
        try:
            output, piece = _adder(tree, module, child)
        except NotFusible as reason:
            reasons.append(str(reason))
            continue
        absorbed.append(f"{child}.{output}")
        pieces += [piece, Piece(module, block_class(form), form, flag, same(True))]
    if not pieces or (form.parallel and reasons):
        raise NotFusible("; ".join(reasons))
    explain = f"residual of {path} added in {' and '.join(absorbed)}"
    return candidate("residual", 50, path, absorbed, pieces, explain)


@places("norm_rope", "attention", attention_form)
def _norm_rope(tree: Tree, path: str, module: nn.Module, form: AttentionForm) -> Candidate | None:
    """The norms of q and k and the rotary embedding of both in one dispatch."""
    tree.check_alone(module)
    made = rotation(module, form)
    if made is None:
        return None
    piece = Piece(module, attention_class(form), form, "rotation", same(made))
    names = [*form.norms, *([form.rope] if form.rope else [])]
    what = ", ".join(names) or "norms of q and k"
    explain = f"{what} of {path} in one dispatch"
    return candidate("norm_rope", 65, path, names, [piece], explain)


def _can_add(tree: Tree, module: nn.Module, name: str) -> bool:
    try:
        _adder(tree, module, name)
    except NotFusible:
        return False
    return True


@places("add_rms_norm", "block", block_form)
def _add_rms_norm(tree: Tree, path: str, module: nn.Module, form: BlockForm) -> Candidate | None:
    """The first addition of a decoder layer with the norm behind it, where attention cannot add."""
    if form.scaled or form.parallel or _can_add(tree, module, form.mixer):
        return None
    name = form.norms[1]
    tree.check_alone(module, [name])
    norm = fused_norm(module, name)
    piece = Piece(module, FusedBlock, form, "second", same(norm))
    explain = f"the addition before {name} of {path} in its dispatch"
    return candidate("add_rms_norm", 45, path, [name], [piece], explain)


def _looks_linear(module: nn.Module) -> bool:
    return has(module, "in_proj_ba") or has(module, "in_proj_qkv", "in_proj_z")


@places("in_proj", "delta_net", gated_delta_form, _looks_linear)
def _in_proj(tree: Tree, path: str, module: nn.Module, form: GatedDeltaForm) -> Candidate:
    """The linears of a gated delta net's input in one dispatch; dense ones are in another."""
    if not form.linears:
        check_joinable([module[name] for name in form.inputs])
    return _together("in_proj", tree, path, module, form, FusedGatedDelta)


@places("recurrence", "delta_net", gated_delta_form, lambda _: False)
def _recurrence(tree: Tree, path: str, module: nn.Module, form: GatedDeltaForm) -> Candidate:
    """The convolution of a gated delta net in one dispatch, and its step with all norms in one."""
    names = ("conv1d", "norm")
    tree.check_alone(module, names)
    piece = Piece(module, FusedGatedDelta, form, "steps", same(recurrence(module)))
    explain = f"{' and '.join(names)} of {path} with the recurrence in two dispatches"
    return candidate("recurrence", 60, path, names, [piece], explain)


@register_detector("embedding")
def _embedding(tree: Tree) -> Iterator[Candidate | Skip]:
    """The look-up of MLX's quantised rows in one dispatch."""
    for path, module in tree.modules:
        if isinstance(module, nn.QuantizedEmbedding):
            try:
                yield _rows(tree, path, module)
            except NotFusible as reason:
                yield Skip("embedding", path, str(reason))


def _rows(tree: Tree, path: str, module: nn.QuantizedEmbedding) -> Candidate:
    if type(module) is not nn.QuantizedEmbedding:
        raise NotFusible(f"it is {type(module).__name__}")
    tree.check_alone(module)
    if tree.holders(module) > 1:
        raise NotFusible("it shares its weight with another module")
    made = embedding_rows(module)
    form = EmbeddingForm(type(module), module(mx.array([0])).dtype)
    piece = Piece(module, FusedEmbedding, form, "rows", same(made))
    explain = f"rows of {path} looked up in one dispatch"
    parent, _, name = path.rpartition(".")
    return candidate("embedding", 40, parent, [name], [piece], explain, made.formats)
