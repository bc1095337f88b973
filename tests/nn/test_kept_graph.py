"""Graphs that are kept: they give what the same code gives without them.

MLX cannot call a Metal kernel while it compiles where there is no GPU, so MLX's own operations
stand in for the kernels here.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_map
from mlx_lm.generate import BatchGenerator
from mlx_lm.models.cache import make_prompt_cache

from mlxfuse.fusion import patch_model, unpatch_model
from mlxfuse.kernels import Backend, disabled, fallbacks, launches
from mlxfuse.kernels.matmul import quantized_matmul as matmul
from mlxfuse.kernels.matmul.product import Call, Epilogue, Experts
from mlxfuse.kernels.norm.norm_rope import RopeOptions, norm_rope
from mlxfuse.kernels.runtime import backend as _backend
from mlxfuse.nn import fused as form
from mlxfuse.nn import projection, rotation
from mlxfuse.nn.kept_graph import Piece
from mlxfuse.nn.norm import Normed
from mlxfuse.nn.snapshot import Snapshot
from tests.fusion import zoo
from tests.fusion.configs import USED

BOUND = 1e-5


class StandIn:
    """In the place of `Prepared`."""

    disabled = False

    def __init__(self, op: str, function: Callable[..., Any]) -> None:
        self.op = op
        self.function = function

    def __call__(self, *arrays: mx.array, on: Backend) -> list[mx.array] | None:
        if self.disabled:
            return None
        launches[self.op] += 1
        return list(self.function(*arrays))


def prepare_matmul(
    x: mx.array,
    weight: Any,
    epilogue: Epilogue,
    experts: Experts | None,
    *,
    split: bool,
):
    scores = None if experts is None else experts.scores
    optional = {"residual": epilogue.residual, "experts": experts, "scores": scores}
    given = [name for name, array in optional.items() if array is not None]

    def product(x: mx.array, *arrays: mx.array) -> list[mx.array]:
        free = dict.fromkeys(optional) | dict(zip(given, arrays, strict=True))
        of = None if experts is None else Experts(free["experts"], free["scores"])
        call = Call(x, weight, replace(epilogue, residual=free["residual"]), of, split)
        found = matmul._dense(call, dequantized=experts is None)
        return [y.reshape(*call.lead, y.shape[-1]) for y in found]

    return StandIn("quantized_matmul", product)


def prepare_rotation(
    queries: mx.array, keys: Any, offset: mx.array, options: RopeOptions, values: Any = None
) -> StandIn:
    batched = offset.ndim > 0

    def turn(q: mx.array, *free: mx.array) -> list[mx.array]:
        *others, place = free
        k, v = (*others, None, None)[:2]
        return list(norm_rope(q, k, place if batched else place[0], options, v))

    return StandIn("norm_rope", turn)


class Keeping(_backend.Reference):
    """Keeps graphs as Metal does, of the references."""

    keeps = prepares = True


@pytest.fixture(autouse=True)
def kept(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("MLXFUSE_KERNELS", "reference")
    keeping = Keeping("it is a stand-in")
    monkeypatch.setattr(_backend, "_default", lambda: keeping)
    monkeypatch.setattr(projection, "prepare", prepare_matmul)
    monkeypatch.setattr(rotation, "prepare", prepare_rotation)
    launches.clear()
    fallbacks.clear()
    yield
    disabled.clear()


def patched(name: str, **own: Any) -> nn.Module:
    model = stock(name, **own)
    patch_model(model, fuse="all")
    return model


def stock(name: str, **own: Any) -> nn.Module:
    return zoo.build(name, "affine4", **{"num_hidden_layers": 2, **own})


def forms(model: nn.Module) -> list[form.Form]:
    found = [vars(module).get("_fused") for module in model.modules()]
    return [f for f in found if isinstance(f, form.Form)]


def pieces(model: nn.Module) -> list[Piece]:
    return [piece for f in forms(model) for piece in f.kept.values()]


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("llama", {"enter", "leave"}),  # of the layer
        ("qwen3", {"enter", "leave"}),
        ("gemma2", {"enter", "finish"}),
        ("olmo2", {"enter", "finish"}),
        ("mixtral", {"enter", "between", "whole"}),  # of the layer and its experts
        # Other modules that rotate may need the offset's value.
        ("hunyuan_v1_dense", {"leave"}),
    ],
)
def test_kept_graphs_give_the_same(name: str, parts: set[str]) -> None:
    model = patched(name)
    want = zoo.logits(stock(name))
    assert zoo.apart(zoo.logits(model), want) <= BOUND
    builds = [piece._builds for piece in pieces(model)]
    assert builds == [1] * len(builds)
    assert len(builds) == 2 * len(parts)
    assert {name for f in forms(model) for name in f.kept} == parts
    zoo.logits(model)
    assert [piece._builds for piece in pieces(model)] == builds


@pytest.mark.parametrize("name", ["gemma2", "gemma4_text"])
def test_a_norm_that_the_layer_before_gives(name: str) -> None:
    """It is that of the weight that the norm has now, and of no other input than that result."""
    model = patched(name, num_hidden_layers=4)
    first, second, third, _ = model.layers
    assert (first._fused.following, second._fused.following) == (second, third)
    want = zoo.logits(model)
    for layer in (first, second):
        layer._fused.following = None
    assert np.array_equal(zoo.logits(model), want)
    first._fused.following, second._fused.following = second, third
    assert np.array_equal(zoo.logits(model), want)
    norm = second.input_layernorm
    for layer in model.layers:
        layer._fused.kept.clear()
    found = zoo.logits(model)
    norm.weight = norm.weight[::-1] * 2
    changed = zoo.logits(model)
    unpatch_model(model)
    assert np.array_equal(found, want)
    assert zoo.apart(changed, want) > 1e-2
    assert zoo.apart(changed, zoo.logits(model)) <= BOUND


def test_a_norm_of_another_result_is_not_used() -> None:
    model = patched("gemma3_text")
    first, second = model.layers
    x = mx.random.normal((1, 2, model.args.hidden_size), key=mx.random.key(0))
    h = first(x)
    assert second._fused.given[0] is h
    other = mx.array(h[..., ::-1])
    want = second(other)  # what was given is forgotten
    assert second._fused.given is None
    # Control: the norm of another array, as if it were of this one, is seen.
    first(x)
    second._fused.given = other, second._fused.given[1]
    assert not mx.allclose(second(other), want, atol=1e-3)


def test_a_token_asks_four_times_a_layer_whether_its_arrays_are_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Attention, MLP, and what each of the two kept graphs reads besides."""
    model, token = patched("qwen3"), mx.array([[1]])
    mx.eval(model(token))
    asked: list[int] = []

    def holds(held: Snapshot) -> bool:
        asked.append(len(held._held))
        return all(get(name) is value for get, name, value in held._held)

    monkeypatch.setattr(Snapshot, "holds", holds)
    for piece in pieces(model):  # it keeps the method as it was
        piece._holds = piece._holds.__self__.holds
    mx.eval(model(token))
    # Of q, k, v, o and the rotation, and of gate, up and down: names and arrays.
    parts = [21, 12]
    assert [n for n in asked if n in parts] == parts * 2
    assert len(asked) == 4 * 2


def test_int8_activations_have_graphs_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Codes go from a layer's graph to the experts' and the shared one's, which are others."""
    model = stock("qwen2_moe")
    patch_model(model, fuse="all", act_quant="on")
    got = zoo.logits(model)
    names = {name for f in forms(model) for name in f.kept}
    assert names == {"enter", "between", "whole"}
    monkeypatch.setenv("MLXFUSE_DISABLE", "int8")
    want = zoo.logits(stock("qwen2_moe"))
    assert zoo.apart(zoo.logits(model), want) <= BOUND
    monkeypatch.delenv("MLXFUSE_DISABLE")
    assert 1e-4 < zoo.apart(got, want) < 0.2
    plain = form.Run(_backend._REFERENCE, False)
    monkeypatch.setattr(form.Run, "of", lambda x: plain._replace(rounds=isinstance(x, Normed)))
    assert zoo.apart(zoo.logits(model), got) <= BOUND


def test_other_shapes_have_their_own() -> None:
    model, plain = patched("qwen3"), stock("qwen3")
    tokens = mx.array(np.random.RandomState(2).randint(0, 64, (2, 12)))
    states = make_prompt_cache(model), make_prompt_cache(plain)
    at = 0
    for count in (3, 1, 1, 2, 1, 4):
        chunk = tokens[:, at : at + count]
        got, want = model(chunk, cache=states[0]), plain(chunk, cache=states[1])
        assert zoo.apart(np.array(got), np.array(want)) <= BOUND
        at += count
    # Lengths 3, 1, 2 and 4 of a batch of two.
    assert {piece._builds for piece in pieces(model)} == {4}


@pytest.mark.slow
@pytest.mark.parametrize("name", USED)
def test_every_class_gives_the_same(name: str) -> None:
    with zoo.uncompiled():
        want = zoo.logits(stock(name, num_hidden_layers=4))
    assert zoo.apart(zoo.logits(patched(name, num_hidden_layers=4)), want) <= BOUND


def answers(model: nn.Module) -> list[list[int]]:
    """Of prompts of different lengths, by mlx-lm's batches."""
    batch = BatchGenerator(model, max_tokens=6)
    found = {uid: [] for uid in batch.insert([[3, 14, 15, 9], [26, 5]])}
    for _ in range(8):
        for response in batch.next_generated():
            found[response.uid].append(response.token)
    batch.close()
    return list(found.values())


def test_batches_in_two_threads() -> None:
    """Each row of a batch has another offset; each thread has its own stream and model."""
    names = ("llama", "qwen3")
    want = [answers(stock(name)) for name in names]

    def run(model: nn.Module) -> list[list[list[int]]]:
        with mx.stream(mx.new_stream(mx.default_device())):
            return [answers(model) for _ in range(3)]

    models = [patched(name) for name in names]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(run, models))
    assert found == [[each] * 3 for each in want]
    assert all(piece._builds for model in models for piece in pieces(model))


def test_launches_are_counted_at_every_call(monkeypatch: pytest.MonkeyPatch) -> None:
    model = patched("qwen3")
    zoo.logits(model)
    counted = launches.copy()
    zoo.logits(model)
    assert launches == counted + counted
    monkeypatch.setattr(Keeping, "keeps", False)
    launches.clear()
    zoo.logits(model)
    assert launches == counted
    assert counted["quantized_matmul"] == zoo.DECODED * 2 * 4
    assert counted["norm_rope"] >= zoo.DECODED * 2


def test_launches_are_those_of_the_shape() -> None:
    """A product of as many rows as MLX's own is left to take has no launch."""
    model = nn.Module()
    model.norm = nn.RMSNorm(4)

    def function(on: Backend, x: mx.array) -> mx.array:
        launches["op"] += len(x)
        return model.norm(x)

    piece = Piece(function, [(model, "norm")])
    for rows in (1, 3, 1, 3):
        launches.clear()
        piece(_backend.METAL, mx.ones((rows, 4)))
        assert launches["op"] == rows


def double(module: nn.Module) -> None:
    module.weight = 2 * module.weight


CHANGES: dict[str, Callable[[nn.Module], None]] = {
    "norm": lambda model: double(model.layers[1].input_layernorm),
    "head norm": lambda model: double(model.layers[1].self_attn.q_norm),
    "scales": lambda model: model.update(
        tree_map(lambda a: 1.5 * a if a.dtype == mx.float32 else a, model.parameters())
    ),
    "another norm": lambda model: setattr(model.layers[0], "input_layernorm", nn.LayerNorm(64)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_arrays_are_noticed(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, plain = patched("qwen3"), stock("qwen3")
    old = zoo.logits(model)
    for each in (model, plain):
        CHANGES[change](each)
    want = zoo.logits(plain)
    assert zoo.apart(old, want) > 1e-3
    assert zoo.apart(zoo.logits(model), want) <= BOUND


def test_graphs_of_a_fusion_that_is_undone_or_made_again_are_not_used() -> None:
    """As a check of the logits and tuning do; a layer's graphs hold what its children fused."""
    model, plain = stock("qwen3"), stock("qwen3")
    fused = {c.name: c for c in patch_model(model, fuse="all").fused if ".1" in c.path}
    old = zoo.logits(model)
    counted = launches["quantized_matmul"]
    for each in (model, plain):
        attention = each.layers[1].self_attn
        attention.q_proj.scales = 2 * attention.q_proj.scales
    fused["qkv"].undo()
    launches.clear()
    want = zoo.logits(plain)
    assert zoo.apart(old, want) > 1e-3
    assert zoo.apart(zoo.logits(model), want) <= BOUND
    assert launches["quantized_matmul"] == counted - zoo.DECODED


@pytest.mark.parametrize(
    ("fuse", "parent", "linear"),
    [
        ("norm_rope", "self_attn", "q_proj"),
        ("qkv", "self_attn", "o_proj"),
        ("residual", "mlp", "up_proj"),
        ("gate_up", "mlp", "down_proj"),
    ],
)
def test_linears_beside_what_is_fused_may_change(fuse: str, parent: str, linear: str) -> None:
    model, plain = stock("qwen3"), stock("qwen3")
    patch_model(model, fuse=fuse)
    old = zoo.logits(model)
    assert pieces(model)
    for each in (model, plain):
        module = each.layers[1][parent][linear]
        module.scales = 2 * module.scales
    want = zoo.logits(plain)
    assert zoo.apart(old, want) > 1e-3
    assert zoo.apart(zoo.logits(model), want) <= BOUND


def test_unnoticed_changes_would_be_seen() -> None:
    """Control for the test above."""
    model, plain = patched("llama"), stock("llama")
    zoo.logits(model)
    for piece in pieces(model):
        piece._holds = lambda: True
    for each in (model, plain):
        double(each.layers[1].input_layernorm)
    assert zoo.apart(zoo.logits(model), zoo.logits(plain)) > 1e-3


def test_a_kernel_that_is_disabled_later_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    model = patched("llama")
    zoo.logits(model)
    launches.clear()
    monkeypatch.setattr(StandIn, "disabled", True)
    monkeypatch.setitem(disabled, None, "it failed its self-test")
    assert zoo.apart(zoo.logits(model), zoo.logits(stock("llama"))) <= BOUND
    assert not launches


def test_fallbacks_are_counted_at_every_call(monkeypatch: pytest.MonkeyPatch) -> None:
    def fall_back(on: Backend, name: str, reason: str | None) -> bool:
        fallbacks[name, "no reason"] += 1
        return False

    monkeypatch.setattr(projection, "prepare", lambda *arguments, **options: None)
    monkeypatch.setattr(Keeping, "takes", fall_back)
    model = patched("llama")
    want = zoo.logits(stock("llama"))
    for times in (1, 2):
        assert zoo.apart(zoo.logits(model), want) <= BOUND
        assert fallbacks["quantized_matmul", "no reason"] == times * zoo.DECODED * 2 * 4


@pytest.mark.usefixtures("fresh_buffers")
def test_nothing_stays_behind() -> None:
    gc.collect()
    before = mx.get_active_memory()
    model = patched("llama")
    held = mx.get_active_memory()
    zoo.logits(model)
    unpatch_model(model)
    gc.collect()
    assert pieces(model) == []
    assert mx.get_active_memory() <= held
    del model
    gc.collect()
    assert mx.get_active_memory() <= before + 4096  # small constants of MLX's and ours
