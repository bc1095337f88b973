"""Dispatches of one decoded token, counted in the graph."""

from collections import Counter
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.models import llama, qwen3
from mlx_lm.models.cache import ArraysCache, make_prompt_cache

from mlxfuse.errors import KernelError
from mlxfuse.fusion import patch_model, unpatch_model
from mlxfuse.fusion.dispatches import dispatches, per_token
from mlxfuse.kernels import using
from mlxfuse.kernels.runtime import backend as _backend
from mlxfuse.kernels.runtime.backend import Counting
from mlxfuse.loader import load
from tests import dispatches as command
from tests.dispatches import of_layer, stock
from tests.fusion import zoo
from tests.fusion.stock import make
from tests.models import tiny

MATMUL = "quantized_matmul"
LAYER = {
    "rms_norm": 2,
    MATMUL: 4,
    "norm_rope": 1,
    "SliceUpdate": 2,
    "scaled_dot_product_attention": 1,
}


@pytest.mark.parametrize("name", ["llama-q4", "llama", "qwen2", "qwen3", "phi3"])
def test_a_layer_of_a_gguf_file_takes_ten(name: str, tmp_path: Path) -> None:
    path = tiny.write(tmp_path / "m.gguf", tiny.build(name, 0))
    model, _ = load(path, fuse="all")
    assert of_layer(model) == LAYER


@pytest.mark.parametrize("module", [llama, qwen3])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_layer_of_mlx_lm_takes_ten(module: object, bits: int) -> None:
    model = stock(module, bits)
    before = of_layer(model)
    assert before["QuantizedMatmul"] == 7
    assert before.total() == (19 if module is qwen3 else 17)
    report = patch_model(model, fuse="all")
    assert of_layer(model) == LAYER
    saved = before.total() - 10
    assert report.dispatches == per_token(model)
    assert report.dispatches[0] - report.dispatches[1] >= saved


def test_what_it_takes_unfused(tmp_path: Path) -> None:
    """Control: every fusion that is missing is counted."""
    path = tiny.write(tmp_path / "m.gguf", tiny.build("llama-q4", 0))
    model, _ = load(path, fuse="qkv,gate_up")
    found = of_layer(model)
    assert found[MATMUL] == 4
    assert (found["Add"], found["rope"]) == (2, 2)
    unpatch_model(model)
    unfused = of_layer(model)
    assert unfused[MATMUL] == 7
    dense = of_layer(load(path)[0])
    assert dense["Matmul"] == 7
    # A compiled group is one.
    assert unfused["Compiled"] == dense["Compiled"] == 1
    assert unfused.total() == dense.total() == 17


@pytest.mark.parametrize("name", ["gemma2", "gemma3"])
def test_gemmas_norms_and_additions_take_three(name: str, tmp_path: Path) -> None:
    path = tiny.write(tmp_path / "m.gguf", tiny.build(name, 0))
    model, _ = load(path, fuse="all")
    found = of_layer(model)
    assert found[MATMUL] == 4
    unpatch_model(model)
    unfused = of_layer(model)
    assert unfused[MATMUL] == 7
    assert found["rms_norm"] == 3  # 6 and an addition to each weight
    assert unfused["rms_norm"] == 6 if name == "gemma3" else 4
    assert found.total() == 11
    assert found["compressed_sdpa"] == (name == "gemma2")  # scores with a cap, and what they weigh


@pytest.mark.parametrize(
    ("name", "layer", "outside"), [("gemma", 10, 4), ("gemma2", 10, 8), ("gemma3_text", 10, 6)]
)
def test_gemmas_add_nothing_to_their_norms(name: str, layer: int, outside: int) -> None:
    """Outside: the embedding and its scale, the last norm and the head; the first norm of a layer,
    which the one before gives, of the first one; a cap, and a scale in another type.
    """
    model = zoo.build(name, "affine4")
    norm, want = model.model.norm, zoo.logits(model)
    report = patch_model(model, fuse="all")
    assert (report.dispatches or (0, 0))[1] == layer * len(model.layers) + outside
    assert len(report.tallies["offset_norm"].fused) == (9 if name == "gemma" else 1)
    assert zoo.apart(zoo.logits(model), want) < 1e-5
    norm.weight = norm.weight[::-1] + 1
    changed = zoo.logits(model)
    assert zoo.apart(changed, want) > 1e-2
    unpatch_model(model)
    assert zoo.apart(changed, zoo.logits(model)) < 1e-5


@pytest.mark.parametrize(
    ("name", "count"),
    [
        *(("olmo2", 10), ("olmo3", 10), ("exaone4", 10), ("glm4", 11)),
        ("muse_glimmer", 12),  # one for the gate of its attention
        *(("cohere2", 9), ("phi", 9)),  # one norm, which attention and MLP read
    ],
)
def test_a_dense_layer_takes_twelve_at_most(name: str, count: int) -> None:
    """Norms of q and k and their rotation are one; additions are in the products before them."""
    model = zoo.build(name, "affine4")
    before = of_layer(model)
    patch_model(model, fuse="all")
    found = of_layer(model)
    assert (found.total(), found["rope"]) == (count, 0)
    assert before.total() > count + 5


@pytest.mark.parametrize("name", ["muse_glimmer", "exaone4"])
def test_norms_of_heads_that_are_not_turned(name: str) -> None:
    """They are one dispatch too; exaone4's last layer in four turns nothing."""
    model = zoo.build(name, "affine4")
    patch_model(model, fuse="all")
    attention = model.layers[3].self_attn
    assert not attention._fused.rope
    x = mx.zeros((1, 1, model.args.hidden_size))
    mx.eval(x)
    found = dispatches(lambda: attention(x))
    assert (found["norm_rope"], found["rms_norm"], found["rope"]) == (1, 0, 0)


@pytest.mark.parametrize(
    ("name", "count"), [("qwen3_moe", 12), ("gpt_oss", 12), ("mixtral", 12), ("qwen2_moe", 14)]
)
def test_a_layer_of_experts(name: str, count: int) -> None:
    """Five where experts are: the norm, the router, their choice, and two products. A shared
    expert takes two, its gate none.
    """
    model = zoo.build(name, "affine4")
    report = patch_model(model, fuse="all")
    before, after = report.dispatches or (0, 0)
    outside = 3  # the row of the embedding, the last norm and the head
    assert after - outside == count * len(model.layers)
    assert before - outside > 26 * len(model.layers)


@pytest.mark.parametrize(
    ("name", "net", "attention"), [("qwen3_5", 8, 11), ("qwen3_5_moe", 12, 15)]
)
def test_a_layer_of_a_delta_net(name: str, net: int, attention: int) -> None:
    """A convolution, and the step with all norms; attention's gate takes one of its own."""
    model = zoo.build(name, "affine4")
    report = patch_model(model, fuse="all")
    before, after = report.dispatches or (0, 0)
    assert after == 3 + 3 * net + attention
    assert before > 2 * after


@pytest.mark.parametrize("name", ["glm4_moe", "deepseek_v3", "dots1", "exaone_moe"])
def test_a_router_of_sigmoids(name: str) -> None:
    """One dispatch behind its product, and no addition beside it; it is the router as it is now."""
    model = zoo.build(name, "affine4")
    want = zoo.logits(model)
    patch_model(model, fuse="all")
    cache = make_prompt_cache(model)
    with using(Counting(Counter())):
        mx.eval(model(mx.array([[1, 2]]), cache=cache))
        found = dispatches(lambda: model(mx.array([[3]]), cache=cache))
    routers = [layer.mlp.gate for layer in model.layers if "gate" in layer.mlp]
    assert found["route"] == len(routers) == 3
    assert not {"Add", "ArgPartition", "Compiled", "Sigmoid", "Sum"} & set(found)
    assert zoo.apart(zoo.logits(model), want) < 1e-5
    last = want
    for change in (
        lambda gate: setattr(gate, "e_score_correction_bias", -gate.e_score_correction_bias),
        lambda gate: setattr(gate, "routed_scaling_factor", gate.routed_scaling_factor * 2),
    ):
        for gate in routers:
            change(gate)
        changed = zoo.logits(model)
        assert zoo.apart(changed, last) > 1e-3
        last = changed
    unpatch_model(model)
    assert zoo.apart(last, zoo.logits(model)) < 1e-5


def test_granites_experts_are_chosen_by_a_module_of_their_own() -> None:
    """As that module says now, and by no other in its place."""
    model = zoo.build("granitemoe", "affine4")
    stock = zoo.logits(model)
    patch_model(model, fuse="all")
    assert zoo.apart(zoo.logits(model), stock) < 1e-5
    assert of_layer(model)["route"] == 1
    block = model.layers[0].block_sparse_moe
    router = block.router
    router.top_k = 1
    assert of_layer(model)["route"] == 0
    router.top_k = 2
    block.router = type(router)(router.input_size, router.num_experts, 2)
    assert of_layer(model)["route"] == 0


@pytest.mark.parametrize(("name", "outside"), [("mamba2", 3), ("nemotron_h", None)])
def test_a_mixer_of_mamba_takes_five(name: str, outside: int | None) -> None:
    """Its linears, the convolution, the step and the norm; the layer's norm and addition."""
    model = zoo.build(name, "affine4")
    report = patch_model(model, fuse="all")
    found = of_layer(model)
    assert found.total() == 7
    assert all(found[op] == 1 for op in ("causal_conv", "ssm_step", "gated_norm"))
    if outside is not None:
        assert (report.dispatches or (0, 0))[1] == 7 * len(model.layers) + outside


def test_a_mixer_of_mamba_goes_on_by_its_own_code() -> None:
    """Where tokens are masked or sequences end apart, without a cache, and with several tokens."""
    model = zoo.build("mamba2", "affine4")
    patch_model(model, fuse="all")
    mixer, cache = model.layers[0].mixer, make_prompt_cache(model)
    for tokens in ([[1, 2, 3]], [[4]]):
        mx.eval(model(mx.array(tokens), cache=cache), [c.state for c in cache])
    x, mask = mx.zeros((1, 1, model.args.hidden_size)), mx.array([[True]])
    mx.eval(x, mask)

    def steps(x: mx.array, mask: mx.array | None, cache: ArraysCache | None) -> int:
        def call() -> list[mx.array]:
            return [mixer(x, mask, cache), *(cache.cache if cache else [])]

        found = dispatches(call)["ssm_step"]
        mx.eval(cache.cache if cache else [])
        return found

    assert steps(x, None, cache[0]) == 1
    assert steps(x, mask, cache[0]) == 0
    assert steps(x, None, None) == 0
    assert steps(mx.concatenate([x, x], axis=1), None, cache[0]) == 0
    cache[1].lengths = mx.array([1])
    assert steps(x, None, cache[1]) == 0
    cache[2][1] = cache[2][1].astype(mx.float16)
    mx.eval(cache[2].cache)
    assert steps(x, None, cache[2]) == 0
    weight = mixer.norm.weight
    mixer.norm.weight = mx.zeros_like(weight)
    mx.eval(mixer.norm.weight)
    assert steps(x, None, cache[0]) == 0


def test_a_mixer_with_another_method_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = zoo.build("mamba2", "affine4")

    def _conv(self: nn.Module, x: mx.array, cache: object, mask: object) -> mx.array:
        return x

    monkeypatch.setattr(type(model.layers[0].mixer), "_conv", _conv)
    report = patch_model(model, fuse="all")
    assert not report.tallies["ssm"].fused
    assert "mamba2.Mamba2Block._conv is not a body that is known" in str(report)


def test_a_layer_of_ministral() -> None:
    """What multiplies the queries is one of eleven; a token's numbers for that take ten."""
    model = zoo.build("ministral3", "affine4")
    before, after = patch_model(model, fuse="all").dispatches or (0, 0)
    assert after - 3 - 10 == 11 * len(model.layers)
    assert before - 6 - 10 == 18 * len(model.layers)


@pytest.mark.parametrize("name", ["granite", "minicpm"])
def test_a_layer_that_multiplies_what_it_adds(name: str) -> None:
    """The number, the addition and the next norm are one of ten; the token's own take five, and the
    first norm one.

    A number that is set later is the one that counts.
    """
    model = zoo.build(name, "affine4")
    stock = zoo.logits(model)
    report = patch_model(model, fuse="all")
    before, after = report.dispatches or (0, 0)
    assert (before - 8, after - 6) == (19 * len(model.layers), 10 * len(model.layers))
    layer, number = model.layers[0], {"granite": "residual_multiplier", "minicpm": "scale_depth"}
    assert zoo.apart(zoo.logits(model), stock) < 1e-5
    setattr(layer, number[name], 3.0)
    changed = zoo.logits(model)
    assert zoo.apart(changed, stock) > 1e-2
    unpatch_model(model)
    assert zoo.apart(changed, zoo.logits(model)) < 1e-5


def test_a_layer_that_multiplies_by_no_number_is_left_alone() -> None:
    model = zoo.build("granite", "affine4")
    model.layers[0].residual_multiplier = mx.array(0.5)
    report = patch_model(model, fuse="all")
    assert len(report.tallies["post_norm"].fused) == len(model.layers) - 1
    assert "is not a positive number" in str(report)


def test_a_layer_of_gemma4() -> None:
    """Its norms, additions and the scalar are one each; the scalar is the one it has now."""
    model = zoo.build("gemma4_text", "affine4")
    report = patch_model(model, fuse="all")
    assert report.dispatches == (128, 61)
    before = zoo.logits(model)
    model.layers[1].layer_scalar = model.layers[1].layer_scalar * 3
    changed = zoo.logits(model)
    assert zoo.apart(changed, before) > 1e-3
    unpatch_model(model)
    assert zoo.apart(changed, zoo.logits(model)) < 1e-5


def test_experts_are_chosen_as_the_block_says_now() -> None:
    model = zoo.build("qwen3_moe", "affine4")
    patch_model(model, fuse="all")
    block, x = model.layers[1].mlp, mx.zeros((1, 1, model.args.hidden_size))
    mx.eval(x)

    def chosen() -> int:
        return dispatches(lambda: block(x))["route"]

    assert chosen() == 1
    for name in ("top_k", "norm_topk_prob"):
        before = getattr(block, name)
        setattr(block, name, 1 - before)
        assert chosen() == 0, name
        setattr(block, name, before)
    assert chosen() == 1


def test_a_report_counts_a_token_that_is_as_all_that_follow() -> None:
    """gpt-oss has sliding caches, which grow with the first token after a prompt."""
    model = zoo.build("gpt_oss", "affine4")
    report = patch_model(model, fuse="all")
    cache = make_prompt_cache(model)
    with using(Counting(Counter())):
        for tokens in ([[1, 2, 3, 4]], [[5]], [[6]], [[7]]):
            mx.eval(model(mx.array(tokens), cache=cache))
    found = dispatches(lambda: model(mx.array([[8]]), cache=cache))
    assert report.dispatches[1] == found.total()
    assert not {"Full", "Concatenate"} & set(found)


def test_a_report_of_a_model_that_cannot_be_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    model = zoo.build("llama", "affine4")
    report = patch_model(model, fuse="all")

    def fails(model: nn.Module) -> None:
        raise ValueError

    monkeypatch.setattr("mlxfuse.fusion.patch.per_token", fails)
    assert report.dispatches is None
    assert report.as_dict()["dispatches"] is None


def test_what_is_counted() -> None:
    x = mx.ones((1, 1, 8))
    mx.eval(x)
    assert dispatches(lambda: (x + 1).reshape(8) * 2) == {"Add": 1, "Multiply": 1}
    compiled = mx.compile(lambda x: (x + 1) * 2)
    assert dispatches(lambda: compiled(x)) == {"Compiled": 1}
    assert dispatches(lambda: mx.fast.rms_norm(x, None, 1e-5)) == {"rms_norm": 1}
    assert dispatches(lambda: mx.fast.rms_norm(x, None, 1e-5) @ mx.eye(8))["Matmul"] == 1
    with pytest.raises(ValueError, match="what it launches used"):
        dispatches(lambda: (mx.fast.rms_norm(x, None, 1e-5), x)[1])

    # What a model orders itself launches nothing.
    def ordered() -> mx.array:
        return mx.depends(mx.fast.rms_norm(x, None, 1e-5), x + 1)

    assert dispatches(ordered) == {"rms_norm": 1, "Add": 1}
    # Nothing is left behind.
    assert mx.fast.rms_norm(x, None, 1e-5).tolist()[0][0][0] == pytest.approx(1, abs=1e-4)


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    command.main()
    rows = [line.split("|")[1:3] for line in capsys.readouterr().out.splitlines()[2:]]
    found = Counter({name.strip(): int(count) for name, count in rows})
    assert found == {"llama": 17, "llama, patched": 10, "qwen3": 19, "qwen3, patched": 10}


def test_a_count_where_a_fallback_would_raise(monkeypatch: pytest.MonkeyPatch) -> None:
    """A refusal is no error here: of mxfp4 rows, MLX's results have another type than kernels'."""
    model = make("llama", "mxfp4")
    report = patch_model(model, fuse="all")
    want = per_token(model)
    monkeypatch.setenv("MLXFUSE_KERNELS", "metal")
    with pytest.raises(KernelError, match="no Metal device"):
        model(mx.array([[1]]))
    monkeypatch.setattr(_backend, "_no_device", lambda: None)
    assert report.as_dict()["dispatches"] == {"before": want[0], "after": want[1]}
