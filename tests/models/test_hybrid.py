"""Qwen3.5: layers with a recurrence beside layers with attention."""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import (
    ArraysCache,
    BatchKVCache,
    can_trim_prompt_cache,
    make_prompt_cache,
    save_prompt_cache,
)
from mlx_lm.models.qwen3_next import Qwen3NextRMSNormGated

from mlxfuse.errors import GGUFError, PromptCacheError, UnsupportedError
from mlxfuse.fusion import patch_model, unpatch_model
from mlxfuse.generate import prompt_cache
from mlxfuse.generate.run import Settings, generate
from mlxfuse.gguf.reader import open_gguf
from mlxfuse.inspect.header import inspect, render
from mlxfuse.inspect.needs import needs
from mlxfuse.kernels import backend, fallbacks, launches
from mlxfuse.kernels.runtime.backend import unfused
from mlxfuse.loader import load
from mlxfuse.models.config import read_config
from mlxfuse.models.plan import plan
from mlxfuse.nn.delta_net import FusedDeltaNet
from mlxfuse.nn.kv.cache import CompressedKVCache
from mlxfuse.nn.kv.options import KVOptions, compressed, plain_caches
from tests import msl
from tests.models import tiny
from tests.models.test_golden import BOUND, disagreement, model_of

NAMES = ("qwen35", "qwen35-k-quants", "qwen35moe")


def write(folder: Path, name: str, **keys: Any) -> Path:
    """The file of a case with other values of the architecture's keys; None leaves one out."""
    model = tiny.build(name, 0)
    for key, value in keys.items():
        full = f"{model.case.arch}.{key.replace('__', '.')}"
        model.metadata.pop(full, None)
        if value is not None:
            model.metadata[full] = value
    return tiny.write(folder / "m.gguf", model)


def test_sizes_and_kinds_of_layers(tmp_path: Path) -> None:
    with open_gguf(write(tmp_path, "qwen35moe")) as file:
        config = read_config(file)
        layers = plan(file, config).layers
    assert [bool(kind) for kind in config.kinds] == [True, True, False]
    wanted = {
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 6,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "linear_conv_kernel_dim": 4,
        "full_attention_interval": 3,
        "norm_topk_prob": True,
        "shared_expert_intermediate_size": 64,
        "num_experts": 6,
        "rope_parameters": {
            "type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.5,
        },
    }
    assert wanted.items() <= config.args.items()
    kinds = [{w.module.split(".")[3] for w in layer} for layer in layers]
    norms = {"input_layernorm", "post_attention_layernorm", "mlp"}
    assert kinds == [norms | {"linear_attn"}] * 2 + [norms | {"self_attn"}]
    rows = {w.module.rsplit(".", 1)[1]: w.weight[0] for w in layers[0]}
    # Of 32 + 32 + 96 rows the last are value heads (r, k) -> (k, r) of 16 rows.
    order = rows["in_proj_qkv"].order()
    assert order is not None
    heads = 64 + 16 * np.array([0, 2, 4, 1, 3, 5])
    assert order.tolist() == [*range(64), *(h + i for h in heads for i in range(16))]
    assert rows["A_log"].order().tolist() == [0, 2, 4, 1, 3, 5]
    assert rows["in_proj_z"].order() is None


@pytest.mark.parametrize(
    ("keys", "error", "reason"),
    [
        ({"ssm__time_step_rank": 5}, GGUFError, "5 value heads of 16 for 2 key heads"),
        ({"ssm__inner_size": 95}, GGUFError, "ssm.inner_size of 96, not 95"),
        ({"ssm__state_size": None}, GGUFError, "qwen35.ssm.state_size"),
        ({"full_attention_interval": 1}, UnsupportedError, "both kinds: attention every 1"),
        ({"full_attention_interval": 5}, UnsupportedError, "both kinds: attention every 5"),
        (
            {"attention__recurrent_layers": [True, True, False, False]},
            UnsupportedError,
            "an irregular qwen35.attention.recurrent_layers",
        ),
        ({"nextn_predict_layers": 4}, GGUFError, "4 of 4 blocks"),
        # The last layer is taken for one that predicts ahead.
        (
            {"nextn_predict_layers": 1, "full_attention_interval": 3},
            GGUFError,
            "blk.1.attn_qkv.weight is missing",
        ),
        ({"full_attention_interval": 4}, GGUFError, "blk.1.attn_qkv.weight is missing"),
    ],
)
def test_what_makes_no_sense_is_refused(
    keys: dict[str, Any], error: type[Exception], reason: str, tmp_path: Path
) -> None:
    with open_gguf(write(tmp_path, "qwen35", **keys)) as file, pytest.raises(error, match=reason):
        plan(file, read_config(file))


def test_a_list_of_recurrent_layers_says_the_same(tmp_path: Path) -> None:
    kinds = [True, False, True, False]
    keys = {"attention__recurrent_layers": kinds, "full_attention_interval": None}
    with open_gguf(write(tmp_path, "qwen35", **keys)) as file:
        kinds = read_config(file).kinds
        assert [i for i, kind in enumerate(kinds) if kind] == [0, 2]


def test_a_decay_that_grows_is_refused(tmp_path: Path) -> None:
    model = tiny.build("qwen35", 0)
    model.tensors["blk.2.ssm_a"] = -model.tensors["blk.2.ssm_a"][0], "F32"
    with pytest.raises(GGUFError, match=r"blk\.2\.ssm_a must be negative"):
        load(tiny.write(tmp_path / "m.gguf", model))


def test_blocks_that_predict_ahead_are_ignored_and_said_so(tmp_path: Path) -> None:
    model = tiny.build("qwen35-k-quants", 0)
    path = tiny.write(tmp_path / "m.gguf", model)
    ids = mx.array(model.prompt[None])
    want = load(path)[0](ids)
    summary = inspect(path)
    assert summary["layers"] == 4
    assert summary["ignored"] == {"blocks": 1, "bytes": summary["ignored"]["bytes"]}
    assert summary["ignored"]["bytes"] == sum(
        data.nbytes for name, (data, _) in model.tensors.items() if name.startswith("blk.4.")
    )
    assert "1 block that predicts tokens after the next" in render(summary)
    for name in [name for name in model.tensors if name.startswith("blk.4.")]:
        del model.tensors[name]
    model.metadata |= {"qwen35.nextn_predict_layers": 0, "qwen35.block_count": 4}
    alone = tiny.write(tmp_path / "alone.gguf", model)
    assert mx.array_equal(load(alone)[0](ids), want)
    without = inspect(alone)
    for what in ("weights", "cache", "active"):
        assert without["memory"][what] == summary["memory"][what]
    assert "ignored" not in without


@pytest.mark.parametrize("name", NAMES)
def test_the_fused_model_has_llama_cpps_logits(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLXFUSE_KERNELS", "reference")
    source, want = model_of(name, 0)
    model, _ = load(tiny.write(tmp_path / "m.gguf", source), fuse="all", dtype="float32")
    tallies = model.load_report.patch.tallies
    recurrent = sum(layer.is_linear for layer in model.layers)
    assert len(tallies["in_proj"].fused) == recurrent
    for kind in ("qkv", "norm_rope"):
        assert len(tallies[kind].fused) == len(model.layers) - recurrent
    # In "qwen35" alpha is F32, as in many released files: it is read with the others.
    joined = model.layers[0].linear_attn._fused.linears
    whole = ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a")
    assert joined == (whole,)
    state = make_prompt_cache(model)
    prompt = source.prompt[None]
    rows = [model(mx.array(prompt[:, :10]), cache=state)[0]]
    rows += [model(mx.array(prompt[:, i : i + 1]), cache=state)[0] for i in range(10, 24)]
    got = np.array(mx.concatenate(rows))
    assert max(disagreement(got, want)) <= BOUND
    # Control: two of the linears change places.
    projection = model.layers[0].linear_attn._fused.joined[0]
    right = projection.split
    monkeypatch.setattr(projection, "split", lambda x, mode: _swapped(right(x, mode)))
    wrong = np.array(model(mx.array(prompt))[0])
    assert min(disagreement(wrong, want)) > 100 * BOUND
    monkeypatch.undo()
    unpatch_model(model)
    assert not any(isinstance(m, FusedDeltaNet) for m in model.modules())


def _swapped(parts: Any) -> list[mx.array]:
    first, z, *rest = parts
    return [first, mx.roll(z, 16, axis=-1), *rest]


def test_the_fused_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A decoded token of a layer of each kind through the Metal source."""
    path = write(tmp_path, "qwen35")
    source, want = model_of("qwen35", 0)
    monkeypatch.setenv("MLXFUSE_KERNELS", "emulated")
    model, _ = load(path, fuse="all")
    state, prompt = make_prompt_cache(model), mx.array(source.prompt[None])
    launches.clear()
    fallbacks.clear()
    with msl.installed(build="fast"):
        model(prompt[:, :23], cache=state)
        before = launches.copy()
        got = np.array(model(prompt[:, 23:], cache=state)[0])
    assert max(disagreement(got, want[23:])) <= BOUND
    # 2 qkv, 2 in_proj, 4 gate/up, 4 down, 4 o or out, and the head.
    steps = {"quantized_matmul": 17, "norm_rope": 2, "causal_conv": 2, "delta_step": 2}
    assert launches - before == {**steps, "dequantize": 1}
    assert (before["causal_conv"], before["delta_step"]) == (2, 0)
    assert not fallbacks


def test_what_the_recurrence_reads_may_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step follows the module as it is now, with other arrays and another epsilon."""
    monkeypatch.setenv("MLXFUSE_KERNELS", "reference")
    model, _ = load(write(tmp_path, "qwen35"), fuse="all", dtype="float32")
    net, tokens = model.layers[0].linear_attn, mx.random.normal((1, 4, 64), key=mx.random.key(0))

    def step(how: Any) -> mx.array:
        cache = ArraysCache(2)
        with unfused():
            net(tokens[:, :3], None, cache)
        with how:
            return net(tokens[:, 3:], None, cache)

    last = step(nullcontext())
    for module, name, value in (
        (net.norm, "eps", 0.1),
        (net.norm, "weight", net.norm.weight / 2),
        (net.conv1d, "weight", net.conv1d.weight / 2),
        (net, "A_log", net.A_log + 1),
        (net, "dt_bias", net.dt_bias + 1),
    ):
        assert net.holds(backend())
        setattr(module, name, value)
        changed = step(nullcontext())
        assert mx.abs(changed - last).max() > 1e-3 * mx.abs(last).max()
        assert mx.allclose(changed, step(unfused()), rtol=0, atol=1e-6)
        assert not net.holds(backend())
        unpatch_model(model)
        patch_model(model, fuse="recurrence")
        last = changed


def test_the_first_norm_gives_int8_to_the_projections(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLXFUSE_KERNELS", "reference")
    model, _ = load(write(tmp_path, "qwen35moe"), fuse="all", act_quant="on")
    assert not [s for s in model.load_report.patch.skipped if s.name == "int8"]
    layer, x = model.layers[0], mx.random.normal((1, 5, 64), key=mx.random.key(0))
    (projection,) = layer.linear_attn._fused.joined
    real, seen = projection.integers, []
    monkeypatch.setattr(
        projection, "integers", lambda *a, **k: seen.append(real(*a, **k)) or seen[-1]
    )
    got = layer(x)
    (parts,) = seen
    wanted = projection.split(layer.input_layernorm(x), backend())
    for part, want in zip(parts, wanted, strict=True):
        apart = mx.abs(part - want).max() / mx.abs(want).max()
        assert 1e-5 < apart < 0.02
    monkeypatch.setenv("MLXFUSE_DISABLE", "int8")
    floats = layer(x)
    assert len(seen) == 1
    assert 1e-4 < mx.abs(got - floats).max() / mx.abs(floats).max() < 0.1


def test_a_sharded_net_runs_its_own_code(tmp_path: Path) -> None:
    model, _ = load(write(tmp_path, "qwen35"), fuse="in_proj")
    net, x = model.layers[0].linear_attn, mx.random.normal((1, 3, 64), key=mx.random.key(0))
    want = net(x)
    net._fused.joined[0].split = None  # would be called
    with pytest.raises(TypeError):
        net(x)
    net.sharding_group = mx.distributed.init()
    assert mx.allclose(net(x), want, atol=1e-5)


@pytest.mark.parametrize("name", ["qwen35", "qwen35moe"])
@pytest.mark.parametrize("padding", [0, 5])
def test_a_batch_of_two(
    name: str, padding: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each sequence has the logits it has alone, the shorter one padded at its left."""
    monkeypatch.setenv("MLXFUSE_KERNELS", "reference")
    model, _ = load(write(tmp_path, name), fuse="all" if padding else "off")
    ids = np.random.RandomState(3).randint(0, 256, (2, 20)).astype(np.int32)
    caches = [
        ArraysCache(2, left_padding=[0, padding]) if layer.is_linear else BatchKVCache([0, padding])
        for layer in model.layers
    ]
    padded = ids.copy()
    padded[1] = np.roll(ids[1], padding)
    padded[1, :padding] = 255
    rows = [model(mx.array(padded[:, :16]), cache=caches)]
    rows += [model(mx.array(padded[:, i : i + 1]), cache=caches) for i in range(16, 20)]
    got = np.array(mx.concatenate(rows, axis=1))
    for i, skipped in enumerate((0, padding)):
        alone = np.array(model(mx.array(padded[i : i + 1, skipped:]))[0])
        np.testing.assert_allclose(got[i, skipped:], alone, rtol=0, atol=2e-4)
    if padding:  # control: as if the padding were tokens
        assert np.abs(np.array(model(mx.array(padded[1:])))[0, 5:] - got[1, 5:]).max() > 0.1


def test_attention_is_compressed_and_recurrences_are_not(tmp_path: Path) -> None:
    path = write(tmp_path, "qwen35")
    model, tokenizer = load(path, kv_bits="k8v4")
    kinds = [type(c) for c in make_prompt_cache(model)]
    assert kinds == [ArraysCache, CompressedKVCache] * 2
    options = KVOptions(16, 16, rotate=False)
    ids = mx.random.randint(0, 250, (1, 150), key=mx.random.key(0))
    found = []
    for how in (None, options, KVOptions(4, 4)):
        state = plain_caches(model)
        state = state if how is None else compressed(state, how)
        rows = [model(ids[:, :100], cache=state), model(ids[:, 100:], cache=state)]
        mx.eval(rows, [c.state for c in state])
        found.append(mx.concatenate(rows, axis=1))
    assert mx.abs(found[1] - found[0]).max() < 1e-4
    assert mx.abs(found[2] - found[0]).max() > 1e-2
    settings = Settings(prompt="abc", max_tokens=4, kv=KVOptions())
    result = generate(model, tokenizer, settings)
    assert len(result.tokens) == 4
    assert "keys 8 bits" in (result.kv_cache or "")


@pytest.mark.parametrize("bits", [None, "k8v4"])
def test_a_saved_prompt_goes_on(bits: str | None, tmp_path: Path) -> None:
    model, _ = load(write(tmp_path, "qwen35"), kv_bits=bits)
    ids = mx.random.randint(0, 250, (1, 30), key=mx.random.key(0))
    state = make_prompt_cache(model)
    assert not can_trim_prompt_cache(state)
    model(ids[:, :20], cache=state)
    path = tmp_path / "prompt.safetensors"
    save_prompt_cache(str(path), state)
    want = model(ids[:, 20:], cache=state)
    prompt_cache.expect_model(path, None)
    read = prompt_cache.read(path, model)
    assert mx.array_equal(model(ids[:, 20:], cache=read), want)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda c: c[0].cache.pop(), "layer 0: expected 2 arrays"),
        (lambda c: c[0].cache.reverse(), r"layer 0: expected an array of mlx.core.float32 \(1, 3,"),
        (lambda c: c.reverse(), "layer 0: expected ArraysCache, found KVCache"),
        (lambda c: c[0].cache.__setitem__(1, None), r"expected an array of .*\(1, 6, 16, 16\)"),
        (lambda c: setattr(c[2], "lengths", mx.array([3])), "layer 2: it is that of a batch"),
    ],
)
def test_a_saved_prompt_is_not_trusted(
    change: Callable[[list[Any]], object], reason: str, tmp_path: Path
) -> None:
    model, _ = load(write(tmp_path, "qwen35"))
    state = make_prompt_cache(model)
    model(mx.zeros((1, 4), mx.int32), cache=state)
    change(state)
    path = tmp_path / "prompt.safetensors"
    save_prompt_cache(str(path), state)
    with pytest.raises(PromptCacheError, match=reason):
        prompt_cache.read(path, model)


def test_tokens_cannot_be_taken_back(tmp_path: Path) -> None:
    model, tokenizer = load(write(tmp_path, "qwen35"))
    with pytest.raises(UnsupportedError, match="its cache cannot take tokens back"):
        generate(model, tokenizer, Settings(prompt="abc"), draft_model=model)


def test_needs_know_the_state(tmp_path: Path) -> None:
    path = write(tmp_path, "qwen35moe")
    with open_gguf(path) as file:
        wanted = needs(file)
    model, _ = load(path, dtype="float16")
    state = make_prompt_cache(model)
    model(mx.zeros((1, 5), mx.int32), cache=state)
    assert wanted.state == sum(c.nbytes for c in state if isinstance(c, ArraysCache))
    assert wanted.kv == ((2 * 32, 0),)  # one layer with attention: 2 heads of 16, k and v
    assert wanted.cache(7) == wanted.state + 7 * 128


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_the_decay_is_the_files_to_float32(dtype: str, tmp_path: Path) -> None:
    """Also in a model of a shorter type; the file has -exp(A_log)."""
    source = tiny.build("qwen35", 0)
    model, _ = load(tiny.write(tmp_path / "m.gguf", source), dtype=dtype)
    want = source.tensors["blk.0.ssm_a"][0][[0, 2, 4, 1, 3, 5]]
    found = model.layers[0].linear_attn.A_log
    assert found.dtype == mx.float32
    np.testing.assert_allclose(-np.exp(np.array(found, np.float64)), want, rtol=1e-6)
    short = np.log(-want).astype(np.float16).astype(np.float64)  # control
    assert np.abs(np.exp(short) / want + 1).max() > 1e-5


def test_the_norm_of_a_net_has_the_files_epsilon(tmp_path: Path) -> None:
    path = write(tmp_path, "qwen35", attention__layer_norm_rms_epsilon=0.25)
    net = load(path, dtype="float32")[0].layers[0].linear_attn
    heads, gate = (mx.random.normal((1, 2, 6, 16), key=mx.random.key(i)) for i in (0, 1))
    stock = Qwen3NextRMSNormGated(16, eps=0.25)
    stock.weight = net.norm.weight
    order = [0, 2, 4, 1, 3, 5]  # of the file's value heads, in mlx-lm's order
    want = stock(heads, gate[:, :, order])
    got = net.norm(heads, gate)[:, :, order]
    assert mx.allclose(got, want, atol=1e-6)
    stock.eps = 1e-5
    assert not mx.allclose(got, stock(heads, gate[:, :, order]), atol=1e-2)  # control
