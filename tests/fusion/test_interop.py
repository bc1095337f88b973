"""Patched models in mlx-lm's own functions give what stock models give."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.generate import BatchGenerator, batch_generate, stream_generate
from mlx_lm.models.cache import (
    load_prompt_cache,
    make_prompt_cache,
    save_prompt_cache,
    trim_prompt_cache,
)
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.tuner.utils import linear_to_lora_layers
from mlx_lm.utils import save
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mlxfuse.fusion import patch_model, unpatch_model
from mlxfuse.kernels import launches
from tests import msl
from tests.fusion import zoo
from tests.fusion.configs import VOCABULARY, config

# Affine weights with a tied head, dense ones with norms of the heads, and a rotating cache.
MODELS = (("llama", "affine4"), ("qwen3", "float32"), ("gemma3_text", "mxfp4"))
PROMPT = [3, 14, 15, 9, 26, 5, 35, 8, 9, 7, 9, 32, 38]
COUNT = 12


@pytest.fixture(autouse=True)
def reference(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("MLXFUSE_KERNELS", "reference")
    with zoo.uncompiled():
        yield


@pytest.fixture(scope="module")
def tokenizer() -> TokenizerWrapper:
    """A word for each id, and no end."""
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w63")
    return TokenizerWrapper(fast, eos_token_ids=[VOCABULARY])


@pytest.fixture(params=MODELS, ids=lambda m: m[0])
def pair(request: pytest.FixtureRequest) -> tuple[nn.Module, nn.Module]:
    """A stock model and the same one patched."""
    return zoo.build(*request.param), patched(*request.param)


def patched(*build: Any) -> nn.Module:
    model = zoo.build(*build)
    report = patch_model(model, fuse="all")
    assert report.tallies["qkv"].fused
    assert report.tallies["gate_up"].fused
    return model


def tokens(model: nn.Module, tokenizer: TokenizerWrapper, prompt: Any = PROMPT, **more: Any):
    return [r.token for r in stream_generate(model, tokenizer, prompt, max_tokens=COUNT, **more)]


def same(function: Callable[[nn.Module], Any], pair: tuple[nn.Module, nn.Module]) -> Any:
    """What the function gives for both, which must be equal."""
    stock, ours = function(pair[0]), function(pair[1])
    assert stock == ours
    return ours


def test_generate(pair, tokenizer) -> None:
    def words(model):
        return mlx_lm.generate(model, tokenizer, "w3 w14 w15", max_tokens=COUNT)

    assert len(same(words, pair)) > COUNT
    assert len(set(same(lambda m: tuple(tokens(m, tokenizer)), pair))) > 3


def test_generate_with_kernels(tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each decoded token goes through the Metal source."""
    want = tokens(zoo.build("llama", "affine4"), tokenizer)
    monkeypatch.setenv("MLXFUSE_KERNELS", "emulated")
    model = patched("llama", "affine4")
    launches.clear()
    with msl.installed(build="fast"):
        assert tokens(model, tokenizer) == want
    # The last token's logits are built, but no one asks for what would follow.
    assert launches["quantized_matmul"] >= (COUNT - 1) * 4 * len(model.layers)


def test_log_probabilities(pair, tokenizer) -> None:
    stock, ours = (
        np.array([r.logprobs for r in stream_generate(m, tokenizer, PROMPT, max_tokens=4)])
        for m in pair
    )
    assert np.abs(stock - ours).max() <= 1e-4


def test_prefill_in_steps(pair, tokenizer) -> None:
    same(lambda m: tokens(m, tokenizer, prefill_step_size=5), pair)


def test_mlx_lms_quantised_cache(tokenizer) -> None:
    both = zoo.build("llama", head_dim=32), zoo.build("llama", head_dim=32)
    patch_model(both[1], fuse="all")
    same(lambda m: tokens(m, tokenizer, kv_bits=8, kv_group_size=32, quantized_kv_start=4), both)


def test_prompt_cache(pair, tokenizer, tmp_path: Path) -> None:
    """Written by one of them and read by the other, then trimmed."""
    stock, ours = pair
    written, read = make_prompt_cache(ours), tmp_path / "cache.safetensors"
    mx.eval(ours(mx.array([PROMPT[:6]]), cache=written))
    save_prompt_cache(str(read), written)

    def go_on(model):
        return tokens(model, tokenizer, PROMPT[6:], prompt_cache=load_prompt_cache(str(read)))

    assert same(go_on, pair) == tokens(stock, tokenizer)


def test_trimming(pair, tokenizer) -> None:
    def again(model):
        state = make_prompt_cache(model)
        mx.eval(model(mx.array([PROMPT[:6]]), cache=state))
        assert trim_prompt_cache(state, 2) == 2
        return tokens(model, tokenizer, PROMPT[4:], prompt_cache=state)

    assert same(again, pair) == tokens(pair[0], tokenizer)


def test_batches(pair, tokenizer) -> None:
    prompts = [PROMPT, PROMPT[:3], PROMPT[4:9]]

    def together(model):
        found = batch_generate(model, tokenizer, prompts, max_tokens=COUNT, return_token_ids=True)
        return found.token_ids

    assert same(together, pair) == [tokens(pair[0], tokenizer, p) for p in prompts]


def test_batches_that_grow(pair, tokenizer) -> None:
    def joined(model):
        """A prompt comes while another is being answered."""
        batch = BatchGenerator(model, max_tokens=COUNT)
        found: dict[int, list[int]] = {}
        batch.insert([PROMPT])
        for step in range(3 * COUNT):
            if step == 4:
                batch.insert([PROMPT[:5]])
            for response in batch.next_generated():
                found.setdefault(response.uid, []).append(response.token)
        batch.close()
        return list(found.values())

    assert same(joined, pair) == [tokens(pair[0], tokenizer, p) for p in (PROMPT, PROMPT[:5])]


@pytest.mark.parametrize("form", ["affine4", "float32"])
def test_speculation(form: str, tokenizer) -> None:
    want = tokens(zoo.build("llama", form), tokenizer)
    drafts = (zoo.build("llama", "affine8"), patched("llama", "affine8"))
    for draft in drafts:
        found = stream_generate(
            patched("llama", form), tokenizer, PROMPT, max_tokens=COUNT, draft_model=draft
        )
        found = list(found)
        assert [r.token for r in found] == want
        assert any(r.from_draft for r in found)


def test_weights_are_saved_under_mlx_lms_names(pair, tmp_path: Path) -> None:
    stock, ours = pair
    before = dict(tree_flatten(stock.parameters()))
    ours.save_weights(str(tmp_path / "w.safetensors"))
    saved = mx.load(str(tmp_path / "w.safetensors"))
    assert saved.keys() == before.keys()
    assert all(mx.array_equal(saved[name], before[name]) for name in before)


def test_saved_models_load(pair, tokenizer, tmp_path: Path) -> None:
    stock, ours = pair
    (tmp_path / "source").mkdir()
    name = stock.model_type
    form = zoo.FORMS[dict(MODELS)[name]]
    made = config(name) | ({"quantization": form} if form else {})
    save(tmp_path / "saved", tmp_path / "source", ours, tokenizer, made, donate_model=False)
    loaded, _ = mlx_lm.load(str(tmp_path / "saved"))
    assert np.array_equal(zoo.logits(loaded), zoo.logits(stock))


def test_weights_can_be_replaced(pair, tmp_path: Path) -> None:
    stock, ours = pair
    other = zoo.build(stock.model_type, dict(MODELS)[stock.model_type])
    other.update({"model": {"norm": {"weight": 3 * other.model.norm.weight}}})
    other.layers[0].self_attn.k_proj.update({"weight": other.layers[1].self_attn.k_proj.weight})
    other.save_weights(str(tmp_path / "w.safetensors"))
    ours.load_weights(str(tmp_path / "w.safetensors"))
    assert zoo.apart(zoo.logits(ours), zoo.logits(other)) <= 1e-5
    assert zoo.apart(zoo.logits(ours), zoo.logits(stock)) > 1e-2


def test_lora_before_the_patch_is_added_beside_what_is_fused(tokenizer) -> None:
    def adapted():
        model = zoo.build("llama", "affine4")
        linear_to_lora_layers(model, 2, {"rank": 4, "scale": 2.0, "dropout": 0.0})
        for _, module in model.named_modules():
            if "lora_b" in module:
                module.lora_b = mx.full(module.lora_b.shape, 0.25)
        return model

    both = adapted(), adapted()
    for model in both:
        for (_, a), (_, b) in zip(both[0].named_modules(), model.named_modules(), strict=True):
            if "lora_a" in a:
                b.lora_a = a.lora_a
    report = patch_model(both[1], fuse="all")
    assert "gate_proj and up_proj have adapters, added before the activation" in str(report)
    assert len(report.tallies["qkv"].fused) == report.tallies["qkv"].total
    assert len(report.tallies["gate_up"].fused) == report.tallies["gate_up"].total - 2
    assert zoo.apart(zoo.logits(both[1]), zoo.logits(both[0])) <= 1e-5
    assert tokens(both[1], tokenizer) != tokens(zoo.build("llama", "affine4"), tokenizer)


@pytest.mark.parametrize("first", ["patch", "set_dtype"])
def test_other_types(pair, first: str) -> None:
    stock, ours = pair
    want = zoo.logits(stock)
    if first == "set_dtype":
        unpatch_model(ours)
    for model in (stock, ours):
        model.set_dtype(mx.float16)
    patch_model(ours, fuse="all")
    dtypes = [model(mx.array([PROMPT])).dtype for model in (stock, ours)]
    assert dtypes[0] == dtypes[1]
    got, half = zoo.logits(ours), zoo.logits(stock)
    # Both are roundings of the float32 logits, in other places.
    assert 0 < zoo.apart(got, want) <= 1.5 * zoo.apart(half, want)


def test_two_models_in_two_threads(tokenizer) -> None:
    """Each gives what it gives alone."""
    built = [patched("llama", "affine4"), patched("qwen3", "affine8")]
    want = [tokens(model, tokenizer) for model in built]

    def run(model: nn.Module) -> list[list[int]]:
        with mx.stream(mx.new_stream(mx.default_device())):
            return [tokens(model, tokenizer) for _ in range(4)]

    with ThreadPoolExecutor(2) as pool:
        for found, alone in zip(pool.map(run, built), want, strict=True):
            assert found == [alone] * 4


def loss(model: nn.Module) -> mx.array:
    answers = model(mx.array([PROMPT[:-1]]))
    return nn.losses.cross_entropy(answers, mx.array([PROMPT[1:]])).mean()


def test_gradients(pair) -> None:
    """Of the reference, since kernels have none."""
    found = []
    for model in pair:
        model.train()
        value, gradients = nn.value_and_grad(model, loss)(model)
        found.append({"loss": value, **dict(tree_flatten(gradients))})
    stock, ours = found
    assert ours.keys() == stock.keys()
    for name in stock:
        if mx.issubdtype(stock[name].dtype, mx.floating):
            assert zoo.apart(np.array(ours[name]), np.array(stock[name])) <= 1e-4, name
