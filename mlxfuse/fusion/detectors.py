"""The fusions of this package: where their places are, and what is done there."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..nn.attention import AttentionForm, FusedAttention
from ..nn.form import Form, FusedModule, adopt, release
from ..nn.linear import PLAIN
from ..nn.mlp import BlockForm, ExpertsForm, FusedBlock, FusedExperts, FusedMLP, MLPForm
from ..nn.projection import Projection, copies, cut, format_of, join, join_experts, refusal, single
from ..nn.rope import FrequencyRoPE
from ..nn.rotation import Rotation
from .candidates import Candidate, Skip, Tree, register_detector
from .certify import Match, certify

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


def _has(module: nn.Module, *names: str) -> bool:
    return all(isinstance(module.get(name), nn.Module) for name in names)


def attention_form(module: nn.Module, match: Match) -> AttentionForm | str:
    """The variant of attention that a module with a known body has, or what is odd about it."""
    names = match.names

    def value(slot: str, default: Any = None) -> Any:
        return getattr(module, names[slot], None) if slot in names else default

    linears = (names["QKV"],) if "QKV" in names else (names["Q"], names["K"], names["V"])
    norm = match.body.form.get("norm", "") if value("USE_NORM", True) else ""
    norms = (names["Q_NORM"], names["K_NORM"]) if norm else ()
    rope = names["ROPE"] if value("USE_ROPE", True) else ""
    if not _has(module, *linears, names["O"], *norms, *([rope] if rope else [])):
        return "its children are not modules"
    scale, softcap = value("SCALE"), value("SOFTCAP", 0.0)
    if not _positive(scale) or ("SOFTCAP" in names and not _positive(softcap)):
        return "its scale is not a positive number"
    size = value("HEAD_DIM")
    if "QKV" in names:
        rows = tuple(value(n) * size for n in ("HEADS", "KV_HEADS", "KV_HEADS"))
    else:
        rows = tuple(_rows(module[name]) for name in linears)
    heads = value("HEADS") or rows[0] // size
    kv_heads = value("KV_HEADS") or rows[1] // size
    return AttentionForm(
        type(module),
        linears,
        names["O"],
        (rows[0], rows[1], rows[2]),
        heads,
        kv_heads,
        float(scale),
        norms,
        norm,
        rope,
        float(softcap),
        names.get("SINKS", ""),
    )


def _positive(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value) and value > 0


def _rows(linear: nn.Module) -> int:
    weight = getattr(linear, "weight", None)
    if isinstance(weight, mx.array):
        return int(weight.shape[0])
    return int(getattr(weight, "rows", 0))


def mlp_form(module: nn.Module, match: Match) -> MLPForm | str:
    """The variant of MLP that a module with a known body has, or what is odd about it."""
    names = match.names
    if "GATE_UP" in names:
        linears: tuple[str, ...] = (names["GATE_UP"],)
    else:
        linears = tuple(names[n] for n in ("GATE", "UP") if n in names)
    if not _has(module, *linears, names["DOWN"]):
        return "its children are not modules"
    return MLPForm(type(module), linears, names["DOWN"], match.body.form["activation"])


@register_detector("qkv")
def _qkv(tree: Tree) -> Iterator[Candidate | Skip]:
    """Q, k and v in one dispatch, or their one matrix with three results."""
    for path, module in tree.modules:
        match = certify(type(module), "attention")
        if isinstance(match, str):
            if _has(module, "q_proj", "k_proj", "v_proj") or _has(module, "qkv_proj"):
                yield Skip("qkv", path, match)
            continue
        form = attention_form(module, match)
        if isinstance(form, str):
            yield Skip("qkv", path, form)
            continue
        made = _joined(tree, module, form.linears, form.rows)
        if isinstance(made, str):
            yield Skip("qkv", path, made)
            continue
        make, formats = made
        piece = (module, FusedAttention, form, "qkv", make)
        explain = f"{', '.join(form.linears)} of {path} in one dispatch"
        yield _candidate("qkv", 80, path, list(form.linears), [piece], explain, formats)


def _looks_gated(module: nn.Module) -> bool:
    return _has(module, "gate_proj", "up_proj") or _has(module, "gate_up_proj")


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
        rows = [_rows(module[name]) for name in form.linears]
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
        gate, up, down, activation = (match.names[n] for n in ("GATE", "UP", "DOWN", "ACTIVATION"))
        kind = certify(type(getattr(module, activation)), "activation")
        shared = tree.shared(module, (gate, up), arrays=False)
        made = shared or join_experts(module, (gate, up))
        if isinstance(kind, str) or isinstance(made, str):
            yield Skip("experts", path, kind if isinstance(kind, str) else str(made))
            continue
        form = ExpertsForm(type(module), down, kind.body.form["activation"])
        explain = f"{form.activation} of {gate} and {up} of {path} in one dispatch"
        piece = (module, FusedExperts, form, "up", _same(made))
        yield _candidate("experts", 70, path, [gate, up], [piece], explain, made.formats)


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
            if _has(module, "self_attn", "mlp"):
                yield Skip("residual", path, match)
            continue
        form = _block_form(module, match)
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
        made = tree.shared(module, []) or _rotation(module, form)
        if isinstance(made, str):
            yield Skip("norm_rope", path, made)
            continue
        piece = (module, FusedAttention, form, "rotation", _same(made))
        names = [*(form.norms if form.norm else ()), form.rope]
        explain = f"{', '.join(names)} of {path} in one dispatch"
        yield _candidate("norm_rope", 65, path, names, [piece], explain)


def _rotation(module: nn.Module, form: AttentionForm) -> Rotation | str:
    options = _rope_options(module[form.rope])
    if isinstance(options, str):
        return options
    if form.norm not in ("", "head"):
        return (
            f"its norms act on the {form.norm}"
            if form.norm == "width"
            else ("its norms act after the rotation")
        )
    norms = []
    for name in form.norms:
        match = certify(type(module[name]), "norm")
        if isinstance(match, str):
            return match
        eps = getattr(module[name], match.names["EPS"])
        norms.append({"eps": eps, "norm_offset": match.body.form["offset"]})
    if norms and norms[0] != norms[1]:
        return "its norms differ"
    if norms:
        weights = [module[name].weight for name in form.norms]
        options = {**options, **norms[0], "q_weight": weights[0], "k_weight": weights[1]}
    size = form.rows[0] // form.heads
    if not (options["dims"] <= size and size * form.kv_heads == form.rows[1]):
        return "its heads of q and k have different sizes"
    parts = {name: module[name] for name in (*form.norms, form.rope)}
    return Rotation(module, parts, form.heads, form.kv_heads, options)


def _rope_options(rope: nn.Module) -> dict[str, Any] | str:
    """The arguments of `norm_rope` that do what a rotary embedding does, or why there are none."""
    if type(rope) is FrequencyRoPE:
        return {"dims": rope.dims, "freqs": rope._freqs, "mscale": rope.scale}
    match = certify(type(rope), "rope")
    if isinstance(match, str):
        return match
    slots = {slot: getattr(rope, name) for slot, name in match.names.items()}
    given = {
        "DIMS": "dims",
        "TRADITIONAL": "traditional",
        "BASE": "base",
        "SCALE": "scale",
        "FREQS": "freqs",
        "MSCALE": "mscale",
    }
    return {given[slot]: value for slot, value in slots.items()}


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
        return form.output, (module, FusedAttention, form, "o", _same(made))
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


def _block_form(module: nn.Module, match: Match) -> BlockForm | str:
    names = match.names
    mixer = names["ATTENTION"]
    if "OTHER" in names:
        other = "IS_OTHER" in names
        flag = getattr(module, names["IS_OTHER" if other else "IS_ATTENTION"])
        mixer = names["OTHER"] if bool(flag) == other else mixer
    norms = (names["NORM1"], names["NORM2"])
    if not _has(module, mixer, names["MLP"], *norms):
        return "its children are not modules"
    return BlockForm(
        type(module), norms, mixer, names["MLP"], match.body.form.get("keywords", False)
    )
