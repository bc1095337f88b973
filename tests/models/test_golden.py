"""Every architecture against llama.cpp: logits of tiny random files, and what breaks them.

The golden logits are llama.cpp's on the F32 twin of each file (see `make_golden.py`); mlxfuse
loads the quantised file itself. The negative controls change the file in the way a loader could
misread it, so a loader with that fault would compute what mlxfuse computes here, and the check
must notice.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache

from mlxfuse.loader import load
from tests.models import tiny
from tests.models.case import Change
from tests.models.changes import edit, set_key, swap, together

GOLDEN = Path(__file__).parent / "golden"
BOUND = 1e-4  # both for NMSE and for mean KLD (nats)
CONTROL = 100 * BOUND

# Tokens per call: all at once; prefill past the window in two pieces, then decode; decode only.
SCHEDULES = {"whole": [24], "chunks": [10, 6] + [1] * 8, "steps": [1] * 24}


def logits(path: Path, prompt: np.ndarray, *schedules: str, fuse: str = "auto") -> list[np.ndarray]:
    """mlxfuse's float32 logits [prompt, vocabulary] for each of `schedules`."""
    model, _ = load(path, dtype=mx.float32, context_length=256, fuse=fuse)
    results = []
    for schedule in schedules:
        rows, start, state = [], 0, make_prompt_cache(model)
        for count in SCHEDULES[schedule]:
            rows.append(model(mx.array(prompt[None, start : start + count]), cache=state)[0])
            mx.eval(rows[-1])
            start += count
        results.append(np.array(mx.concatenate(rows)))
    return results


def disagreement(got: np.ndarray, want: np.ndarray) -> tuple[float, float]:
    """(NMSE of the logits less their mean over the vocabulary, mean KLD(want, got) in nats)."""
    got, want = (x - x.mean(-1, keepdims=True) for x in (got, want.astype(np.float64)))
    nmse = ((got - want) ** 2).sum() / (want**2).sum()
    log_got, log_want = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (got, want))
    return float(nmse), float((np.exp(log_want) * (log_want - log_got)).sum(-1).mean())


@cache
def golden(name: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / f"{name}.npz") as file:
        return dict(file)


def model_of(name: str, seed: int) -> tuple[tiny.Tiny, np.ndarray]:
    """The model and llama.cpp's logits for its prompt."""
    model, reference = tiny.build(name, seed), golden(name)
    index = tiny.SEEDS.index(seed)
    assert model.digest() == reference["digest"][index], "weights changed: run make_golden.py"
    assert np.array_equal(model.prompt, reference["tokens"][index])
    return model, reference["logits"][index]


@pytest.mark.parametrize("name", [n for n, case in tiny.CASES.items() if case.arch == "gemma4"])
def test_a_batch_of_two_matches_llama_cpp(name: str, tmp_path: Path) -> None:
    model, want = model_of(name, tiny.SEEDS[0])
    loaded, _ = load(tiny.write(tmp_path / "model.gguf", model), dtype=mx.float32)
    both, state = mx.array(np.stack([model.prompt[::-1], model.prompt])), make_prompt_cache(loaded)
    rows = [loaded(both[:, :16], cache=state)]
    rows += [loaded(both[:, i : i + 1], cache=state) for i in range(16, 24)]
    other, got = np.array(mx.concatenate(rows, axis=1))
    assert max(disagreement(got, want)) <= BOUND
    assert min(disagreement(other, want)) > CONTROL


@pytest.mark.parametrize(
    ("name", "seed"),
    # Of models with many layers one will do.
    [
        (n, seed)
        for n, case in tiny.CASES.items()
        for seed in tiny.SEEDS[: 3 if case.layers < 20 else 1]
    ],
)
def test_logits_match_llama_cpp(name: str, seed: int, tmp_path: Path) -> None:
    model, want = model_of(name, seed)
    assert want.astype(np.float32).std() >= 1
    assert len(model.prompt) > model.metadata.get(f"{model.case.arch}.attention.sliding_window", 0)
    path = tiny.write(tmp_path / "model.gguf", model)
    # Fused and not: each with the seeds whose formats tell the most of it.
    plans = [("all", ["chunks"])] if seed else [("off", list(SCHEDULES)), ("all", ["chunks"])]
    for fuse, schedules in plans:
        found = logits(path, model.prompt, *schedules, fuse=fuse)
        for schedule, got in zip(schedules, found, strict=True):
            nmse, kld = disagreement(got, want)
            assert nmse <= BOUND, f"{schedule}, fuse={fuse}: NMSE {nmse:.2e}"
            assert kld <= BOUND, f"{schedule}, fuse={fuse}: mean KLD {kld:.2e}"


def wrong_rope_layout(model: tiny.Tiny) -> None:
    """Interleave the halves of every q and k head, rows of packed blocks and biases alike."""
    case = model.case
    if case.arch == "gemma4":  # whose heads have two sizes
        for name, (data, kind) in model.tensors.items():
            short = name.split(".")[-2]
            if short in ("attn_q", "attn_k"):
                width = len(model.tensors[name.replace(short, "attn_q_norm")][0])
                order = np.arange(width).reshape(2, -1).T.ravel()
                rows = np.arange(0, len(data), width)[:, None] + order
                model.tensors[name] = data[rows.ravel()], kind
        return
    width, rotated = case.head_dim, model.metadata[f"{case.arch}.rope.dimension_count"]
    assert isinstance(rotated, int)
    order = np.arange(width)
    order[:rotated] = order[:rotated].reshape(2, -1).T.ravel()
    gated = "full_attention_interval" in case.keys  # each head of q is followed by a gate
    queries = np.arange(width * (1 + gated))
    queries[:width] = order
    rows = (np.arange(case.heads)[:, None] * len(queries) + queries).ravel()
    keys = (np.arange(case.kv_heads)[:, None] * width + order).ravel()
    both = np.concatenate([rows, len(rows) + keys])
    first = 2 * width * case.kv_heads + len(rows)
    for name, (data, kind) in model.tensors.items():
        short = name.split(".")[-2]
        if name.endswith("scale"):  # of a whole tensor
            continue
        if short in ("attn_q", "attn_k"):
            model.tensors[name] = data[rows if short == "attn_q" else keys], kind
        elif short == "attn_qkv" and len(data) == first:  # and not a gated delta net's
            model.tensors[name] = np.concatenate([data[both], data[len(both) :]]), kind


def values_are_not_keys(model: tiny.Tiny) -> None:
    """Values of their own where there were none: the keys' rows, each a row later.

    Those layers' one head is there twice, as all layers with values have equally many.
    """
    for name in [n for n in model.tensors if n.endswith(".attn_k.weight")]:
        values, (data, kind) = name.replace("attn_k", "attn_v"), model.tensors[name]
        if values not in model.tensors:
            model.tensors[name] = np.concatenate([data, data]), kind
            model.tensors[values] = np.roll(model.tensors[name][0], 1, 0), kind
    model.metadata["gemma4.attention.head_count_kv"] = 2


def controls(name: str) -> Iterator[tuple[str, Change]]:
    """What a loader could get wrong in this case, each as a change of the file."""
    model = tiny.build(name, tiny.SEEDS[0])
    case = model.case
    yield from case.controls.items()
    if not case.no_rope:
        yield "rope-layout", wrong_rope_layout
    unused = "rope_factors_short" if name == "phi3-long" else "rope_factors_long"
    names = sorted({full.removesuffix(".weight").split(".", 2)[-1] for full in model.tensors})
    scales: list[str] = []
    for tensor in names:
        if tensor.startswith("nextn") or tensor.endswith(".input_scale"):  # not used
            continue
        if tensor.endswith(".bias"):
            yield f"no-{tensor}", edit(tensor, np.zeros_like)
        elif tensor.endswith(".scale"):  # one alone changes little
            scales.append(tensor)
        elif any(part in tensor for part in ("norm", "scale", "rope_")) and tensor != unused:
            yield f"no-{tensor}", edit(tensor, np.ones_like)
    if scales:
        yield "no-scales", together(*(edit(tensor, np.ones_like) for tensor in scales))
    keys = {key.removeprefix(f"{case.arch}."): value for key, value in model.metadata.items()}
    window = keys.get("attention.sliding_window")
    if window and case.arch != "phi3":
        yield "window-shorter", set_key("attention.sliding_window", window - 1)
        yield "window-longer", set_key("attention.sliding_window", window + 1)
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        if key in keys:
            yield f"no-{key}", set_key(key, 1e4)
    if "rope.scaling.factor" in keys:
        yield "no-rope-scaling", set_key("rope.scaling.factor", 1.0)
    if "rope.scaling.attn_factor" in keys:
        yield "no-attn-factor", set_key("rope.scaling.attn_factor", 1.0)
    if case.arch == "gemma3":
        if "rope.freq_base_swa" in keys:
            yield "no-local-rope-base", set_key("rope.freq_base_swa", None)
        else:
            yield "one-rope-base", set_key("rope.freq_base", 1e4)
    if case.arch == "gemma4":
        yield "one-rope-base", set_key("rope.freq_base_swa", keys["rope.freq_base"])
        per_layer = {"per_layer_token_embd", "per_layer_model_proj", "proj"}
        for tensor in sorted(per_layer & set(names)):
            yield f"no-{tensor}", edit(tensor, np.zeros_like)
        if case.k_is_v:
            yield "other-values", values_are_not_keys
        if case.unused_kv:
            yield "own-keys-and-values", set_key("attention.shared_kv_layers", 0)
    if case.experts:
        if case.fused_gate:
            yield "up-first", edit("ffn_gate_up_exps", lambda x: np.roll(x, case.expert_ffn, 1))
        elif "ffn_gate_exps" in names:
            yield "gate-and-up-swapped", swap("ffn_gate_exps", "ffn_up_exps")
        yield "other-experts-down", edit("ffn_down_exps", lambda data: np.roll(data, 1, 0))
        if case.used > 1:  # others are refused where it is one
            yield "fewer-experts", set_key("expert_used_count", case.used - 1)
            yield "more-experts", set_key("expert_used_count", case.used + 1)
    if "attn_gate" in names and "ssm_out" in names:
        yield from delta_net_controls(case, keys)
    if case.sinks:
        yield "no-sinks", edit("attn_sinks", lambda data: data - 1e4)
    if case.shared_ffn:
        yield "no-shared-expert", edit("ffn_down_shexp", np.zeros_like)
        if "ffn_gate_inp_shexp" in names:
            yield "no-shared-gate", edit("ffn_gate_inp_shexp", np.zeros_like)
    if name.endswith("27b"):
        # 1/sqrt(head_dim) in place of 1/sqrt(hidden / heads)
        ratio = np.float32((case.hidden / case.heads / case.head_dim) ** 0.5)
        queries = "attn_q_norm" if case.head_norms else "attn_q"
        yield "query-scale", edit(queries, lambda data: data * ratio)


def delta_net_controls(case: tiny.Case, keys: Mapping[str, Any]) -> Iterator[tuple[str, Change]]:
    """What could be misread in a gated delta net, or in attention whose query has a gate."""
    head, heads = keys["ssm.state_size"], keys["ssm.time_step_rank"]
    repeats = heads // keys["ssm.group_count"]

    conv = 2 * keys["ssm.group_count"] * head + heads * head

    def grouped(rows: int) -> Callable[[np.ndarray], np.ndarray]:
        """The last rows as if they were grouped by key heads already."""

        def change(data: np.ndarray) -> np.ndarray:
            if len(data) not in (conv, heads * rows):  # attention's attn_qkv
                return data
            rest, last = np.split(data, [len(data) - heads * rows])
            last = last.reshape(-1, repeats, rows, *data.shape[1:]).swapaxes(0, 1)
            return np.concatenate([rest, last.reshape(-1, *data.shape[1:])])

        return change

    for name in ("attn_qkv", "attn_gate", "ssm_conv1d"):
        yield f"grouped-{name}", edit(name, grouped(head))
    apart = ("ssm_alpha", "ssm_beta") if case.arch != "qwen3next" else ()
    for name in (*apart, "ssm_a", "ssm_dt.bias"):
        yield f"grouped-{name}", edit(name, grouped(1))
    if apart:
        yield "alpha-and-beta-swapped", swap("ssm_alpha", "ssm_beta")
    yield "conv-reversed", edit("ssm_conv1d", lambda data: data[:, ::-1].copy())
    yield "decay-not-exponential", edit("ssm_a", lambda data: -np.exp(data))
    yield "whole-head-rotated", set_key("rope.dimension_count", case.head_dim)

    name = "attn_qkv" if case.fused_qkv else "attn_q"

    def gates_last(data: np.ndarray) -> np.ndarray:
        if name == "attn_qkv" and len(data) == conv:
            return data
        queries, rest = np.split(data, [2 * case.heads * case.head_dim])
        parts = queries.reshape(2, case.heads, case.head_dim, -1).swapaxes(0, 1)
        return np.concatenate([parts.reshape(queries.shape), rest])

    yield "gates-after-all-queries", edit(name, gates_last)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        pytest.param(name, change, id=f"{name}-{what}")
        for name in tiny.CASES
        for what, change in controls(name)
    ],
)
def test_a_misread_file_is_noticed(name: str, change: Change, tmp_path: Path) -> None:
    model, want = model_of(name, tiny.SEEDS[0])
    change(model)
    path = tiny.write(tmp_path / "model.gguf", model)
    (got,) = logits(path, model.prompt, "whole")
    nmse, kld = disagreement(got, want)
    assert nmse > CONTROL, f"NMSE only {nmse:.2e}"
    assert kld > CONTROL, f"mean KLD only {kld:.2e}"


def test_the_demo_model_matches_llama_cpp(demo: Path) -> None:
    """A real model: the last positions of a 30-token prompt, prefilled and then decoded."""
    reference = golden("demo")
    tokens, want = mx.array(reference["tokens"][None]), reference["logits"]
    # Never downloaded here; without it this fails and says where to put it.
    model, _ = load(demo, dtype=mx.float32)
    whole = model(tokens)[0, -len(want) :]
    state, decoded = make_prompt_cache(model), len(want) - 1
    rows = [model(tokens[:, :-decoded], cache=state)[0, -1:]]
    rows += [model(tokens[:, i, None], cache=state)[0] for i in range(-decoded, 0)]
    for got in (whole, mx.concatenate(rows)):
        nmse, kld = disagreement(np.array(got), want)
        assert nmse <= BOUND, f"NMSE {nmse:.2e}"
        assert kld <= BOUND, f"mean KLD {kld:.2e}"
