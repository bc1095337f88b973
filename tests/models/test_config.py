"""Metadata to configuration: values, llama.cpp's defaults, and what is refused."""

import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFWriter

from mlxfuse.errors import GGUFError, UnsupportedError
from mlxfuse.gguf.reader import open_gguf
from mlxfuse.models import ARCHITECTURES
from mlxfuse.models.config import read_config
from mlxfuse.models.plan import plan
from mlxfuse.models.rope import Rope
from mlxfuse.models.table import Config
from tests.models import tiny


def config(tmp_path: Path, case: str, context: int | None = None, **keys: object) -> Config:
    """The configuration of a tiny model with some keys changed, or removed (None)."""
    model = tiny.build(case, 0)
    for key, value in keys.items():
        full = f"{model.case.arch}.{key.replace('__', '.')}"
        model.metadata[full] = value
        if value is None:
            del model.metadata[full]
    with open_gguf(tiny.write(tmp_path / "model.gguf", model)) as file:
        return read_config(file, context)


def test_every_value_of_a_llama(tmp_path: Path) -> None:
    found = config(tmp_path, "llama-k-quants")
    assert found.layers == 2
    assert not found.tied
    assert found.ropes == ()
    assert found.rope == Rope(dims=32, base=10000.0)
    assert found.args == {
        "model_type": "llama",
        "hidden_size": 256,
        "num_hidden_layers": 2,
        "intermediate_size": 256,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "attention_bias": False,
        "mlp_bias": False,
        "rms_norm_eps": pytest.approx(1e-5),
        **dict.fromkeys(("layer_norm_eps", "norm_eps", "norm_epsilon"), pytest.approx(1e-5)),
        "vocab_size": tiny.VOCABULARY,
        "max_position_embeddings": 256,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
    }
    assert found.sizes == {
        "vocab": 259,
        "embd": 256,
        "ff": 256,
        "gate_up": 512,
        "head": 32,
        "heads": 8,
        "kv_heads": 2,
        "q": 256,
        "o": 256,
        "kv": 64,
        "qkv": 384,
        "one": 1,
        "cache": 128,
        "window": 0,
        "rotary": 32,
        "value": 32,
        "v": 64,
        "state": 0,
    }


def test_defaults_are_llama_cpps(tmp_path: Path) -> None:
    found = config(
        tmp_path,
        "llama",
        attention__head_count_kv=None,
        rope__freq_base=None,
        rope__dimension_count=None,
    )
    assert found.args["num_key_value_heads"] == found.args["num_attention_heads"] == 4
    assert found.rope == Rope(dims=16, base=10000.0)
    assert found.tied


def test_lengths_of_experts(tmp_path: Path) -> None:
    """llama.cpp's: those of the file, or shares of the feed-forward length."""
    args = config(tmp_path, "qwen2moe", feed_forward_length=None).args
    assert (args["num_experts"], args["num_experts_per_tok"]) == (6, 3)
    assert args["moe_intermediate_size"] == 32
    assert args["shared_expert_intermediate_size"] == 64
    none = dict.fromkeys(("expert_feed_forward_length", "expert_shared_feed_forward_length"))
    args = config(tmp_path, "qwen2moe", **none).args
    assert args["moe_intermediate_size"] == 32  # of 96
    assert args["shared_expert_intermediate_size"] == 96


def test_gpt_oss(tmp_path: Path) -> None:
    args = config(tmp_path, "gpt-oss", feed_forward_length=99).args
    assert args["layer_types"] == ["sliding_attention", "full_attention"] * 2
    assert args["sliding_window"] == 6
    assert (args["num_local_experts"], args["intermediate_size"]) == (6, 32)
    args = config(tmp_path, "gpt-oss", attention__sliding_window_pattern=3).args
    assert [kind[:4] for kind in args["layer_types"]] == ["slid", "slid", "full", "slid"]


def test_gemma2(tmp_path: Path) -> None:
    found = config(tmp_path, "gemma2")
    assert found.args["sliding_window"] == 6
    assert found.args["sliding_window_pattern"] == 2
    assert config(tmp_path, "gemma2-pattern").args["sliding_window_pattern"] == 3
    assert found.args["attn_logit_softcapping"] == 4.0
    assert found.args["query_pre_attn_scalar"] == 32  # head_dim, though hidden / heads is 24
    plain = config(
        tmp_path,
        "gemma2",
        attention__sliding_window=None,
        attention__sliding_window_pattern=None,
        attn_logit_softcapping=None,
        final_logit_softcapping=None,
    )
    assert plain.args["sliding_window"] == 4096
    assert plain.args["sliding_window_pattern"] == 2
    assert plain.args["attn_logit_softcapping"] == 50.0
    assert plain.args["final_logit_softcapping"] == 30.0
    assert config(tmp_path, "gemma2-27b").args["query_pre_attn_scalar"] == 24


def test_gemma3(tmp_path: Path) -> None:
    found = config(tmp_path, "gemma3")
    assert found.args["sliding_window_pattern"] == 6
    assert found.rope == Rope(dims=32, base=100.0)
    assert found.ropes[0] == Rope(dims=32, base=10000.0)
    scaled = config(tmp_path, "gemma3-rope-linear")
    assert scaled.rope == Rope(dims=16, base=100.0, factor=8.0)
    assert scaled.ropes[0] == Rope(dims=16, base=30.0)
    assert config(tmp_path, "gemma3-27b").args["query_pre_attn_scalar"] == 24


def test_gemma4(tmp_path: Path) -> None:
    found = config(tmp_path, "gemma4")
    kinds = ["sliding_attention"] * 2 + ["full_attention", "sliding_attention"]
    assert found.args["layer_types"] == kinds
    assert (found.args["head_dim"], found.args["global_head_dim"]) == (16, 32)
    assert (found.args["num_key_value_heads"], found.args["num_global_key_value_heads"]) == (2, 1)
    assert found.args["attention_k_eq_v"]
    assert not found.args["enable_moe_block"]
    assert found.rope == Rope(dims=32, base=100.0, factors="rope_freqs.weight")
    assert found.ropes[0] == Rope(dims=16, base=30.0)
    sizes = {"head": 16, "q": 64, "o": 64, "kv": 32, "v": 32, "k_head": 16, "ff": 96}
    full = {"head": 32, "q": 128, "o": 128, "kv": 32, "v": 0, "k_head": 32, "ff": 96}
    sizes |= {"cache": 64, "window": 6, "kv_heads": 2}
    full |= {"cache": 64, "window": 0, "kv_heads": 1}
    assert found.by_layer == (sizes, sizes, full, sizes)
    assert not found.unread
    defaults = dict.fromkeys(
        ("final_logit_softcapping", "rope__freq_base_swa", "attention__shared_kv_layers")
    )
    plain = config(tmp_path, "gemma4", **defaults)
    assert plain.args["final_logit_softcapping"] == 30.0
    assert plain.ropes[0] == Rope(dims=16, base=10000.0)
    assert plain.by_layer == found.by_layer
    capless = config(tmp_path, "gemma4", final_logit_softcapping=0.0)
    assert capless.args["final_logit_softcapping"] is None


def test_gemma4s_other_forms(tmp_path: Path) -> None:
    found = config(tmp_path, "gemma4-e2b")
    assert found.args["num_kv_shared_layers"] == 2
    assert found.args["use_double_wide_mlp"]
    assert [s["ff"] for s in found.by_layer] == [64, 64, 64, 128, 128]
    assert [s["kv"] for s in found.by_layer] == [16, 16, 32, 0, 0]
    assert [s["k_head"] for s in found.by_layer] == [16, 16, 32, 0, 0]
    assert (found.sizes["input"], found.sizes["inputs"], found.sizes["input_embd"]) == (32, 160, 64)
    names = {f"blk.{i}.{n}.weight" for i in (3, 4) for n in ("attn_k", "attn_v", "attn_k_norm")}
    assert found.unread == names
    found = config(tmp_path, "gemma4-e4b")
    assert not found.args["use_double_wide_mlp"]
    assert not found.args["attention_k_eq_v"]
    found = config(tmp_path, "gemma4-a4b")
    assert (found.args["num_experts"], found.args["top_k_experts"]) == (4, 2)
    assert found.args["moe_intermediate_size"] == found.sizes["expert_ff"] == 32
    assert (found.sizes["input"], found.sizes["expert_embd"]) == (0, 64)


@pytest.mark.parametrize(
    ("context", "factors"),
    [(None, "long"), (512, "short"), (513, "long"), (8, "short")],
)
def test_phi3_factors_follow_the_context(tmp_path: Path, context: int | None, factors: str) -> None:
    found = config(tmp_path, "phi3", context)  # made for 1024 tokens, 512 of them originally
    assert found.rope == Rope(12, 10000.0, scale=1.25, factors=f"rope_factors_{factors}.weight")


@pytest.mark.parametrize(
    ("keys", "rope"),
    [
        ({"type": "none", "factor": 4.0}, Rope(16, 10000.0)),
        ({"type": "linear", "factor": 4.0}, Rope(16, 10000.0, factor=4.0)),
        ({"factor": 4.0}, Rope(16, 10000.0, factor=4.0)),
        ({"type": "linear"}, Rope(16, 10000.0)),
        (
            {"type": "yarn", "factor": 4.0, "original_context_length": 64},
            Rope(16, 10000.0, 4.0, 1 + 0.1 * math.log(4), yarn=64),
        ),
        ({"type": "yarn", "factor": 1.0}, Rope(16, 10000.0, yarn=256)),
    ],
)
def test_rope_scaling(tmp_path: Path, keys: dict[str, object], rope: Rope) -> None:
    found = config(tmp_path, "llama", **{f"rope__scaling__{k}": v for k, v in keys.items()})
    assert found.rope == rope


def test_a_file_that_names_no_original_context_has_the_trained_one(tmp_path: Path) -> None:
    """And not the one that it is opened for."""
    yarn = {"rope__scaling__type": "yarn", "rope__scaling__factor": 4.0}
    for context in (None, 64, 4096):
        assert config(tmp_path, "llama", context, **yarn).rope.yarn == 256
    unnamed = {"rope__scaling__original_context_length": None}
    for context, factors in ((None, "short"), (1024, "short"), (1025, "long")):
        rope = config(tmp_path, "phi3", context, **unnamed).rope
        assert rope.factors == f"rope_factors_{factors}.weight"


def test_periods_of_yarn_blend_the_two_frequencies() -> None:
    """Written out pair by pair from the paper's formula."""
    rope = Rope(dims=8, base=100.0, factor=4.0, yarn=1000)
    expected = []
    low = math.floor(8 * math.log(1000 / (32 * 2 * math.pi)) / (2 * math.log(100)))
    high = math.ceil(8 * math.log(1000 / (2 * math.pi)) / (2 * math.log(100)))
    assert (low, high) == (1, 5)
    for pair in range(4):
        theta = 100 ** (-2 * pair / 8)
        interpolate = min(1.0, max(0.0, (pair - low) / (high - low)))
        expected.append(1 / (theta / 4 * interpolate + theta * (1 - interpolate)))
    np.testing.assert_allclose(rope.periods(), expected, rtol=1e-6)
    assert rope.periods()[0] == 1 != Rope(8, 100.0, factor=4.0).periods()[0]


def test_periods_are_multiplied_by_factors() -> None:
    factors = np.array([1.0, 2.0, 0.5, 8.0], np.float32)
    plain = 100.0 ** (np.arange(4) / 4)
    np.testing.assert_allclose(
        Rope(8, 100.0, factor=3.0).periods(factors), plain * factors * 3, rtol=1e-6
    )


BAD_KEYS: list[tuple[str, dict[str, object], type[Exception], str]] = [
    ("llama", {"block_count": None}, GGUFError, "llama.block_count"),
    ("llama", {"embedding_length": "64"}, GGUFError, "llama.embedding_length"),
    ("llama", {"embedding_length": 0}, GGUFError, "positive"),
    ("llama", {"attention__head_count": 0}, GGUFError, "positive"),
    ("llama", {"attention__head_count_kv": 3}, GGUFError, "4 attention heads cannot share 3"),
    ("llama", {"attention__layer_norm_rms_epsilon": -1.0}, GGUFError, "0 or more"),
    ("llama", {"attention__layer_norm_rms_epsilon": math.nan}, GGUFError, "finite"),
    ("llama", {"rope__freq_base": math.inf}, GGUFError, "finite"),
    ("llama", {"rope__freq_base": -1.0}, GGUFError, "more than 0"),
    ("llama", {"rope__dimension_count": 15}, GGUFError, "15 rotary dimensions"),
    ("llama", {"rope__dimension_count": 8}, UnsupportedError, "8 of 16"),
    ("llama", {"rope__scaling__factor": -2.0}, GGUFError, "more than 0"),
    ("llama", {"rope__scaling__type": "dynamic"}, UnsupportedError, "'dynamic'"),
    ("llama", {"rope__scaling__type": "longrope"}, GGUFError, "rope_factors_long.weight"),
    (
        "llama-rope-freqs",
        {"rope__scaling__type": "yarn", "rope__scaling__factor": 2.0},
        UnsupportedError,
        "yarn with rope_freqs",
    ),
    ("llama", {"attention__value_length": 8}, UnsupportedError, "values (8)"),
    ("qwen3", {"expert_count": 8}, UnsupportedError, "mixture-of-experts"),
    ("qwen3moe", {"expert_count": None}, GGUFError, "qwen3moe.expert_count"),
    ("qwen3moe", {"expert_count": 0}, GGUFError, "positive"),
    ("qwen3moe", {"expert_used_count": 0}, GGUFError, "positive"),
    ("qwen3moe", {"expert_used_count": 7}, GGUFError, "expert_used_count is 7 of 6 experts"),
    ("qwen3moe", {"expert_group_count": 2}, UnsupportedError, "expert_group_count"),
    (
        "qwen3moe",
        {"expert_feed_forward_length": None, "feed_forward_length": 2},
        GGUFError,
        "qwen3moe.expert_feed_forward_length is missing",
    ),
    ("gpt-oss", {"attention__sliding_window": None}, GGUFError, "attention.sliding_window"),
    ("gpt-oss", {"attention__sliding_window_pattern": 1}, UnsupportedError, "a sliding window"),
    ("gpt-oss", {"attention__sliding_window_pattern": 5}, UnsupportedError, "4 layers"),
    (
        "qwen2moe",
        {"expert_shared_feed_forward_length": 0, "feed_forward_length": None},
        GGUFError,
        "qwen2moe.feed_forward_length",
    ),
    ("qwen2", {"attention__key_length": 32, "attention__value_length": 32}, UnsupportedError, "32"),
    ("gemma2", {"rope__scaling__type": "yarn"}, UnsupportedError, "'yarn'"),
    ("llama", {"attention__causal": False}, UnsupportedError, "attention.causal is false"),
    ("gemma3", {"attention__sliding_window_pattern": 9}, UnsupportedError, "7 layers"),
    ("gemma3", {"final_logit_softcapping": 30.0}, UnsupportedError, "cap on its logits"),
    ("phi3", {"rope__dimension_count": 8}, GGUFError, "(6,); expected (4,)"),
    ("gemma4", {"attention__sliding_window_pattern": None}, GGUFError, "list of 4 integers"),
    ("gemma4", {"attention__sliding_window_pattern": 6}, GGUFError, "list of 4 integers"),
    ("gemma4", {"attention__sliding_window_pattern": [True]}, GGUFError, "list of 4 integers"),
    ("gemma4", {"attention__sliding_window": None}, GGUFError, "gemma4.attention.sliding_window"),
    ("gemma4", {"attention__key_length_swa": None}, GGUFError, "attention.key_length_swa"),
    ("gemma4", {"attention__value_length_swa": 8}, UnsupportedError, "keys (16) and values (8)"),
    ("gemma4", {"rope__dimension_count_swa": None}, GGUFError, "32 rotary dimensions of a head of"),
    (
        "gemma4",
        {"rope__dimension_count_swa": 18},
        GGUFError,
        "18 rotary dimensions of a head of 16",
    ),
    ("gemma4", {"rope__dimension_count": 16}, UnsupportedError, "16 of 32"),
    ("gemma4", {"rope__freq_base_swa": -1.0}, GGUFError, "more than 0"),
    ("gemma4", {"embedding_length_per_layer_input": None}, GGUFError, "per_layer_input"),
    ("gemma4", {"attention__shared_kv_layers": 4}, GGUFError, "the last 4 of 4"),
    ("gemma4", {"attention__shared_kv_layers": 2}, GGUFError, "the last 2 of 4"),
    ("gemma4", {"attention__head_count_kv": [2, 2, 3, 2]}, GGUFError, "cannot share 3"),
    ("gemma4", {"attention__head_count_kv": [2, 2, 0, 2]}, GGUFError, "cannot share 0"),
    ("gemma4", {"attention__head_count_kv": [2, 1, 1, 2]}, UnsupportedError, "layers of a kind"),
    ("gemma4", {"feed_forward_length": [96, 96, 96, 192]}, UnsupportedError, "the last 0 layers"),
    ("qwen35", {"block_count": 2**31 - 1}, GGUFError, "block_count is 2147483647"),
    ("gemma4-e4b", {"attention__head_count_kv": [2, 2, 2, 1, 2, 1]}, UnsupportedError, "attn_v"),
    (
        "gemma4-e2b",
        {"feed_forward_length": [64] * 4 + [128]},
        UnsupportedError,
        "the last 2 layers",
    ),
    ("gemma4-a4b", {"expert_used_count": 5}, GGUFError, "5 of 4 experts"),
]


@pytest.mark.parametrize(("case", "keys", "error", "text"), BAD_KEYS)
def test_refused(
    tmp_path: Path, case: str, keys: dict[str, object], error: type[Exception], text: str
) -> None:
    with pytest.raises(error) as caught:
        config(tmp_path, case, **keys)
    assert text in str(caught.value)


def test_an_unknown_architecture_is_named_beside_those_there_are(tmp_path: Path) -> None:
    writer = GGUFWriter(tmp_path / "model.gguf", "unheard-of")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with open_gguf(tmp_path / "model.gguf") as file, pytest.raises(UnsupportedError) as caught:
        read_config(file)
    assert caught.value.exit_code == 3
    assert "'unheard-of'" in str(caught.value)
    for name in ("llama", "qwen2", "qwen3", "gemma2", "gemma3", "gemma4", "phi3"):
        assert name in str(caught.value)


def with_array(path: Path, key: str, values: list[int] | list[bool]) -> Path:
    """The tiny gemma3 with one key as an array of a value per layer."""
    model = tiny.build("gemma3", 0)
    model.metadata.pop(f"gemma3.{key}", None)
    header = GGUFWriter.write_header_to_file

    def add_then_write(writer: GGUFWriter) -> None:
        writer.add_array(f"gemma3.{key}", values)
        header(writer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GGUFWriter, "write_header_to_file", add_then_write)
        return tiny.write(path, model)


@pytest.mark.parametrize(
    ("slides", "period"),
    [
        ([True, True, False] * 2 + [True], 3),
        ([False] * 7, 1),
        ([True] * 6 + [False], 7),
        ([True, False, False, True, False, False, True], None),
        ([True] * 7, None),
        ([True, False], None),
    ],
)
def test_a_pattern_per_layer(tmp_path: Path, slides: list[bool], period: int | None) -> None:
    path = with_array(tmp_path / "m.gguf", "attention.sliding_window_pattern", slides)
    with open_gguf(path) as file:
        if period is None:
            with pytest.raises((UnsupportedError, GGUFError), match=r"irregular|not a list of 7"):
                read_config(file)
        else:
            assert read_config(file).args["sliding_window_pattern"] == period


def test_a_value_per_layer_must_be_uniform(tmp_path: Path) -> None:
    key = "attention.head_count_kv"
    with open_gguf(with_array(tmp_path / "a.gguf", key, [2] * 7)) as file:
        assert read_config(file).args["num_key_value_heads"] == 2
    path = with_array(tmp_path / "b.gguf", key, [2] * 6 + [4])
    with open_gguf(path) as file, pytest.raises(UnsupportedError, match="differs between layers"):
        read_config(file)


Change = Callable[[tiny.Tiny], None]


def cut(name: str, rows: int) -> Change:
    def apply(model: tiny.Tiny) -> None:
        data, kind = model.tensors[name]
        model.tensors[name] = data[:rows], kind

    return apply


def drop(name: str) -> Change:
    return lambda model: model.tensors.__delitem__(name)


def add(name: str) -> Change:
    return lambda model: model.tensors.__setitem__(name, (np.ones(4, np.float32), "F32"))


def say(key: str, value: object) -> Change:
    return lambda model: model.metadata.__setitem__(key, value)


BAD_TENSORS: list[tuple[str, Change, type[Exception], str]] = [
    (
        "llama",
        cut("blk.1.attn_q.weight", 32),
        GGUFError,
        "attn_q.weight has the shape (32, 64); expected (64, 64)",
    ),
    ("llama", cut("blk.0.attn_norm.weight", 32), GGUFError, "(32,); expected (64,)"),
    ("llama-biases", cut("blk.0.attn_k.bias", 8), GGUFError, "attn_k.bias has the shape (8,)"),
    ("llama-fused-qkv", cut("blk.2.attn_qkv.weight", 96), GGUFError, "expected (128, 64)"),
    ("llama", cut("token_embd.weight", 258), GGUFError, "each of the 259 tokens"),
    ("llama", drop("blk.2.ffn_down.weight"), GGUFError, "blk.2.ffn_down.weight is missing"),
    ("llama", drop("output_norm.weight"), GGUFError, "output_norm.weight is missing"),
    ("gpt-oss", drop("blk.0.attn_v.bias"), GGUFError, "blk.0.attn_v.bias is missing"),
    ("qwen3", drop("blk.0.attn_q_norm.weight"), GGUFError, "attn_q_norm.weight is missing"),
    ("llama", add("blk.0.attn_sinks.weight"), UnsupportedError, "blk.0.attn_sinks.weight"),
    ("qwen3", add("blk.0.attn_q.bias"), UnsupportedError, "blk.0.attn_q.bias"),
    ("llama", say("llama.block_count", 2), GGUFError, "tensors of 3 layers"),
    ("llama", say("llama.block_count", 2**31 - 1), GGUFError, "there are 29 tensors"),
    ("llama", say("llama.feed_forward_length", 2**30), GGUFError, "expected (1073741824, 64)"),
    ("qwen3moe", cut("blk.1.ffn_up_exps.weight", 5), GGUFError, "(5, 32, 64); expected (6, 32, 64"),
    ("qwen3moe", cut("blk.0.ffn_gate_inp.weight", 5), GGUFError, "(5, 64); expected (6, 64)"),
    ("qwen3moe", drop("blk.2.ffn_gate_exps.weight"), GGUFError, "ffn_gate_exps.weight is missing"),
    (
        "qwen3moe",
        say("qwen3moe.expert_count", 2**31 - 1),
        GGUFError,
        "(6, 64); expected (2147483647, 64)",
    ),
    (
        "qwen3moe",
        say("qwen3moe.expert_feed_forward_length", 2**30),
        GGUFError,
        "(6, 1073741824, 64)",
    ),
    ("qwen3moe", add("blk.0.ffn_gate_exps.bias"), UnsupportedError, "blk.0.ffn_gate_exps.bias"),
    ("gpt-oss", drop("blk.1.attn_sinks.weight"), GGUFError, "attn_sinks.weight is missing"),
    ("gpt-oss", cut("blk.1.attn_sinks.weight", 3), GGUFError, "(3,); expected (4,)"),
    ("gpt-oss", cut("blk.0.ffn_up_exps.bias", 5), GGUFError, "(5, 32); expected (6, 32)"),
    ("gpt-oss", drop("blk.3.ffn_down_exps.bias"), GGUFError, "ffn_down_exps.bias is missing"),
    ("gpt-oss", drop("blk.0.ffn_gate_inp.bias"), GGUFError, "ffn_gate_inp.bias is missing"),
    ("qwen2moe", drop("output.weight"), GGUFError, "output.weight is missing"),
    ("qwen2moe", cut("blk.0.ffn_gate_inp_shexp.weight", 32), GGUFError, "(32,); expected (1, 64)"),
    ("gemma4", drop("rope_freqs.weight"), GGUFError, "rope_freqs.weight is missing"),
    ("gemma4", drop("blk.0.attn_v.weight"), UnsupportedError, "blk.0.attn_v.weight is missing"),
    (
        "gemma4",
        drop("blk.2.layer_output_scale.weight"),
        GGUFError,
        "blk.2.layer_output_scale.weight",
    ),
    ("gemma4", cut("blk.2.attn_q_norm.weight", 16), GGUFError, "(16,); expected (32,)"),
    ("gemma4", add("blk.1.proj.weight"), UnsupportedError, "blk.1.proj.weight"),
    ("gemma4-e2b", drop("per_layer_token_embd.weight"), GGUFError, "per_layer_token_embd.weight"),
    ("gemma4-e2b", cut("per_layer_token_embd.weight", 258), GGUFError, "expected (259, 160)"),
    ("gemma4-a4b", drop("blk.1.ffn_gate_inp.scale"), GGUFError, "blk.1.ffn_gate_inp.scale is"),
    ("gemma4-a4b", cut("blk.0.ffn_down_exps.scale", 3), GGUFError, "(3,); expected (4,)"),
    ("gemma4-a4b", drop("blk.0.ffn_gate_up_exps.weight"), GGUFError, "ffn_gate_exps.weight is"),
    (
        "qwen2moe",
        say("qwen2moe.expert_shared_feed_forward_length", 32),
        GGUFError,
        "(64, 64); expected (32, 64)",
    ),
]


@pytest.mark.parametrize(("case", "change", "error", "text"), BAD_TENSORS)
def test_tensors_that_do_not_fit(
    tmp_path: Path, case: str, change: Change, error: type[Exception], text: str
) -> None:
    model = tiny.build(case, 0)
    path = tiny.write(tmp_path / "good.gguf", model)
    with open_gguf(path) as file:
        plan(file, read_config(file))
    change(model)
    path = tiny.write(tmp_path / "bad.gguf", model)
    with open_gguf(path) as file, pytest.raises(error) as caught:
        plan(file, read_config(file))
    assert text in str(caught.value)


def test_the_groups_of_a_plan(tmp_path: Path) -> None:
    with open_gguf(tiny.write(tmp_path / "m.gguf", tiny.build("llama-fused-qkv", 0))) as file:
        layer = plan(file, read_config(file)).layers[1]
    groups: dict[str, list[str]] = {}
    for weight in layer:
        groups.setdefault(weight.group, []).append(weight.module.rsplit(".", 1)[1])
    assert groups["model.layers.1.qkv"] == ["q_proj", "k_proj", "v_proj"]
    assert groups["model.layers.1.gate_up"] == ["gate_proj", "up_proj"]
    parts = {w.module.rsplit(".", 1)[1]: w.weight[0] for w in layer}
    assert [(parts[p].start, parts[p].stop, parts[p].swap) for p in ("q_proj", "k_proj")] == [
        (0, 64, (4, 8, 2, 1)),
        (64, 96, (2, 8, 2, 1)),
    ]
    assert (parts["v_proj"].start, parts["v_proj"].stop, parts["v_proj"].swap) == (96, 128, ())


def test_the_tables_need_neither_mlx_nor_mlx_lm() -> None:
    code = (
        "import sys, mlxfuse.models, mlxfuse.models.config, mlxfuse.models.plan;"
        "print(sorted({m.split('.')[0] for m in sys.modules} & {'mlx', 'mlx_lm', 'transformers'}))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_each_table_is_complete() -> None:
    assert set(ARCHITECTURES) == {case.arch for case in tiny.CASES.values()}
    for arch in ARCHITECTURES.values():
        assert arch.models
        for names in arch.groups.values():
            assert any(set(names) <= set(table) for table in arch.tables)
