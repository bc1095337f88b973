"""From the file's bytes to the model's weights: exact values, memory, types and errors."""

import os
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize
from mlx.utils import tree_flatten
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlxfuse.errors import GGUFError, ModelRefError, UnsupportedError
from mlxfuse.generate.run import Settings, encode_prompt
from mlxfuse.gguf.reader import open_gguf
from mlxfuse.loader import activation_dtype, load
from mlxfuse.models import ARCHITECTURES, build
from mlxfuse.models.config import read_config
from mlxfuse.models.plan import plan
from mlxfuse.nn.rope import FrequencyRoPE
from tests.models import tiny


def parameters(model: nn.Module) -> dict[str, mx.array]:
    return dict(tree_flatten(model.parameters()))


def built(path: Path, budget: int | None = None) -> nn.Module:
    with open_gguf(path) as file:
        return build.build(file, plan(file, read_config(file)), mx.float32, budget)


def as_converted(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's conversion of a checkpoint's q or k rows (``conversion/llama.py``)."""
    rows = weight.reshape(heads, 2, len(weight) // heads // 2, *weight.shape[1:])
    return rows.swapaxes(1, 2).reshape(weight.shape)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1", "F16"])
def test_llama_rows_are_the_checkpoints_again(tmp_path: Path, kind: str) -> None:
    tensor_type = GGMLQuantizationType[kind]
    model = tiny.build("llama-biases", 0)
    random = np.random.RandomState(0)
    wanted = {}
    for short, heads in (("attn_q", 4), ("attn_k", 2), ("attn_v", 0)):
        rows = 16 * (heads or 2)
        weight = random.standard_normal((rows, 64)).astype(np.float32)
        bias = random.standard_normal(rows).astype(np.float32)
        wanted[short] = dequantize(quantize(weight, tensor_type), tensor_type), bias
        stored = [as_converted(x, heads) if heads else x for x in (weight, bias)]
        model.tensors[f"blk.0.{short}.weight"] = quantize(stored[0], tensor_type), kind
        model.tensors[f"blk.0.{short}.bias"] = stored[1], "F32"
    attention = built(tiny.write(tmp_path / "m.gguf", model)).layers[0].self_attn
    for short, (weight, bias) in wanted.items():
        found = getattr(attention, f"{short[-1]}_proj")
        assert np.array_equal(np.array(found.weight), weight)
        assert np.array_equal(np.array(found.bias), bias)
    assert not np.array_equal(wanted["attn_q"][0], as_converted(wanted["attn_q"][0], 4))
    assert attention.rope.traditional is False


def test_a_fused_qkv_holds_the_same_weights(tmp_path: Path) -> None:
    for case, architecture in (("llama-fused-qkv", "llama"), ("qwen2-fused-qkv", "qwen2")):
        model = tiny.build(case, 1)
        fused = parameters(built(tiny.write(tmp_path / "fused.gguf", model)))
        for name in [n for n in model.tensors if "attn_qkv" in n]:
            data, kind = model.tensors.pop(name)
            for part, rows in zip("qkv", np.split(data, [64, 96]), strict=True):
                model.tensors[name.replace("qkv", part)] = rows, kind
        split = parameters(built(tiny.write(tmp_path / "split.gguf", model)))
        assert fused.keys() == split.keys(), architecture
        assert all(mx.array_equal(fused[name], split[name]) for name in fused)


def test_separate_rows_fill_phi3s_one_matrix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny.build("phi3", 0)
    path = tiny.write(tmp_path / "fused.gguf", model)
    whole = built(path).layers[1].self_attn.qkv_proj.weight
    for name in [n for n in model.tensors if "attn_qkv" in n]:
        data, kind = model.tensors.pop(name)
        for part, rows in zip("qkv", np.split(data, [64, 96]), strict=True):
            model.tensors[name.replace("qkv", part)] = rows, kind
    path = tiny.write(tmp_path / "split.gguf", model)
    for budget in (None, 0):
        module = built(path, budget).layers[1].self_attn.qkv_proj
        x = mx.eye(64)
        assert mx.array_equal(module(x), x @ whole.T)
    monkeypatch.setattr(build, "CHUNK", 64 * 30)  # chunks that begin and end within q, k and v
    assert mx.array_equal(built(path).layers[1].self_attn.qkv_proj.weight, whole)


def test_norms_are_stored_with_one_added_in_gemma_only(tmp_path: Path) -> None:
    for case, offset in (("gemma2", 1), ("gemma3", 1), ("qwen3", 0)):
        model = tiny.build(case, 0)
        found = built(tiny.write(tmp_path / "m.gguf", model))
        norm = found.layers[0].input_layernorm
        stored = model.weights("blk.0.attn_norm.weight")
        assert np.array_equal(np.array(norm.weight), stored - np.float32(offset))
        assert norm.eps == pytest.approx(1e-5)


@pytest.mark.parametrize("case", ["llama", "llama-biases", "qwen2", "gemma3", "phi3"])
def test_streamed_weights_compute_what_dense_ones_do(tmp_path: Path, case: str) -> None:
    model = tiny.build(case, 0)
    path = tiny.write(tmp_path / "m.gguf", model)
    tokens = mx.array(model.prompt[None])
    dense, streamed = built(path), built(path, 0)
    want, got = dense(tokens), streamed(tokens)
    assert mx.abs(got - want).max() <= 1e-5 * mx.abs(want).max()
    matrices = [n for n, p in parameters(streamed).items() if p.ndim == 2]
    assert matrices == []
    assert sum(p.nbytes for p in parameters(streamed).values()) < 20_000


def test_weights_go_dense_as_far_as_the_budget(tmp_path: Path) -> None:
    path = tiny.write(tmp_path / "m.gguf", tiny.build("llama", 0))
    everything = sum(p.nbytes for p in parameters(built(path)).values())
    for share in (0.3, 0.6, 1.0):
        found = parameters(built(path, int(share * everything)))
        used = sum(p.nbytes for p in found.values())
        assert used <= share * everything
        assert used >= share * everything - 64 * 96 * 4  # not even the smallest matrix fits


def test_a_matrix_is_dequantised_in_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tiny.write(tmp_path / "m.gguf", tiny.build("llama", 0))
    whole = parameters(built(path))
    sizes = []
    real = build.dequantize

    def counted(
        data: np.ndarray, format: object, shape: tuple[int, ...], **how: object
    ) -> np.ndarray:
        sizes.append(np.prod(shape))
        return real(data, format, shape, **how)

    monkeypatch.setattr(build, "CHUNK", 1000)
    monkeypatch.setattr(build, "dequantize", counted)
    chunked = parameters(built(path))
    assert max(sizes) <= 1000 < 259 * 64
    assert all(mx.array_equal(chunked[name], whole[name]) for name in whole)


def test_the_pair_and_its_types(tmp_path: Path) -> None:
    path = tiny.write(tmp_path / "m.gguf", tiny.build("qwen2", 0))
    model, tokenizer = load(path)
    assert isinstance(model, nn.Module)
    assert not model.training
    assert isinstance(tokenizer, TokenizerWrapper)
    assert tokenizer.eos_token_ids == {tiny.EOS}
    assert {p.dtype for p in parameters(model).values()} == {mx.float32}
    for wanted in ("bfloat16", mx.float16):
        model, _ = load(str(path), dtype=wanted)
        found = {p.dtype for p in parameters(model).values()}
        assert found == {mx.bfloat16 if wanted == "bfloat16" else mx.float16}
        assert model(mx.array([[1, 2, 3]])).dtype in found
    with pytest.raises(ValueError, match="int8; expected float32, float16, bfloat16"):
        load(path, dtype=mx.int8)


def test_the_default_type_on_metal_is_the_architectures(monkeypatch: pytest.MonkeyPatch) -> None:
    assert activation_dtype(ARCHITECTURES["gemma3"]) == mx.float32
    monkeypatch.setattr(mx, "default_device", lambda: mx.gpu)
    types = {name: activation_dtype(arch) for name, arch in ARCHITECTURES.items()}
    # float16 only where its range is known to hold.
    assert {n for n, t in types.items() if t == mx.float16} == {
        *("llama", "qwen3", "qwen3moe", "phi3")
    }
    assert set(types.values()) == {mx.float16, mx.bfloat16}
    assert activation_dtype(ARCHITECTURES["gemma3"], "float16") == mx.float16


def test_context_length_picks_the_rotary_factors(tmp_path: Path) -> None:
    model = tiny.build("phi3", 0)
    path = tiny.write(tmp_path / "m.gguf", model)
    for context, name in ((None, "long"), (512, "short")):
        rope = load(path, context_length=context)[0].layers[0].self_attn.rope
        factors = model.weights(f"rope_factors_{name}.weight")
        plain = 10000.0 ** (np.arange(6) / 6)
        np.testing.assert_allclose(np.array(rope._freqs), plain * factors, rtol=1e-6)
        assert rope.scale == 1.25


def test_a_rope_turns_pairs_of_halves_and_leaves_the_rest() -> None:
    periods = np.array([1.0, 5.0], np.float32)
    x = np.arange(1, 19, dtype=np.float32).reshape(1, 1, 3, 6)
    got = np.array(FrequencyRoPE(mx.array(periods), 2.0)(mx.array(x), offset=7))
    for step in range(3):
        for pair in range(2):
            a, b = x[0, 0, step, pair], x[0, 0, step, pair + 2]
            angle = (7 + step) / periods[pair]
            turned = (a * np.cos(angle) - b * np.sin(angle), a * np.sin(angle) + b * np.cos(angle))
            np.testing.assert_allclose(
                got[0, 0, step, [pair, pair + 2]], 2 * np.array(turned), 1e-5
            )
    assert np.array_equal(got[..., 4:], x[..., 4:])


def test_factors_that_are_not_positive_are_refused(tmp_path: Path) -> None:
    for bad in (0.0, -1.0, np.nan):
        model = tiny.build("llama-rope-freqs", 0)
        model.tensors["rope_freqs.weight"][0][3] = bad
        with pytest.raises(GGUFError, match="not positive"):
            load(tiny.write(tmp_path / "m.gguf", model))


def test_another_mlx_lm_model_is_noticed(tmp_path: Path) -> None:
    """A file whose plan lost a norm does not leave mlx-lm's initial value in its place."""
    path = tiny.write(tmp_path / "m.gguf", tiny.build("qwen3", 0))
    with open_gguf(path) as file:
        full = plan(file, read_config(file))
        short = full.__class__(full.config, full.outer[:1], full.layers)
        with pytest.raises(UnsupportedError, match=r"model\.norm\.weight is None in the file"):
            build.build(file, short, mx.float32)


def test_a_file_that_shrinks_while_it_loads_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny.write(tmp_path / "m.gguf", tiny.build("llama", 0))
    real = build._check_parameters

    def shrink(*arguments: object) -> None:
        real(*arguments)
        os.truncate(path, path.stat().st_size // 2)

    monkeypatch.setattr(build, "_check_parameters", shrink)
    with pytest.raises(GGUFError):
        load(path)


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(ModelRefError):
        load(tmp_path / "nosuch.gguf")


def test_a_model_without_a_template_gets_the_plain_prompt(tmp_path: Path) -> None:
    _, tokenizer = load(tiny.write(tmp_path / "model.gguf", tiny.build("llama", 0)))
    assert not tokenizer.has_chat_template
    assert encode_prompt(tokenizer, Settings(prompt="ab")) == tokenizer.encode("ab")
