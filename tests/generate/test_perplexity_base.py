"""`mlxfuse perplexity --kld --base`: how far a model is from the same one in other types."""

import json

import mlx.core as mx
import numpy as np
import pytest

from mlxfuse.loader import load

from ..cli.test_cli import invoke
from ..models import tiny

TEXT = "The quick brown fox jumps over the lazy dog. " * 4
CONTEXT = 64


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """A quantised model and its F32 twin, which has the same weights; and two with others."""
    folder = tmp_path_factory.mktemp("models")
    model = tiny.build("llama-q4", 0)
    one = {n: tiny.write(folder / f"{n}.gguf", model, twin=n == "twin") for n in ("q4", "twin")}
    data, kind = model.tensors["blk.1.ffn_down.weight"]
    packed = data.copy()
    packed[..., ::22] ^= 64  # of Q5_0 blocks of 22 bytes the lower byte of the scale
    model.tensors["blk.1.ffn_down.weight"] = packed, kind
    one["coarse"] = tiny.write(folder / "coarse.gguf", model)
    one["larger"] = tiny.write(folder / "larger.gguf", tiny.build("llama-k-quants", 0))
    return one


def scored(path, *args):
    more = ("-f", "-", "-c", str(CONTEXT), "--json", *args)
    result = invoke("perplexity", path, *more, text=TEXT)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def divergence(path, base):
    """In float64, from the logits of both models."""
    found = []
    for file in (path, base):
        model, tokenizer = load(file)
        ids = tokenizer.encode(TEXT)
        rows = []
        for at in range(0, len(ids) // CONTEXT * CONTEXT, CONTEXT):
            chunk = mx.array([ids[at : at + CONTEXT]])
            rows.append(np.array(model(chunk)[0, CONTEXT // 2 : -1]).astype(np.float64))
        x = np.concatenate(rows)
        x -= x.max(-1, keepdims=True)
        found.append(x - np.log(np.exp(x).sum(-1, keepdims=True)))
    q, p = found
    return float((np.exp(p) * (p - q)).sum(-1).mean())


def test_a_file_is_compared_with_another(paths):
    found = scored(paths["coarse"], "--base", str(paths["q4"]), "--kld")
    want = divergence(paths["coarse"], paths["q4"])
    assert want > 1e-4
    assert found["kld"]["value"] == pytest.approx(want, rel=1e-3)
    assert found["base_model"] == str(paths["q4"])
    assert found["base"]["value"] == pytest.approx(scored(paths["q4"])["perplexity"]["value"])
    # The control: the same weights in another type.
    same = scored(paths["q4"], "--base", str(paths["twin"]))
    assert same["kld"]["value"] < 1e-6
    assert same["same_top"]["value"] == 1


def test_the_table_says_which_is_which(paths):
    more = ("-f", "-", "-c", str(CONTEXT), "--base", str(paths["twin"]))
    result = invoke("perplexity", paths["q4"], *more, text=TEXT)
    assert result.exit_code == 0, result.output
    assert result.stdout.split()[:2] == ["base", "model"]


def test_another_models_tokens_are_refused(paths, monkeypatch):
    from mlxfuse.loader import load as real

    def other(path, **options):
        model, tokenizer = real(path, **options)
        if path.name == "larger.gguf":
            monkeypatch.setattr(
                type(tokenizer), "encode", lambda self, text: [1] * 64, raising=False
            )
        return model, tokenizer

    monkeypatch.setattr("mlxfuse.loader.load", other)
    more = ("-f", "-", "-c", str(CONTEXT), "--base", str(paths["larger"]))
    result = invoke("perplexity", paths["q4"], *more, text=TEXT)
    assert result.exit_code == 1
    assert "larger.gguf" in result.output
    assert "the same model in another quantisation" in " ".join(result.output.split())
