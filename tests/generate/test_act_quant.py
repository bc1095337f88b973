"""`--act-quant` and `kv_bits=` where users meet them."""

import json

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import KVCache, make_prompt_cache

from mlxfuse import env, patch_model, unpatch_model
from mlxfuse.errors import UnsupportedError
from mlxfuse.loader import load
from mlxfuse.nn.kv.cache import CompressedKVCache

from ..cli.test_cli import invoke
from ..models import tiny

TEXT = "The quick brown fox jumps over the lazy dog. " * 4
IDS = mx.array([[1, 5, 9, 200, 7]])


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tiny.write(tmp_path_factory.mktemp("models") / "a.gguf", tiny.build("llama-q4", 0))


def scored(path, *args):
    result = invoke("perplexity", path, "-f", "-", "-c", "64", "--json", *args, text=TEXT)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_int8_activations_are_compared_with_floats(path, monkeypatch):
    found = scored(path, "--act-quant", "on", "--kld")
    assert found["act_quant"] is True
    places = 4 * tiny.CASES["llama-q4"].layers
    assert found["load"]["patch"]["fusions"]["int8"] == {"fused": places, "of": places}
    assert 1e-7 < found["kld"]["value"] < 0.05
    assert found["perplexity"]["value"] != found["base"]["value"]
    # The control: switched off where it runs, both ways are the same.
    monkeypatch.setenv("MLXFUSE_DISABLE", "int8")
    off = scored(path, "--act-quant", "on", "--kld")
    assert off["kld"]["value"] == 0
    assert off["base"]["value"] == pytest.approx(found["base"]["value"], rel=1e-6)


def test_what_is_compared_must_be_said(path):
    result = invoke("perplexity", path, "-f", "-", "--kld", text=TEXT)
    assert result.exit_code == 2
    assert "--act-quant" in result.output


@pytest.mark.parametrize("command", ["generate", "chat"])
def test_the_flag_reaches_the_model(path, command, monkeypatch):
    asked = []
    real = load

    def noting(*args, **options):
        asked.append(options["act_quant"])
        return real(*args, **options)

    monkeypatch.setattr("mlxfuse.loader.load", noting)
    for value in ("auto", "on", "off"):
        more = ["-p", "Hello"] if command == "generate" else []
        result = invoke(command, path, "-m", "2", "--act-quant", value, *more, text="Hello\n")
        assert result.exit_code == 0, result.output
    assert asked == ["auto", "on", "off"]
    assert invoke(command, path, "--act-quant", "maybe", text="").exit_code == 2


def test_a_variable_is_overridden_and_given_back(monkeypatch):
    monkeypatch.delenv("MLXFUSE_DISABLE", raising=False)
    with env.overridden("MLXFUSE_DISABLE", "qkv"):
        assert env.get("MLXFUSE_DISABLE") == "qkv"
        with pytest.raises(KeyError), env.overridden("MLXFUSE_DISABLE", "int8"):
            raise KeyError
        assert env.get("MLXFUSE_DISABLE") == "qkv"
    assert env.get("MLXFUSE_DISABLE") == ""


def test_patch_model_gives_compressed_caches_and_takes_them_back(path):
    model, _ = load(path)
    want = np.array(model(IDS))
    report = patch_model(model, kv_bits="k8v4", kv_group_size=32)
    assert patch_model(model, kv_bits="k8v4", kv_group_size=32) is report
    (first, *_) = caches = make_prompt_cache(model)
    assert all(type(c) is CompressedKVCache for c in caches)
    assert (first.k_bits, first.v_bits, first.group_size) == (8, 4, 32)
    model(IDS, cache=caches)
    assert first.offset == IDS.size
    patch_model(model, kv_bits=8)  # other arguments: patched anew
    assert make_prompt_cache(model)[0].v_bits == 8
    unpatch_model(model)
    assert all(type(c) is KVCache for c in make_prompt_cache(model))
    assert "make_cache" not in vars(model)
    assert np.array_equal(np.array(model(IDS)), want)


def test_bad_options_change_nothing(path):
    model, _ = load(path)
    for options, error in (
        ({"kv_bits": 5}, ValueError),
        ({"kv_bits": 8, "kv_group_size": 48}, ValueError),
        ({"act_quant": "maybe"}, ValueError),
    ):
        with pytest.raises(error):
            patch_model(model, **options)
    model.layers[0].self_attn.kv_lora_rank = 4
    with pytest.raises(UnsupportedError, match="latent"):
        patch_model(model, fuse="all", kv_bits=8)
    assert not hasattr(model, "_mlxfuse_patch")
    assert type(make_prompt_cache(model)[0]) is KVCache
