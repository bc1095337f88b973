"""Compressed caches in models: the same logits where nothing is lost, reasons where none fits."""

import itertools
import json
import subprocess
import sys
from dataclasses import replace
from importlib import import_module

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import (
    KVCache,
    RotatingKVCache,
    load_prompt_cache,
    make_prompt_cache,
    save_prompt_cache,
)
from typer.testing import CliRunner

from mlxfuse.cli import app
from mlxfuse.errors import MLXFuseError, PromptCacheError, UnsupportedError
from mlxfuse.fusion import patch_model
from mlxfuse.generate import prompt_cache
from mlxfuse.generate.perplexity import Way, perplexity
from mlxfuse.loader import load
from mlxfuse.nn.kv.cache import CompressedKVCache
from mlxfuse.nn.kv.options import KVOptions, check_model, compress_caches, compressed, plain_caches
from tests.models import tiny

# Largest mean KLD from the plain cache.
BARS = {"k8v8": 5e-4, "k8v4": 8e-3}
LOSSLESS = KVOptions(16, 16, rotate=False)
TOKENS = 230


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """name -> (path, model), each loaded once."""
    folder, made = tmp_path_factory.mktemp("models"), {}

    def get(name):
        if name not in made:
            path = tiny.write(folder / f"{name}.gguf", tiny.build(name, 0))
            made[name] = str(path), load(path)[0]
        return made[name]

    return get


def logits(model, caches, steps):
    ids = mx.random.randint(0, 250, (1, TOKENS), key=mx.random.key(0))
    rows, start, turn = [], 0, 0
    while start < TOKENS:
        stop = start + steps[turn % len(steps)]
        rows.append(model(ids[:, start:stop], cache=caches))
        mx.eval(rows[-1], [c.state for c in caches])
        start, turn = stop, turn + 1
    return mx.concatenate(rows, axis=1)


@pytest.mark.parametrize(
    "name", ["llama", "qwen3", "phi3", "gemma2", "gemma3", "gemma4", "gemma4-e4b"]
)
def test_logits_are_the_plain_ones_where_nothing_is_lost(name, models, tmp_path):
    _, model = models(name)
    want = logits(model, plain_caches(model), (TOKENS,))
    noise = mx.abs(logits(model, plain_caches(model), (64, 1, 5)) - want).max().item()
    patched, _ = load(models(name)[0])
    assert patch_model(patched, fuse="qkv").tallies["qkv"].fused
    for one, steps in ((model, (64, 1, 5)), (patched, (64, 1, 5)), (patched, (100,))):
        got = logits(one, compressed(plain_caches(one), LOSSLESS), steps)
        assert mx.abs(got - want).max().item() <= max(3 * noise, 5e-5)
    # Control: 4 bits are another answer, the same one whether the model is patched or not.
    lossy = [
        logits(m, compressed(plain_caches(m), KVOptions(4, 4)), (64, 1, 5))
        for m in (model, patched)
    ]
    assert mx.abs(lossy[0] - want).max().item() > 1e-2
    assert mx.abs(lossy[0] - lossy[1]).max().item() < 2e-3


@pytest.mark.parametrize(
    ("bits", "want"),
    [(8, "k8v8"), ("4", "k4v4"), ("k8v4", "k8v4"), ("K4V8", "k4v8"), ("k16v8", "k16v8")],
)
def test_bits_are_one_number_or_two(bits, want):
    assert KVOptions.parse(bits).name == want


@pytest.mark.parametrize("bits", [16, 5, "k16v16", "k8", "8v4", "", "k8v4 ", "kxvy"])
def test_other_bits_are_refused(bits):
    with pytest.raises(ValueError, match="kv_bits is 4 or 8"):
        KVOptions.parse(bits)
    with pytest.raises(ValueError, match="kv_group_size"):
        KVOptions.parse(8, 48)


def test_mlx_lm_makes_and_keeps_the_compressed_caches(models):
    path, plain = models("gemma3")
    model, _ = load(path, kv_bits="k8v4", kv_group_size=32)
    kinds = [(type(c), c.window) for c in make_prompt_cache(model)]
    window = plain.args.sliding_window
    want = [
        (CompressedKVCache, window if isinstance(c, RotatingKVCache) else None)
        for c in make_prompt_cache(plain)
    ]
    assert kinds == want
    assert len(set(want)) == 2
    # mlx-lm's own kv_bits asks caches to become its quantised ones; these are none.
    caches = make_prompt_cache(model)
    options = {"kv_bits": 4, "quantized_kv_start": 0, "max_tokens": 3}
    list(generate_step(mx.arange(100), model, prompt_cache=caches, **options))
    assert {type(c) for c in caches} == {CompressedKVCache}
    assert caches[0].k_bits == 8
    del model.make_cache
    assert {type(c) for c in make_prompt_cache(model)} == {KVCache, RotatingKVCache}


def test_it_may_begin_plain(models):
    """With quantized_kv_start mlx-lm itself tells the caches when."""
    _, model = models("gemma3")
    prompt = mx.arange(90)
    for start, kinds in ((100, (False, True)), (1000, (False, False)), (1, (True, True))):
        caches, seen = compressed(plain_caches(model), KVOptions(), start), []
        options = {"kv_bits": 8, "quantized_kv_start": start, "max_tokens": 30}
        for _ in generate_step(prompt, model, prompt_cache=caches, **options):
            seen.append({isinstance(c, CompressedKVCache) for c in caches})
        assert (seen[0], seen[-1]) == tuple({k} for k in kinds)
    assert caches[0].window == model.args.sliding_window
    assert compressed(plain_caches(model), KVOptions(), 0)[-1].empty()


YARN = {"type": "yarn", "factor": 1.0, "original_max_position_embeddings": 64}
TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 256,
}


def stock(name, **settings):
    module = import_module(f"mlx_lm.models.{name}")
    arguments = {"model_type": name, **TINY, **settings}
    return module.Model(module.ModelArgs.from_dict(arguments))


@pytest.mark.parametrize(
    ("name", "settings", "reason"),
    [
        (
            "deepseek_v2",
            {"n_routed_experts": None, "kv_lora_rank": 8, "q_lora_rank": 8, "rope_scaling": YARN},
            "latent vector",
        ),
        ("gpt_oss", {"num_local_experts": 2, "num_experts_per_tok": 1, "head_dim": 64}, "sinks"),
        (
            "mamba",
            {
                "state_size": 4,
                "conv_kernel": 2,
                "use_bias": False,
                "use_conv_bias": False,
                "time_step_rank": 4,
            },
            "no layer",
        ),
    ],
)
def test_models_that_cannot_are_refused_with_the_reason(name, settings, reason):
    model = stock(name, **settings)
    with pytest.raises(UnsupportedError, match=reason):
        compress_caches(model, KVOptions())
    assert not hasattr(model, "make_cache") or "make_cache" not in vars(model)


def test_sinks_with_compressed_values_or_by_force():
    model = stock("gpt_oss", num_local_experts=2, num_experts_per_tok=1, head_dim=64)
    check_model(model, KVOptions(16, 8))
    check_model(model, KVOptions(8, 8), force=True)
    want = logits(model, plain_caches(model), (TOKENS,))
    assert mx.abs(want).max().item() > 0
    got = logits(model, compressed(plain_caches(model), LOSSLESS), (70, 1, 9))
    assert mx.abs(got - want).max().item() < 1e-5


@pytest.mark.parametrize("command", ["generate", "chat", "perplexity"])
def test_the_commands_refuse_compressed_keys_with_sinks(command, models, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("hello " * 20)
    more = {"generate": ("-p", "x", "-m", "2"), "chat": ("-m", "2")}
    more["perplexity"] = ("-f", text, "--ctx-size", "16", "--chunks", "1")
    args = [command, models("gpt-oss")[0], *map(str, more[command])]
    refused = CliRunner().invoke(app, [*args, "--kv-bits", "8"], input="x\n")
    assert refused.exit_code == UnsupportedError.exit_code
    assert "learned attention sinks" in refused.stderr
    assert not refused.stdout
    for allowed in (("--kv-bits", "8", "--kv-force"), ("--kv-bits", "k16v8")):
        done = CliRunner().invoke(app, [*args, *allowed], input="x\n")
        assert done.exit_code == 0, done.output


def test_layers_without_a_compressed_form_are_named():
    class Odd(nn.Module):
        def make_cache(self):
            return [KVCache(), object()]

    with pytest.raises(UnsupportedError, match="object, which has no compressed form"):
        check_model(Odd(), KVOptions())


# --- prompt-cache files -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def stored(models, tmp_path_factory):
    """A file of the compressed caches of gemma3, with and without a window, and its caches."""
    _, model = models("gemma3")
    caches = compressed(plain_caches(model), KVOptions())
    logits(model, caches, (TOKENS,))
    path = tmp_path_factory.mktemp("caches") / "cache.safetensors"
    save_prompt_cache(str(path), caches)
    return model, path, caches


def test_a_stored_cache_is_read(stored):
    model, path, caches = stored
    assert caches[WHOLE].rows is not None
    for found, want in zip(prompt_cache.read(path, model), caches, strict=True):
        assert found.state[3:] == want.state[3:]


WHOLE = 5  # the layer without a window
SPOILT = [
    (WHOLE, 3, 10**6, "does not fit"),
    (WHOLE, 3, 10, "does not fit"),
    (WHOLE, 3, -1, "whole numbers"),
    (WHOLE, 3, 2**40, "whole numbers"),
    (WHOLE, 4, 5, "does not fit"),
    (WHOLE, 5, 1000, "does not fit"),
    (WHOLE, 5, 0, "does not fit"),
    (WHOLE, 6, 5, "not a prompt-cache"),
    (WHOLE, 6, 4, "rows of"),
    (WHOLE, 8, 0, "not a prompt-cache"),
    (WHOLE, 10, 8, "sink of"),
    (WHOLE, 11, 30, "sliding window of None"),
    (0, 11, None, "sliding window of 6"),
    (0, 11, 6.0, "sliding window of 6"),
    (WHOLE, 12, 8, "heads of"),
    (WHOLE, 0, None, "does not fit"),
    (WHOLE, 2, None, "does not fit"),
    (WHOLE, 0, lambda a: a[:, :1], "sink of"),
    (WHOLE, 1, lambda a: a[:, :, :64], "does not fit"),
    (WHOLE, 1, lambda a: a[:, :, :255], "rows of"),
    (WHOLE, 1, lambda a: a[..., :-1], "rows of"),
    (WHOLE, 1, lambda a: a.astype(mx.int32), "rows of"),
    (WHOLE, 2, lambda a: a[:, :, :50], "tail of"),
    (WHOLE, 2, lambda a: a.astype(mx.int32), "not a prompt-cache"),
    (WHOLE, 2, lambda a: a[0], "tail of"),
]


@pytest.mark.parametrize(("layer", "item", "value", "reason"), SPOILT)
def test_a_stored_cache_that_does_not_fit_is_refused(stored, tmp_path, layer, item, value, reason):
    model, path, _ = stored
    caches = load_prompt_cache(str(path))
    state = list(caches[layer].state)
    state[item] = value(state[item]) if callable(value) else value

    spoilt = type("CompressedKVCache", (CompressedKVCache,), {"state": tuple(state)})
    caches[layer] = spoilt()
    save_prompt_cache(str(tmp_path / "bad.safetensors"), caches)
    with pytest.raises(PromptCacheError, match=reason):
        prompt_cache.read(tmp_path / "bad.safetensors", model)


# --- command line and perplexity --------------------------------------------------------------


def run(*args, text=None):
    return CliRunner().invoke(app, [str(a) for a in args], input=text)


def generated(path, *args):
    raw = ("-m", "40", "--ignore-chat-template", "--json", "-p", "Hello " * 30)
    result = run("generate", path, *raw, *args)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_sliding_layers_can_stay_plain(models):
    """gemma3: of each six layers the last sees everything."""
    path, _ = models("gemma3")
    model, _ = load(path, kv_bits=8, kv_group_size=32, kv_layers="full")
    kinds = [type(cache).__name__ for cache in make_prompt_cache(model)]
    assert kinds == ["RotatingKVCache"] * 5 + ["CompressedKVCache", "RotatingKVCache"]
    model, _ = load(path, kv_bits=8, kv_group_size=32)
    assert {type(cache).__name__ for cache in make_prompt_cache(model)} == {"CompressedKVCache"}
    both = [generated(path, "--kv-bits", "8", "--kv-layers", layers) for layers in ("all", "full")]
    assert "of 7 layers" in both[0]["kv_cache"]
    assert "of 1 layers" in both[1]["kv_cache"]
    result = run("generate", path, "--kv-bits", "8", "--kv-layers", "some", "-p", "Hello")
    assert result.exit_code == 2
    assert "kv_layers is all or full; found 'some'" in result.output


def test_generate_compresses_the_cache(models):
    path, _ = models("llama")
    plain = generated(path)
    assert plain["kv_cache"] is None
    got = generated(path, "--kv-bits", "k8v4", "--kv-group-size", "32", "--no-kv-rotate")
    # 16 elements of a head: one group a side, scale and bias of 4 bytes; 2 heads, 3 layers.
    token = 6 * (16 + 8 + 2 * 2 * 4)
    assert got["kv_cache"] == (
        "KV cache: keys 8 bits in groups of 16, as 32 does not divide 16; values 4 bits in groups "
        f"of 16, as 32 does not divide 16: {token} bytes a token; 3 of 3 layers decompress theirs "
        "at every step: slower"
    )
    assert "slower" not in generated(path, "--kv-bits", "8", "--fuse", "all")["kv_cache"]
    assert "rotated" in generated(path, "--kv-bits", "8")["kv_cache"]
    # Later layers read what two of them keep.
    shared = generated(models("gemma4-e4b")[0], "--kv-bits", "8", "--fuse", "all")["kv_cache"]
    assert "; 2 of 4 layers decompress" in shared
    late = generated(path, "--kv-bits", "4", "--quantized-kv-start", "5000")
    assert late["tokens"] == plain["tokens"]
    assert late["kv_cache"] is None
    assert generated(path, "--kv-bits", "4", "--quantized-kv-start", "70")["kv_cache"]
    drafted = generated(path, "--kv-bits", "8", "--draft-model", path)
    assert drafted["tokens"] == generated(path, "--kv-bits", "8")["tokens"]
    bounded = generated(path, "--kv-bits", "8", "--max-kv-size", "20")
    assert bounded["tokens"] != plain["tokens"]
    shown = run("generate", path, "-m", "1", "--kv-bits", "8", "--ignore-chat-template")
    assert "KV cache: keys 8 bits" in shown.stderr


def test_wrong_flags_are_usage_errors(models, tmp_path):
    path, _ = models("llama")
    text = tmp_path / "text.txt"
    text.write_text("Hello " * 300)
    for args in (
        ("generate", path, "--kv-bits", "5"),
        ("generate", path, "--kv-bits", "8", "--kv-group-size", "48"),
        ("generate", path, "--kv-layers", "full"),  # of what?
        ("bench", path, "--no-kv-rotate"),
        ("generate", path, "--pipeline"),
        ("bench", path, "--pipeline"),
        ("inspect", path, "--pipeline"),
        ("doctor", path, "--pipeline"),
        ("perplexity", path, "-f", text, "--kld"),
        ("perplexity", path),
    ):
        result = run(*args)
        assert result.exit_code == 2, args
        assert len(args) > 3 or args[-1] == path or args[2] in result.output
    for wrong, said in (
        ({"pipeline": True}, "give their group as well"),
        ({"kv_layers": "full"}, "about compressed caches: give kv_bits too"),
        ({"context_length": 0}, "context_length is 0; expected at least one token"),
    ):
        with pytest.raises(ValueError, match=said):
            load(path, **wrong)
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe")
    for file in (tmp_path / "nosuch.txt", tmp_path / "bytes.txt"):
        assert run("perplexity", path, "-f", file).exit_code == 1
    short = run("perplexity", path, "-f", "-", text="Hello")
    assert short.exit_code == 1
    assert "at least one context (512 tokens" in short.stderr


def test_perplexity_is_that_of_the_second_halves(models):
    _, model = models("llama")
    ids = np.random.default_rng(0).integers(0, 250, 130).tolist()
    way = Way(model, lambda: plain_caches(model))
    got = perplexity(ids, way, context=40, bos=7, step=9)
    losses = []
    for chunk in (ids[:40], ids[40:80], ids[80:120]):
        scores = np.array(model(mx.array([[7, *chunk[1:]]]))[0], np.float64)
        scores -= np.log(np.exp(scores).sum(-1, keepdims=True))
        losses += [-scores[i, chunk[i + 1]] for i in range(20, 39)]
    assert (got.tokens, got.chunks) == (57, 3)
    assert got.perplexity.value == pytest.approx(np.exp(np.mean(losses)), rel=1e-4)
    error = np.std(losses) / 56**0.5 * np.exp(np.mean(losses))
    assert got.perplexity.error == pytest.approx(error, rel=1e-3)
    assert perplexity(ids, way, context=40, chunks=1).tokens == 19
    with pytest.raises(MLXFuseError, match="found 130 tokens"):
        perplexity(ids, way, context=131)


def test_kld_of_a_way_to_itself_is_nothing_and_to_another_what_numpy_says(models):
    _, model = models("llama")
    ids = np.random.default_rng(0).integers(0, 250, 230).tolist()
    plain = Way(model, lambda: plain_caches(model))
    same = perplexity(ids, plain, plain, context=TOKENS)
    assert (same.kld.value, same.same_top.value, same.rms_dp) == (0, 1, 0)

    def changed(inputs, cache):
        return model(inputs, cache=cache) * 0.7 + mx.arange(259) * 0.01

    got = perplexity(ids, replace(plain, model=changed), plain, context=TOKENS)
    p, q = (np.array(f(mx.array([ids]), plain_caches(model))[0], np.float64)[115:229]
            for f in (model, changed))  # fmt: skip
    top = (p.argmax(-1) == q.argmax(-1)).mean()
    p, q = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (p, q))
    kld = (np.exp(p) * (p - q)).sum(-1)
    true = np.array(ids[116:])[:, None]
    change = np.take_along_axis(np.exp(q) - np.exp(p), true, 1)
    assert got.kld.value == pytest.approx(kld.mean(), rel=1e-4)
    assert got.kld.error == pytest.approx(kld.std() / 113**0.5, rel=1e-3)
    assert got.kld_max == pytest.approx(kld.max(), rel=1e-4)
    assert got.kld_99 == pytest.approx(np.sort(kld)[112], rel=1e-4)
    assert got.same_top.value == pytest.approx(top)
    assert got.rms_dp == pytest.approx((change**2).mean() ** 0.5, rel=1e-3)
    assert 0 < top < 1


def test_the_command_prints_a_table_or_json(models, tmp_path):
    path, _ = models("llama")
    text = tmp_path / "text.txt"
    text.write_text("Some text of no interest, again and again. " * 12)
    args = ("perplexity", path, "-f", text, "-c", "200", "--kld", "--kv-bits", "k4v4")
    found = json.loads(run(*args, "--json").stdout)
    assert found["scheme"] == {"kv_bits": "k4v4", "kv_rotate": True}
    assert (found["context"], found["step"], found["chunks"]) == (200, 8, 2)
    assert found["kld"]["value"] > 1e-3
    better = json.loads(run(*args[:-1], "k8v8", "--json").stdout)
    assert 0 < better["kld"]["value"] < found["kld"]["value"] / 4
    assert better["base"] == found["base"]
    shown = run(*args).stdout.splitlines()
    assert [line[:20].strip() for line in shown[:6]] == [
        "", "perplexity", "mean KLD", "KLD, 99 % and most", "same top token", "RMS of Δp",
    ]  # fmt: skip
    assert shown[0].split() == ["plain", "k4v4", "rotated"]
    plain = run(*args[:4], "-c", "200").stdout.splitlines()
    assert plain[1].split()[1][:6] == shown[1].split()[1][:6]


@pytest.mark.slow
def test_kld_of_the_demo_model(demo):
    """In a process of its own, which finds a fast BLAS before MLX is there."""
    command = [sys.executable, "-m", "tests.bench.bench_kv_quality", demo, "--json", "--schemes"]
    lines = subprocess.run([*command, *BARS], stdout=subprocess.PIPE, check=True).stdout
    found = {(x["bits"], x["rotate"]): x for x in map(json.loads, lines.splitlines())}
    assert set(found) == set(itertools.product(BARS, (True, False)))
    for bits, bar in BARS.items():
        rotated, as_it_is = (found[bits, rotate]["kld"] for rotate in (True, False))
        assert 0 < rotated["value"] <= bar
        noise = 2 * (rotated["error"] ** 2 + as_it_is["error"] ** 2) ** 0.5
        assert rotated["value"] <= as_it_is["value"] + noise
