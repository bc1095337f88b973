"""What the modules with a known body are: the variant; `NotFusible` says what is odd about one."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..errors import NotFusible
from ..kernels.norm.norm_rope import RopeOptions
from ..kernels.route_sigmoid import SigmoidOptions
from ..nn.adapted import base
from ..nn.attention import (
    AttentionForm,
    FusedAttention,
    FusedScaledAttention,
    FusedSharedAttention,
)
from ..nn.block import BlockForm, FusedBlock, FusedParallelBlock, FusedScaledBlock
from ..nn.fused import Form
from ..nn.join_linears import describe, single
from ..nn.mlp import MLPForm
from ..nn.moe import Choosing, ExpertsForm, FusedMoE, MoEForm
from ..nn.norm import FusedNorm
from ..nn.post_norm import FusedGatedPostNormBlock, FusedPostNormBlock, PostNormForm
from ..nn.projection import KernelProjection
from ..nn.rope import FrequencyRoPE, NoRoPE
from ..nn.rotation import Rotation
from ..nn.routed import FusedRoutedMoE, RoutedForm, SigmoidRouterForm
from ..nn.router import RouterForm
from ..nn.snapshot import Snapshot
from .certify import Match, certify, is_known


def has(module: nn.Module, *names: str) -> bool:
    """Whether all of these are modules in it."""
    return all(isinstance(module.get(name), nn.Module) for name in names)


def check_modules(module: nn.Module, *names: str) -> None:
    """Raise `NotFusible` unless all of these are modules in it."""
    if not has(module, *names):
        raise NotFusible("its children are not modules")


def attention_form(module: nn.Module, match: Match) -> AttentionForm:
    """The variant of attention that a module with a known body has."""
    names = match.names

    def value(slot: str, default: Any = None) -> Any:
        return getattr(module, names[slot], None) if slot in names else default

    shares, own = "HAS_KV" in names, bool(value("HAS_KV", True))
    slots = ["Q", *(["K"] if own else []), *(["V"] if own and not value("K_IS_V", False) else [])]
    slots += ["GATE"] if "GATE" in names else []
    linears = tuple(names[n] for n in (["QKV"] if "QKV" in names else slots))
    norm = match.form.get("norm", "") if value("USE_NORM", True) else ""
    weighted = norm and norm != "plain"
    norms = (names["Q_NORM"], *([names["K_NORM"]] if own else [])) if weighted else ()
    values_norm = names["V_NORM"] if shares and own else ""
    rope = names["ROPE"] if value("USE_ROPE", True) else ""
    check_modules(module, *linears, names["O"], *norms, *filter(None, (values_norm, rope)))
    size = value("HEAD_DIM")
    if "QKV" in names:
        rows = tuple(value(n) * size for n in ("HEADS", "KV_HEADS", "KV_HEADS"))
    else:
        rows = tuple(row_count(module[name]) for name in linears)
    heads = value("HEADS") or rows[0] // size
    kv_heads = (value("KV_HEADS") or rows[1] // size) if own else 0
    # phi has no number for it.
    scale, softcap = value("SCALE", math.sqrt(heads / (rows[0] or 1))), value("SOFTCAP", 0.0)
    numbers = [value(slot) for slot in ("SOFTCAP", "EPS", "Q_SCALE") if slot in names]
    if not all(map(_positive, (scale, *numbers))):
        raise NotFusible("its scale is not a positive number")
    return AttentionForm(
        type(module),
        linears,
        names["O"],
        rows,
        heads,
        kv_heads,
        float(scale),
        norms,
        norm,
        rope,
        float(softcap),
        names.get("SINKS", ""),
        match.form.get("gated", False),
        values_norm,
        shares,
        shares and own and _read(module),
        match.form.get("scaled", False),
        value("EPS", 0.0),
        value("Q_SCALE", 1.0),
        tuple(getattr(mx, dtype) for dtype in match.form.get("widened", ())),
    )


def attention_class(form: AttentionForm) -> type[FusedAttention]:
    if form.shares:
        return FusedSharedAttention
    return FusedScaledAttention if form.scaled else FusedAttention


def _read(module: nn.Module) -> bool:
    """Whether layers after this one may read its keys and values: not if gemma4_text's numbers
    say that none does.
    """
    config: Any = getattr(module, "config", None)
    if not hasattr(config, "num_kv_shared_layers"):
        return True
    own, kinds = config.num_hidden_layers - config.num_kv_shared_layers, config.layer_types
    kind = module.layer_type
    return kind in kinds[own:] and kind not in kinds[module.layer_idx + 1 : own]


def _positive(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value) and value > 0


def row_count(linear: nn.Module) -> int:
    """The rows of a linear's matrix; 0 where it does not tell."""
    weight = getattr(base(linear), "weight", None)
    return int(weight.shape[0] if isinstance(weight, mx.array) else getattr(weight, "rows", 0))


def mlp_form(module: nn.Module, match: Match) -> MLPForm:
    """The variant of MLP that a module with a known body has."""
    names = match.names
    if "GATE_UP" in names:
        linears: tuple[str, ...] = (names["GATE_UP"],)
    else:
        linears = tuple(names[n] for n in ("GATE", "UP") if n in names)
    check_modules(module, *linears, names["DOWN"])
    found = activation(module, match) if "ACTIVATION" in names else match
    return MLPForm(type(module), linears, names["DOWN"], found.form["activation"])


def experts_form(module: nn.Module, match: Match) -> ExpertsForm:
    """The variant of gated experts that a module with a known body has."""
    names = [match.names[n] for n in ("GATE", "UP", "DOWN")]
    check_modules(module, *names)
    gate, up, down = names
    return ExpertsForm(type(module), (gate, up), down, activation(module, match).form["activation"])


def moe_form(module: nn.Module, match: Match) -> MoEForm:
    """The variant of a block of experts of which it is known how their results are added up."""
    form = MoEForm(type(module), match.names["EXPERTS"], match.form.get("cast", False))
    if is_known(type(module), "routed"):
        return _routed_form(module, certify(type(module), "routed"))
    try:
        whole = certify(type(module), "moe")
    except NotFusible:
        return form
    names, holder, inner = whole.names, module, None
    if "ROUTER" in names:
        inner = names["ROUTER"], getattr(module, names["ROUTER"])
        holder = inner[1]
        try:
            names = names | certify(type(holder), "router").names
        except NotFusible:
            return form
    shared = tuple(names[n] for n in ("SHARED", "SHARED_GATE") if n in names)
    if not has(holder, names["GATE"]) or not has(module, *shared):
        return form
    settings = tuple((names[n], getattr(holder, names[n])) for n in ("COUNT", "NORM") if n in names)
    count, *normed = (value for _, value in settings)
    softmax = whole.form.get("whole", False) and not any(normed)
    choice = Choosing(names["GATE"], count, softmax, settings, shared, inner)
    return replace(form, choosing=choice)


def moe_class(form: MoEForm) -> type[FusedMoE]:
    return FusedRoutedMoE if isinstance(form, RoutedForm) else FusedMoE


def _routed_form(module: nn.Module, match: Match) -> RoutedForm:
    names, holder = match.names, module
    *path, last = match.form["shares"].split(".")
    for name in path:
        holder = getattr(holder, name)
    shares = getattr(holder, last) is not None
    shared = names["SHARED"] if shares and has(module, names["SHARED"]) else ""
    if shares and not shared:
        raise NotFusible("its shared expert is no module")
    return RoutedForm(type(module), names["EXPERTS"], cast=True, gate=names["GATE"], always=shared)


def sigmoid_router(module: nn.Module) -> tuple[SigmoidRouterForm, Snapshot]:
    """How a module with a known body chooses experts, and what it reads for that."""
    eps = certify(type(module), "sigmoid_router").form["eps"]
    names = ("top_k", "n_group", "topk_group", "routed_scaling_factor", "norm_topk_prob")
    count, groups, kept, scale, normed = (getattr(module, name) for name in names)
    numbers = [isinstance(value, int) for value in (count, groups, kept)]
    if not all(numbers) or groups < 1 or not 1 <= kept <= groups:
        raise NotFusible(f"its router keeps {kept} of {groups} groups")
    how = SigmoidOptions(count, groups, kept, not (normed and count > 1), eps, float(scale))
    held: list[tuple[Callable[[str], object], str]] = [
        *((module.get, name) for name in ("weight", "e_score_correction_bias")),
        *((vars(module).get, name) for name in names),
    ]
    return SigmoidRouterForm(type(module), how), Snapshot(held)


def activation(module: nn.Module, match: Match) -> Match:
    """The known activation that is a child of a module."""
    child = getattr(module, match.names["ACTIVATION"])
    found = certify(type(child), "activation")
    for slot, value in found.form.get("values", {}).items():
        name = found.names[slot]
        if getattr(child, name) != value:
            raise NotFusible(
                f"{name.strip('_')} of its activation is {getattr(child, name)}, not {value}"
            )
    return found


def block_form(module: nn.Module, match: Match) -> BlockForm:
    """The variant of decoder layer that a module with a known body has."""
    names = match.names
    mixer = names["ATTENTION"]
    if "OTHER" in names:
        other = "IS_OTHER" in names
        flag = getattr(module, names["IS_OTHER" if other else "IS_ATTENTION"])
        mixer = names["OTHER"] if bool(flag) == other else mixer
    norms = tuple(names[n] for n in ("NORM1", "NORM2") if n in names)
    check_modules(module, mixer, names["MLP"], *norms)
    how = {name: match.form.get(name, False) for name in ("keywords", "scaled", "parallel")}
    return BlockForm(type(module), norms, mixer, names["MLP"], **how)


def block_class(form: BlockForm) -> type[FusedBlock]:
    if form.parallel:
        return FusedParallelBlock
    return FusedScaledBlock if form.scaled else FusedBlock


def post_norm_form(module: nn.Module, match: Match) -> PostNormForm:
    """The variant of decoder layer with norms or a multiplication behind its halves."""
    names = match.names
    norms = names.get("NORM1", ""), names.get("NORM2", "")
    posts = names.get("POST1", ""), names.get("POST2", "")
    mixer, mlp = names["ATTENTION"], names["MLP"]
    check_modules(module, mixer, mlp, *filter(None, (*norms, *posts)))
    factor = tuple(names[n] for n in ("FACTOR", "PARTS") if n in names)
    if not all(_positive(getattr(module, name)) for name in factor):
        raise NotFusible("what multiplies its halves is not a positive number")
    clips = match.form.get("clips", False)
    gated: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()
    if match.form.get("gated"):
        gated = tuple(names[n] for n in ("GATE", "PROJECTION", "POST3", "SCALAR", "EXPERTS"))
        if getattr(module, names["EXPERTS"]):
            slots = ("ROUTER", "SWITCH", "NORM_EXPERTS", "POST_MLP", "POST_EXPERTS")
            beside = tuple(names[n] for n in slots)
            check_modules(module, *beside)
            if norm_options(module[beside[2]]) != norm_options(module[norms[1]]):
                raise NotFusible("the norms of its MLP and its experts differ")
    how: dict[str, Any] = {"gated": gated, "factor": factor, "clips": clips, "beside": beside}
    return PostNormForm(type(module), norms, mixer, mlp, posts=posts, **how)


def router_form(module: nn.Module, match: Match) -> RouterForm:
    """The variant of a router that is a module of its own."""
    slots = ("PROJ", "SCALE", "ROOT", "EPS", "FACTORS", "CONFIG")
    proj, scale, root, eps, factors, config = (match.names[n] for n in slots)
    check_modules(module, proj)
    count: Any = getattr(module, config)
    return RouterForm(
        type(module), proj, scale, root, getattr(module, eps), factors, config, count.top_k_experts
    )


def post_norm_class(form: PostNormForm) -> type[FusedPostNormBlock]:
    return FusedGatedPostNormBlock if form.gated else FusedPostNormBlock


def input_gate(module: nn.Module, form: PostNormForm) -> KernelProjection | None:
    """The gate of what is given for the layer, if there is one and it has a kernel."""
    if not (form.gated and has(module, form.gated[0])):
        return None
    with suppress(NotFusible):
        found = single(module, form.gated[0])
        return found if isinstance(found, KernelProjection) else None
    return None


def fused_norm(module: nn.Module, name: str) -> FusedNorm:
    """The norm that a module has under this name."""
    return FusedNorm(module, name, **norm_options(module[name]))


def norm_options(norm: nn.Module) -> dict[str, float]:
    """Epsilon and offset of an RMSNorm."""
    held = vars(norm).get("_fused")
    match = certify(held.original if isinstance(held, Form) else type(norm), "norm")
    return {"eps": getattr(norm, match.names["EPS"]), "offset": match.form["offset"]}


def rotation(module: nn.Module, form: AttentionForm) -> Rotation | None:
    """The rotary embedding of an attention, with its norms; None if it has neither."""
    if form.norm == "rotated":
        raise NotFusible("its norms act after the rotation")
    if not all(form.rows):
        kinds = sorted({describe(module[name]) for name in form.linears})
        raise NotFusible("its linears are " + " and ".join(kinds))
    size = form.rows[0] // form.heads // (1 + form.gated)
    turned = form.rope and not isinstance(module[form.rope], NoRoPE)
    if not (turned or form.norm):
        return None
    # Without a rotation all angles are zero.
    unturned = {"dims": size, "base": 1.0, "scale": 0.0}
    options = _rope_options(module[form.rope]) if turned else unturned
    norms = []
    for name in form.norms:
        found = norm_options(module[name])
        norms.append({"eps": found["eps"], "norm_offset": found["offset"]})
    if any(norm != norms[0] for norm in norms):
        raise NotFusible("its norms differ")
    if norms:
        weights = zip(("q_weight", "k_weight"), form.norms, strict=False)
        options = {**options, **norms[0], **{n: module[name].weight for n, name in weights}}
    if form.norm == "plain":
        options |= {"eps": form.eps, "q_scale": form.q_scale}
    if options["dims"] > size or any(n != size * form.kv_heads for n in form.rows[1:2]):
        raise NotFusible("its heads of q and k have different sizes")
    parts = {name: module[name] for name in (*form.norms, *([form.rope] if turned else []))}
    wide = form.norm == "width"
    how = RopeOptions(heads=form.heads, kv_heads=form.kv_heads, wide=wide, **options)
    values = norms and form.values_norm and _norms_plainly(module[form.values_norm], how.eps)
    if values:
        parts[form.values_norm] = module[form.values_norm]
    return Rotation(module, parts, how, values=bool(values))


def _norms_plainly(norm: nn.Module, eps: float) -> bool:
    """Whether it is an RMSNorm without a weight, with such an epsilon."""
    if not is_known(type(norm), "plain_norm"):
        return False
    found = getattr(norm, certify(type(norm), "plain_norm").names["EPS"])
    return bool(found == eps)


def _rope_options(rope: nn.Module) -> dict[str, Any]:
    """The fields of `RopeOptions` that do what a rotary embedding does."""
    if type(rope) is FrequencyRoPE:
        options = {"dims": rope.dims, "freqs": rope._freqs, "mscale": rope.scale}
        return options | {"traditional": rope.traditional}
    match = certify(type(rope), "rope")
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
