"""patch_model on models of mlx-lm: same logits, same parameters, nothing twice, and back."""

import gc
import json
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm import stream_generate  # noqa: F401 (loaded before threads are)
from mlx_lm.models.activations import SwigluOAI
from mlx_lm.models.cache import QuantizedKVCache, make_prompt_cache
from mlx_lm.models.minimax_m3_vl import DenseMLP
from mlx_lm.models.switch_layers import QuantizedSwitchLinear
from mlx_lm.tuner.lora import LoRALinear

import mlxfuse
from mlxfuse import patch_model, unpatch_model
from mlxfuse.errors import FusionNameError, PatchError, UnsupportedError
from mlxfuse.fusion.dispatches import per_token
from mlxfuse.kernels import fallbacks, launches
from mlxfuse.nn.fused import FusedModule
from tests import msl
from tests.fusion.stock import FORMATS, SIZES, apart, logits, make, parameters

MODELS = ("llama", "qwen3", "gemma3_text", "phi3", "starcoder2")
ARGS = {
    "gemma3_text": {"sliding_window_pattern": 2, "query_pre_attn_scalar": 32},
    "starcoder2": {"norm_epsilon": 1e-5},
}
BITS = "bits are (2, 3, 4, 5, 6, 8)"
# Sums of 256 products in float32, in another order.
BOUND = 1e-5


@pytest.fixture(autouse=True)
def counters(fresh_buffers: None) -> None:
    launches.clear()
    fallbacks.clear()


def held() -> int:
    """Bytes of all arrays."""
    mx.synchronize()
    gc.collect()
    return mx.get_active_memory()


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("name", MODELS)
def test_the_surgery(name: str, form: str, tmp_path: Path) -> None:
    model = make(name, form, **ARGS.get(name, {}))
    classes = {path: type(m) for path, m in model.named_modules()}
    before, want = parameters(model), logits(model)
    live = held()
    report = patch_model(model, fuse="all")
    assert held() <= live
    assert report.tallies["qkv"].fused
    assert sum(isinstance(m, FusedModule) for m in model.modules()) >= 2
    assert apart(logits(model), want) <= BOUND
    # A patched model is saved as if it were not, and mlx-lm loads it.
    assert parameters(model) == before
    model.save_weights(str(tmp_path / "w.safetensors"))
    other = make(name, form, **ARGS.get(name, {}))
    other.update(nn.utils.tree_map(mx.zeros_like, other.parameters()))
    other.load_weights(str(tmp_path / "w.safetensors"))
    assert np.array_equal(logits(other), want)
    del other
    unpatch_model(model)
    assert held() <= live
    assert {path: type(m) for path, m in model.named_modules()} == classes
    assert parameters(model) == before
    assert np.array_equal(logits(model), want)


@pytest.mark.parametrize(
    ("name", "form", "dtype", "bound"),
    [
        ("llama", "affine4", mx.float32, BOUND),
        ("qwen3", "affine8", mx.float32, BOUND),
        ("llama", "mxfp4", mx.bfloat16, 5e-2),
    ],
)
def test_the_kernels(
    name: str, form: str, dtype: mx.Dtype, bound: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLXFUSE_KERNELS", "emulated")
    model = make(name, form, dtype)
    want = logits(model, (1, 2))
    with msl.installed(build="fast"):
        report = patch_model(model)
        got = logits(model, (1, 2))
    assert launches == {"quantized_matmul": 16, "norm_rope": 4, "dequantize": 2}
    assert not fallbacks
    assert apart(got, want) <= bound
    assert not np.array_equal(got, want)  # something else was computed
    assert report.as_dict()["fusions"]["qkv"] == {"fused": 2, "of": 2}


@pytest.mark.parametrize("name", ["llama", "gemma"])
def test_the_addition_before_a_norm(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no kernel for 1 bit, in which attention could add."""
    monkeypatch.setenv("MLXFUSE_KERNELS", "emulated")
    model = make(name, "affine1")
    for layer in model.layers:
        layer.post_attention_layernorm.weight = mx.random.normal((128,))
    want = logits(model, (5, 1))
    with msl.installed(build="fast"):
        report = patch_model(model, fuse="add_rms_norm,residual")
        got = logits(model, (5, 1))
    assert launches == {"rms_norm": 4}
    assert str(report).splitlines()[0] == "residual 0/2, add+norm 2/2"
    assert apart(got, want) <= BOUND
    assert not np.array_equal(got, want)
    unpatch_model(model)
    assert np.array_equal(logits(model, (5, 1)), want)


@pytest.mark.parametrize("form", ["affine4", "affine8", "mxfp4"])
def test_an_embedding(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLXFUSE_KERNELS", "emulated")
    model = make("llama", form, tie_word_embeddings=True)
    ids = mx.array([[3, 0], [255, 7]])
    rows, want = model.model.embed_tokens(ids), logits(model, (3,))
    with msl.installed(build="fast"):
        report = patch_model(model, fuse="embedding")
        got = model.model.embed_tokens(ids)
        assert launches == {"dequantize": 1}
        # The tied head multiplies as before.
        assert np.array_equal(logits(model, (3,)), want)
    assert len(report.tallies["embedding"].fused) == 1
    assert got.dtype == rows.dtype
    assert mx.array_equal(got, rows)


def test_a_head_that_shares_the_embeddings_weight() -> None:
    model = make("llama", "affine4")
    model.lm_head.weight = model.model.embed_tokens.weight
    report = patch_model(model, fuse="embedding")
    assert [tuple(s) for s in report.skipped] == [
        ("embedding", "model.embed_tokens", "it shares its weight with another module")
    ]


MOE = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "moe_intermediate_size": 64,
    "norm_topk_prob": True,
}


def moe(name: str, form: str, **more: object) -> nn.Module:
    """A model with experts, and with biases of them that matter if it has any."""
    model = make(name, form, **{**MOE, "num_local_experts": 4, "sliding_window": 16, **more})
    for path, module in model.named_modules():
        if "experts" in path and "bias" in module:
            module.bias = mx.random.normal(module.bias.shape)
            mx.eval(module.bias)
    return model


@pytest.mark.parametrize(
    ("name", "form"), [("qwen3_moe", "affine4"), ("gpt_oss", "mxfp4"), ("gpt_oss", "affine8")]
)
def test_experts(name: str, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLXFUSE_KERNELS", "emulated")
    model = moe(name, form)
    before, want = parameters(model), logits(model, (3, 1, 40))
    live = held()
    with msl.installed(build="fast"):
        report = patch_model(model, fuse="experts")
        assert held() <= live
        got = logits(model, (3, 1, 40))
    assert str(report) == "experts 2/2"
    assert launches == {"quantized_matmul": 4}  # two layers, the calls of three and of one
    assert not fallbacks
    assert not np.array_equal(got, want)
    assert apart(got, want) <= BOUND
    assert parameters(model) == before
    unpatch_model(model)
    assert np.array_equal(logits(model, (3, 1, 40)), want)
    if name == "gpt_oss":  # control: the wrong expert's biases are noticed
        for layer in model.layers:
            layer.mlp.experts.up_proj.bias = mx.roll(layer.mlp.experts.up_proj.bias, 1, 0)
        assert apart(logits(model, (3, 1, 40)), want) > 100 * BOUND


# Dispatches that choosing experts saves: softmax, partition, look-up, sum and division less one;
# the addition of the router's bias, partition, look-up and softmax less one.
CHOSEN = {"qwen3_moe": 4, "gpt_oss": 3, "olmoe": 0}


@pytest.mark.parametrize("only", [True, False])
@pytest.mark.parametrize(
    ("name", "form"), [("qwen3_moe", "affine4"), ("gpt_oss", "mxfp4"), ("olmoe", "affine8")]
)
def test_sums_over_experts(
    name: str, form: str, only: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Alone and with gate and up; calls of so many tokens that MLX multiplies are as they were."""
    monkeypatch.setenv("MLXFUSE_KERNELS", "emulated")
    model = moe(name, form)
    before, want = parameters(model), logits(model, (3, 1, 40))
    live, dispatches = held(), per_token(model)[0]
    with msl.installed(build="fast"):
        report = patch_model(model, fuse="experts_sum" if only else "experts,experts_sum")
        assert held() <= live
        got = logits(model, (3, 1, 40))
    assert str(report) == ("" if only else "experts 2/2, ") + "experts sum 2/2"
    chosen = CHOSEN[name]  # in each call and layer; 40 rows of a router MLX multiplies
    products = (4 if only else 8) + 4 * bool(chosen)
    assert launches == Counter({"quantized_matmul": products, "route": 6 * bool(chosen)})
    assert not fallbacks
    assert not np.array_equal(got, want)
    assert apart(got, want) <= BOUND
    # In each layer down and its indices, products and sum; two linears, their indices and the
    # activation less one; and for each linear the look-up of its bias and the addition. Experts
    # are chosen in one.
    bias = 1 if name == "gpt_oss" else 0
    saved = chosen + 3 + 2 * bias + (0 if only else 4 + 4 * bias)
    assert dispatches - per_token(model)[1] == 2 * saved
    assert parameters(model) == before
    unpatch_model(model)
    assert np.array_equal(logits(model, (3, 1, 40)), want)


def test_sums_over_experts_in_another_type_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a result that mlx-lm does not cast, float32 scores make float32."""
    monkeypatch.setenv("MLXFUSE_KERNELS", "emulated")
    model = moe("olmoe", "affine4")
    model.set_dtype(mx.float16)
    block = model.layers[0].mlp
    x, ids = mx.random.normal((3, 128)).astype(mx.float16), mx.array([[0, 1], [2, 3], [1, 3]])
    scores = mx.softmax(mx.random.normal((3, 2)), axis=-1)
    want = (block.switch_mlp(x, ids) * scores[..., None]).sum(axis=-2)
    with msl.installed(build="fast"):
        patch_model(model, fuse="experts_sum")
        got = block.switch_mlp(x, ids, scores)
        assert mx.array_equal(got, want)
        assert got.dtype == want.dtype == mx.float32
        assert not launches
        rounded = block.switch_mlp(x, ids, scores, cast=True)
        mx.eval(rounded)
    assert rounded.dtype == mx.float16
    assert launches == {"quantized_matmul": 1}
    assert mx.allclose(rounded, want, rtol=2e-3, atol=2e-3)


def test_a_clipped_mlp(monkeypatch: pytest.MonkeyPatch) -> None:
    """MiniMax M3's dense layers and shared experts."""
    monkeypatch.setenv("MLXFUSE_KERNELS", "emulated")
    mx.random.seed(0)
    model = DenseMLP(128, 256, activation=SwigluOAI())
    model.eval()
    nn.quantize(model)
    x = 12 * mx.random.normal((3, 128))
    want = model(x)
    with msl.installed(build="fast"):
        assert str(patch_model(model, fuse="gate_up")) == "gate/up 1/1"
        got = model(x)
        mx.eval(got)
    assert launches == {"quantized_matmul": 1}
    assert mx.allclose(got, want, rtol=1e-4, atol=1e-4 * mx.abs(want).max().item())
    other = DenseMLP(128, 256, activation=SwigluOAI(limit=10.0))
    (skip,) = patch_model(other, fuse="all").skipped
    assert skip.reason == "limit of its activation is 10.0, not 7.0"


@pytest.mark.parametrize(
    ("name", "form", "reason"),
    [
        ("qwen3_moe", "affine1", f"no kernel for MLX weights (1, 32, 'affine'): {BITS}"),
        ("qwen3_moe", "dense", "its experts are SwitchLinear"),
    ],
)
def test_experts_that_are_left_alone(name: str, form: str, reason: str) -> None:
    report = patch_model(moe(name, form), fuse="all")
    found = [s for s in report.skipped if s.name == "experts"]
    assert [s.reason for s in found] == [reason] * 2


def test_experts_with_a_scale_each_are_left_alone() -> None:
    """nvfp4 with ``global_scale``, which MLX's CPU does not have; here 1 in another mode."""
    model = moe("qwen3_moe", "mxfp4")
    for module in model.modules():
        if isinstance(module, QuantizedSwitchLinear):
            module.global_scale = mx.ones((module.num_experts,))
    skips = [s for s in patch_model(model, fuse="all").skipped if s.name == "experts"]
    reason = "its experts have a scale each beside those of their groups"
    assert [s.reason for s in skips] == [reason] * 2


def in_groups_of_16(model: nn.Module) -> nn.Module:
    """Its quantised layers as a checkpoint would hold them; MLX multiplies none of these."""
    for module in model.modules():
        if isinstance(module, nn.QuantizedLinear | nn.QuantizedEmbedding):
            factor, module.group_size = module.group_size // 16, 16
            module.scales = mx.repeat(module.scales, factor, axis=-1)
            module.biases = mx.repeat(module.biases, factor, axis=-1)
    return model


def test_groups_of_16() -> None:
    """All there is in mode nvfp4; in mode affine MLX has none, and the reason says so."""
    model = make("llama")
    nn.quantize(model, group_size=16, bits=4, mode="nvfp4")
    want = logits(model)
    report = patch_model(model, fuse="all")
    assert str(report) == "qkv 2/2, gate/up 2/2, residual 2/2, norm+rope 2/2, embedding 1/1"
    assert apart(logits(model), want) <= BOUND
    odd = in_groups_of_16(make("llama", "affine4"))
    reason = "MLX multiplies no weights (4, 16, 'affine'): groups are of (32, 64, 128)"
    skips = [s for s in patch_model(odd, fuse="all").skipped if s.name == "embedding"]
    assert [s.reason for s in skips] == [reason]
    with pytest.raises(RuntimeError, match="group size must be 32, 64 or 128"):
        mx.eval(odd(mx.array([[1]])))


def test_a_checkpoint_in_groups_of_16_is_refused(tmp_path: Path) -> None:
    odd = in_groups_of_16(make("llama", "affine4"))
    mx.save_safetensors(str(tmp_path / "model.safetensors"), dict(tree_flatten(odd.parameters())))
    config = {**SIZES, "model_type": "llama", "quantization": {"bits": 4, "group_size": 16}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedError, match=r"group size 16 is not supported.* 32, 64, and 128"):
        mlxfuse.load(tmp_path)


def test_heads_of_16_are_a_group_of_a_compressed_cache() -> None:
    """mlx-lm's quantised cache has no such groups, and cannot take the heads."""
    model = make("llama", head_dim=16)
    ids = mx.arange(400)[None] % 256
    want = model(ids)[:, 390:]
    with pytest.raises(ValueError, match="divisible by the quantization group size 32"):
        model(ids, cache=[QuantizedKVCache(group_size=32, bits=8) for _ in model.layers])
    patch_model(model, kv_bits="k8v8")
    caches = make_prompt_cache(model)
    model(ids[:, :390], cache=caches)
    got = model(ids[:, 390:], cache=caches)
    assert caches[0].scheme.k.group == 16
    assert 1e-6 < apart(np.array(got), np.array(want)) < 2e-2


def test_large_batches_are_multiplied_by_mlx(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLXFUSE_KERNELS", "emulated")
    model = make("llama", "affine4")
    patch_model(model, fuse="qkv,gate_up")
    with msl.installed(build="fast"):
        model(mx.array([[1] * 9]))
        assert not launches
        model(mx.array([[1]]))
    assert launches == {"quantized_matmul": 4}
    assert not fallbacks


def test_what_runs_without_a_kernel_is_counted() -> None:
    model = make("llama", "affine4")
    report = patch_model(model, fuse="all")
    model(mx.array([[1]]))
    reason = "quantized_matmul: this MLX has no Metal device"
    assert report.fallbacks[reason] == 8
    assert report.as_dict()["fallbacks"] == report.fallbacks


def test_other_types_are_left_to_mlx(monkeypatch: pytest.MonkeyPatch) -> None:
    """MLX's result for float16 activations and float32 scales is float32."""
    monkeypatch.setenv("MLXFUSE_KERNELS", "emulated")
    model = make("llama", "affine4", mx.float16)
    for layer in model.layers:
        layer.self_attn.q_proj.scales = layer.self_attn.q_proj.scales.astype(mx.float32)
        layer.self_attn.q_proj.biases = layer.self_attn.q_proj.biases.astype(mx.float32)
    want = model(mx.array([[1]]))
    report = patch_model(model, fuse="qkv")
    assert {s.reason for s in report.skipped} == {"its linears have different types"}
    assert model(mx.array([[1]])).dtype == want.dtype


def wider_up(model: nn.Module) -> None:
    model.layers[1].mlp.up_proj = nn.QuantizedLinear(128, 192, False, 64, 4)


def deeper_k(model: nn.Module) -> None:
    model.layers[1].self_attn.k_proj = nn.QuantizedLinear(192, 64, False, 64, 4)


def lora(model: nn.Module) -> None:
    attention = model.layers[1].self_attn
    attention.v_proj = LoRALinear.from_base(attention.v_proj)


def subclass(model: nn.Module) -> None:
    mlp = model.layers[1].mlp

    class Louder(type(mlp)):
        def __call__(self, x: mx.array) -> mx.array:
            return 2 * super().__call__(x)

    mlp.__class__ = Louder


def used_twice(model: nn.Module) -> None:
    model.layers[0].mlp = model.layers[1].mlp


def shared_weight(model: nn.Module) -> None:
    model.layers[0].self_attn.k_proj.weight = model.layers[1].self_attn.k_proj.weight


def hooked(model: nn.Module) -> None:
    model.layers[1].self_attn.q_proj.__class__ = type("Hooked", (nn.QuantizedLinear,), {})


def two_types(model: nn.Module) -> None:
    mlp = model.layers[1].mlp
    mlp.up_proj = nn.QuantizedLinear(128, 256, False, 64, 1)


@pytest.mark.parametrize(
    ("change", "fusion", "layers", "reason"),
    [
        (wider_up, "gate_up", [1], "gate has 256 rows and up 192"),
        (deeper_k, "qkv", [1], "its linears have different inputs"),
        (lora, "qkv", [], ""),
        (hooked, "qkv", [1], "its linears are Hooked and quantised"),
        (subclass, "gate_up", [1], ".Louder is not the class that its module has under this name"),
        (used_twice, "gate_up", [0, 1], "it is used in several places"),
        (shared_weight, "qkv", [], ""),
        (two_types, "gate_up", [1], f"no kernel for MLX weights (1, 64, 'affine'): {BITS}"),
    ],
)
def test_what_is_not_certain_is_left_alone(
    change: object, fusion: str, layers: list[int], reason: str
) -> None:
    model = make("llama", "affine4")
    change(model)
    works = change is not deeper_k and change is not wider_up
    want = logits(model) if works else None
    report = patch_model(model, fuse="all")
    found = [s for s in report.skipped if s.name == fusion]
    assert [s.path.split(".")[2] for s in found] == [str(i) for i in layers]
    assert all(s.reason.endswith(reason) for s in found)
    assert len(report.tallies[fusion].fused) == 2 - len(layers)
    if works:
        assert apart(logits(model), want) <= BOUND
    unpatch_model(model)
    if works:
        assert np.array_equal(logits(model), want)
    with (
        pytest.raises(PatchError, match=r"(?s)not everything.*model.layers")
        if layers
        else (threading.Lock())
    ):
        patch_model(model, fuse=fusion, strict=True)
    assert (not layers) == hasattr(model, "_mlxfuse_patch")


def test_dense_weights_that_are_shared_are_not_copied() -> None:
    model = make("llama")
    model.layers[0].self_attn.k_proj.weight = model.layers[1].self_attn.k_proj.weight
    report = patch_model(model, fuse="qkv")
    assert {s.reason for s in report.skipped} == {"k_proj shares its weight with another module"}
    assert len(report.skipped) == 2


def test_an_activation_of_the_same_name_is_another(monkeypatch: pytest.MonkeyPatch) -> None:
    from mlx_lm.models import llama

    monkeypatch.setattr(llama, "swiglu", lambda gate, up: nn.silu(gate) + up)
    report = patch_model(make("llama"), fuse="gate_up")
    assert {s.reason for s in report.skipped} == {"llama.MLP.__call__ has another swiglu"}
    assert not report.fused


def test_a_wrapped_call_is_another(monkeypatch: pytest.MonkeyPatch) -> None:
    from functools import wraps

    from mlx_lm.models import llama

    plain = llama.MLP.__call__

    @wraps(plain)
    def hook(self: nn.Module, x: mx.array) -> mx.array:
        return plain(self, x)

    monkeypatch.setattr(llama.MLP, "__call__", hook)
    report = patch_model(make("llama"), fuse="gate_up")
    assert {s.reason for s in report.skipped} == {"llama.MLP.__call__ is wrapped"}


def test_missing_biases_are_zeros() -> None:
    model = make("qwen2")
    for layer in model.layers:
        del layer.self_attn.k_proj.bias
    want = logits(model)
    assert len(patch_model(model, fuse="qkv").tallies["qkv"].fused) == 2
    assert apart(logits(model), want) <= BOUND
    unpatch_model(model)
    assert "bias" not in model.layers[0].self_attn.k_proj


def test_changed_parameters_are_noticed() -> None:
    model, other = make("llama", "affine4"), make("llama", "affine4")
    patch_model(model, fuse="all")
    for m in (model, other):
        m.layers[0].mlp.down_proj.scales = 3 * m.layers[0].mlp.down_proj.scales
        m.layers[1].self_attn.q_proj.weight = m.layers[0].self_attn.q_proj.weight
    assert np.array_equal(logits(model), logits(other))
    assert fallbacks["FusedMLP", "its arrays are not those that were fused"] == 3
    assert fallbacks["FusedAttention", "its arrays are not those that were fused"] == 3


@pytest.mark.parametrize("training", [True, False])
def test_gradients_are_those_of_the_model(training: bool) -> None:
    def loss(model: nn.Module) -> mx.array:
        return mx.logsumexp(model(mx.array([[1, 2, 3]])), axis=-1).sum()

    model = make("llama")
    model.train(training)
    _, want = nn.value_and_grad(model, loss)(model)
    report = patch_model(model, fuse="all")
    _, got = nn.value_and_grad(model, loss)(model)
    for (name, a), (other, b) in zip(
        nn.utils.tree_flatten(got), nn.utils.tree_flatten(want), strict=True
    ):
        assert name == other
        assert mx.array_equal(a, b)
    # Its parameters are other objects now: patching once more fuses those.
    model.eval()
    assert patch_model(model, fuse="all") is not report
    fallbacks.clear()
    model(mx.array([[1]]))
    assert not any("arrays" in reason for _, reason in fallbacks)


def test_a_check_that_fails_names_the_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("llama", "affine4")
    report = patch_model(model, fuse="all", check=True)
    assert report.check.error <= BOUND
    assert report.check.top1 == 1
    assert report.check.cosine == pytest.approx(1)
    unpatch_model(model)
    want, before = logits(model), parameters(model)

    class Broken(FusedModule):
        def __call__(self, x: mx.array, **options: object) -> mx.array:
            return 1.1 * self._fused.original.__call__(self, x)

    def detector(tree: mlxfuse.fusion.Tree) -> Iterator[mlxfuse.fusion.Candidate]:
        from mlxfuse.nn.fused import adopt, release
        from mlxfuse.nn.mlp import MLPForm

        mlp = tree.model.layers[1].mlp

        def undo() -> None:
            mlp._fused.up = None
            release(mlp)

        yield mlxfuse.fusion.Candidate(
            "broken",
            100,
            "model.layers.1.mlp",
            frozenset({"model.layers.1.mlp"}),
            lambda: adopt(mlp, Broken, MLPForm(type(mlp), (), "down_proj", "swiglu", up=True)),
            undo,
            "wrong",
        )

    with pytest.raises(PatchError, match=r"broken of model\.layers\.1\.mlp changes the logits"):
        patch_model(model, fuse="all", check=True, detectors=[detector])
    assert np.array_equal(logits(model), want)
    assert parameters(model) == before
    # It takes the whole of the MLP, so that nothing below is fused.
    report = patch_model(model, fuse="all", detectors=[detector])
    reason = "broken of model.layers.1.mlp is fused there"
    assert [tuple(s) for s in report.skipped if s.path.startswith("model.layers.1")] == [
        ("gate_up", "model.layers.1.mlp", reason),
        ("residual", "model.layers.1", reason),
    ]
    unpatch_model(model)
    assert np.array_equal(logits(model), want)


def test_fusions_are_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("llama", "affine4")
    monkeypatch.setenv("MLXFUSE_DISABLE", "residual, qkv:model.layers.0.*")
    report = patch_model(model, fuse="all,-gate_up:*.1.mlp")
    assert {name: len(t.fused) for name, t in report.tallies.items()} == {
        "qkv": 1,
        "gate_up": 1,
        "residual": 0,
        "norm_rope": 2,
        "embedding": 1,
    }
    assert ("gate_up", "model.layers.1.mlp", "switched off by fuse") in report.skipped
    assert ("residual", "model.layers.1", "switched off by MLXFUSE_DISABLE") in report.skipped
    # The same again is nothing; something else is made anew.
    assert patch_model(model, fuse="all,-gate_up:*.1.mlp") is report
    monkeypatch.delenv("MLXFUSE_DISABLE")
    assert len(patch_model(model, fuse="all").tallies["qkv"].fused) == 2
    monkeypatch.setenv("MLXFUSE_DISABLE", "qvk")
    with pytest.raises(ValueError, match=r"MLXFUSE_DISABLE takes names: qkv, .*; found qvk"):
        patch_model(model, fuse="all")


def test_what_cannot_be_patched_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("llama")
    with pytest.raises(TypeError, match=r"found a tuple; take it apart first: model, tokenizer"):
        patch_model((model, None))
    for fuse in (True, 3, ["qkv", 1]):
        with pytest.raises(TypeError, match=r"fuse is auto, all, off or names .*; found "):
            patch_model(model, fuse=fuse)
    with pytest.raises(FusionNameError, match=r"all, off or names: qkv, .*, int8; found qvk$"):
        patch_model(model, fuse="qvk")
    monkeypatch.setenv("MLXFUSE_KERNELS", "reference")
    report = patch_model(model)
    assert str(report) == "nothing fused: MLXFUSE_KERNELS is reference"
    assert report.as_dict()["nothing"] == "MLXFUSE_KERNELS is reference"
    with pytest.raises(PatchError, match="nothing can be fused: MLXFUSE_KERNELS is reference"):
        patch_model(model, strict=True)
    assert str(patch_model(model, fuse="off")) == "nothing fused"


def test_strict_covers_int8_activations() -> None:
    model = make("llama", "affine1")
    want = {path: type(m) for path, m in model.named_modules()}
    with pytest.raises(PatchError, match=r"int8 of model\.layers\.0"):
        patch_model(model, fuse="qkv,gate_up", act_quant="on", strict=True)
    assert {path: type(m) for path, m in model.named_modules()} == want


def test_kernels_are_switched_off_after_patching(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLXFUSE_KERNELS", "emulated")
    model = make("llama", "affine4")
    want = logits(model, (1,))
    with msl.installed(build="fast"):
        patch_model(model)
        logits(model, (1,))
        ran = launches.total()
        assert ran
        monkeypatch.setenv("MLXFUSE_KERNELS", "reference")
        assert apart(logits(model, (1,)), want) <= BOUND
    assert launches.total() == ran


def tokens(model: nn.Module, count: int) -> list[int]:
    cache, found = make_prompt_cache(model), [1]
    for _ in range(count):
        y = model(mx.array([[found[-1]]]), cache=cache)
        found.append(mx.argmax(y[0, -1]).item())
    return found


def test_threads_do_not_disturb_each_other() -> None:
    models = [make("llama", "affine4"), make("qwen3", "affine8")]
    want = [tokens(m, 24) for m in models]
    patch_model(models[0], fuse="all")
    found: dict[int, list[list[int]]] = {0: [], 1: []}
    done = threading.Event()

    def generate(i: int) -> None:
        with mx.stream(mx.new_stream(mx.cpu)):
            for _ in range(3):
                found[i].append(tokens(models[i], 24))

    def disturb() -> None:
        # Patching, counting and checking in a third thread.
        with mx.stream(mx.new_stream(mx.cpu)):
            while not done.is_set():
                other = make("llama", "affine4", num_hidden_layers=1)
                assert patch_model(other, fuse="all", check=True).dispatches

    threads = [threading.Thread(target=generate, args=(i,)) for i in (0, 1)]
    third = threading.Thread(target=disturb)
    for thread in (*threads, third):
        thread.start()
    for thread in threads:
        thread.join()
    done.set()
    third.join()
    assert found == {0: [want[0]] * 3, 1: [want[1]] * 3}


def test_only_the_instance_is_changed() -> None:
    one, other = make("llama"), make("llama")
    kinds = {path: type(m) for path, m in other.named_modules()}
    patch_model(one, fuse="all")
    assert {path: type(m) for path, m in other.named_modules()} == kinds
    assert not hasattr(other, "_mlxfuse_patch")
    assert SIZES["num_hidden_layers"] == len(one.layers)
