"""Models by any handle: MLX-LM checkpoints, folders of GGUF files, adapters, mlx_lm's arguments."""

import inspect
import json
import types

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm import lora
from mlx_lm.models import llama
from mlx_lm.tuner.lora import LoRALinear
from mlx_lm.tuner.utils import linear_to_lora_layers, load_adapters
from typer.testing import CliRunner

from mlxfuse.cli import app
from mlxfuse.errors import CheckpointError, ModelRefError, UnsupportedError
from mlxfuse.export.mlx_checkpoint import export_mlx
from mlxfuse.fusion import patch_model, unpatch_model
from mlxfuse.loader import load
from mlxfuse.models import checkpoint

from .models import tiny

RAW = ("-p", "Hello", "-m", "12", "--ignore-chat-template", "--temp", "0")


def invoke(*args, **more):
    return CliRunner().invoke(app, [str(a) for a in args], **more)


@pytest.fixture(scope="module")
def gguf(tmp_path_factory):
    made = tiny.build("llama-q4", 0)
    return tiny.write(tmp_path_factory.mktemp("any") / "model-Q4_0.gguf", made)


@pytest.fixture(scope="module")
def converted(gguf, tmp_path_factory):
    """What `mlx_lm.convert -q` makes of a tiny float model."""
    folder = tmp_path_factory.mktemp("converted")
    float_model = tiny.write(folder / "f.gguf", tiny.build("llama", 0))
    export_mlx(float_model, folder / "q8")
    mlx_lm.convert(str(folder / "q8"), str(folder / "float"), dequantize=True)
    options = {"quantize": True, "q_bits": 4, "q_group_size": 32}
    mlx_lm.convert(str(folder / "float"), str(folder / "q4"), **options)
    return folder / "q4"


def logits(model, ids):
    return np.array(model(mx.array([ids])).astype(mx.float32))


def test_load_takes_what_mlx_lm_takes():
    """By name and by position, with the same defaults; what is ours can only be named."""
    theirs = inspect.signature(mlx_lm.load).parameters
    ours = inspect.signature(load).parameters
    assert list(ours)[: len(theirs)] == list(theirs)
    for name, parameter in theirs.items():
        assert ours[name].kind == parameter.kind
        if parameter.default is not inspect.Parameter.empty:
            assert ours[name].default == parameter.default, name
    own = [p for name, p in ours.items() if name not in theirs]
    assert own
    assert all(p.kind is inspect.Parameter.KEYWORD_ONLY for p in own)


def test_a_converted_checkpoint_gives_stocks_tokens_and_is_fused(converted):
    model, tokenizer = mlx_lm.load(str(converted))
    want = [
        int(r.token)
        for r in mlx_lm.stream_generate(model, tokenizer, tokenizer.encode("Hello"), max_tokens=12)
    ]
    result = invoke("generate", converted, *RAW, "--fuse", "all", "--json")
    assert result.exit_code == 0, result.output
    got = json.loads(result.stdout)
    assert got["tokens"] == want
    fused = got["load"]["patch"]["fusions"]
    assert fused["qkv"] == fused["gate_up"] == {"fused": 3, "of": 3}
    table = invoke("generate", converted, *RAW, "--fuse", "all").stderr
    assert "qkv" in table


def test_a_checkpoint_in_every_command(converted, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("All of this is a text. " * 20)
    shown = json.loads(invoke("inspect", converted, "--json").stdout)
    assert (shown["architecture"], shown["layers"]) == ("llama", 3)
    assert {t["type"] for t in shown["tensor_types"]} >= {"4 bits in groups of 32"}
    assert "llama" in invoke("inspect", converted).stdout
    scored = invoke("perplexity", converted, "-f", text, "-c", "64", "--json")
    assert json.loads(scored.stdout)["perplexity"]["value"] > 1
    said = invoke("chat", converted, "-m", "4", "--json", input="Hello\n")
    assert json.loads(said.stdout)["generation_tokens"] <= 4
    for command in (("export", converted, tmp_path / "out"), ("doctor", converted)):
        refused = invoke(*command)
        assert refused.exit_code == 1
        assert "MLX-LM checkpoint" in refused.stderr


def test_what_is_wrong_with_a_checkpoint(converted, tmp_path):
    with pytest.raises(UnsupportedError, match="trust_remote_code"):
        load(converted, trust_remote_code=True)
    with pytest.raises(UnsupportedError, match="context_length"):
        load(converted, context_length=100)
    (tmp_path / "config.json").write_text((converted / "config.json").read_text())
    with pytest.raises(CheckpointError, match="safetensors"):
        load(tmp_path)
    for path in converted.iterdir():
        if path.name != "config.json":
            (tmp_path / path.name).symlink_to(path)
    config = json.loads((converted / "config.json").read_text())
    for change, error, said in (
        ({"model_file": "x.py"}, UnsupportedError, "code of its own"),
        ({"model_type": "nonesuch"}, UnsupportedError, "nonesuch"),
        ({"num_hidden_layers": 4}, CheckpointError, "Missing"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(error, match=said):
            load(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(CheckpointError, match="expected a JSON object, found list"):
        load(tmp_path)


def test_what_a_script_changes(gguf, converted):
    model, tokenizer, config = load(
        gguf,
        tokenizer_config={"chat_template": "{{ messages[0].content }}!", "eos_token": "a"},
        model_config={"rope_theta": 5.0},
        return_config=True,
        fuse="off",
    )
    assert config["rope_theta"] == model.args.rope_theta == 5.0
    messages = [{"role": "user", "content": "hi"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == "hi!"
    assert tokenizer.has_chat_template
    assert tokenizer.eos_token_ids == {tokenizer.get_vocab()["a"]}
    with pytest.raises(UnsupportedError, match="tokenizer_config: use_fast"):
        load(gguf, tokenizer_config={"use_fast": False})
    loaded = load(converted, lazy=True, return_config=True)
    assert loaded[2]["model_type"] == "llama"
    half, _ = load(converted, dtype="float16")
    assert half.model.norm.weight.dtype == mx.float16


def test_a_folder_of_gguf_files(gguf, tmp_path):
    folder = tmp_path / "models"
    folder.mkdir()
    with pytest.raises(ModelRefError, match="has no model"):
        load(folder)
    (folder / "a-Q4_0.gguf").symlink_to(gguf)
    (folder / "mmproj-F16.gguf").write_bytes(b"")
    assert invoke("inspect", folder).exit_code == 0
    (folder / "b-Q8_0.gguf").symlink_to(gguf)
    told = invoke("inspect", folder)
    assert told.exit_code == 1
    assert "Q4_0\n" in told.stderr
    assert "Q8_0\n" in told.stderr
    assert "mmproj" not in told.stderr
    shown = json.loads(invoke("inspect", f"{folder}:q8_0", "--json").stdout)
    assert shown["file"].endswith("b-Q8_0.gguf")


@pytest.fixture(scope="module")
def adapter(gguf, tmp_path_factory):
    """An adapter that `mlx_lm.lora` trained for 20 steps."""
    folder = tmp_path_factory.mktemp("lora")
    export_mlx(gguf, folder / "base")
    for name in ("train", "valid"):
        line = json.dumps({"text": "the quick brown fox jumps over the lazy dog"})
        (folder / f"{name}.jsonl").write_text(f"{line}\n" * 4)
    options = {
        "model": str(folder / "base"),
        "train": True,
        "data": str(folder),
        "iters": 20,
        "batch_size": 2,
        "num_layers": 2,
        "learning_rate": 1e-3,
        "max_seq_length": 64,
        "val_batches": 1,
        "adapter_path": str(folder / "adapter"),
    }
    lora.run(types.SimpleNamespace(**{**lora.CONFIG_DEFAULTS, **options}))
    return folder / "adapter"


@pytest.mark.parametrize("fuse", ["off", "all"])
def test_an_adapter_changes_a_gguf_as_it_changes_the_mlx_model(gguf, adapter, fuse):
    folder = adapter
    # The weights that the file holds exactly, as stock mlx-lm's own layers.
    dense, tokenizer = load(gguf, fuse="off")
    stock = llama.Model(llama.ModelArgs.from_dict({"model_type": "llama", **vars(dense.args)}))
    stock.load_weights(tree_flatten(dense.parameters()))
    load_adapters(stock, str(folder))
    stock.eval()
    ids = tokenizer.encode("the quick brown")
    want = logits(stock, ids)
    model, _ = load(gguf, adapter_path=folder, fuse=fuse)
    got = logits(model, ids)
    assert np.abs(got - want).max() < 1e-5 * np.abs(want).max()
    plain = logits(load(gguf, fuse=fuse)[0], ids)
    assert np.abs(plain - want).max() > 1e-2 * np.abs(want).max()  # control
    result = invoke("generate", gguf, *RAW, "--adapter-path", folder, "--fuse", fuse, "--json")
    report = json.loads(result.stdout)["load"]["patch"]
    if fuse == "all":
        fusions = report["fusions"]
        assert fusions["qkv"] == fusions["residual"] == {"fused": 3, "of": 3}
        assert fusions["gate_up"] == {"fused": 1, "of": 3}  # of the layer without an adapter
        assert "gate_proj and up_proj have adapters" in json.dumps(report)


@pytest.mark.parametrize(
    ("name", "kind"), [("phi3", "residual"), ("qwen2", "residual"), ("starcoder2", "qkv")]
)
def test_adapters_beside_what_is_fused(tmp_path, name, kind):
    """Of one matrix for q, k and v, of biases, of an MLP without a gate."""
    model, _ = load(tiny.write(tmp_path / "m.gguf", tiny.build(name, 0)), fuse="off")
    linear_to_lora_layers(model, 2, {"rank": 4, "scale": 8.0, "dropout": 0.0})
    model.eval()
    held = [m for m in model.modules() if isinstance(m, LoRALinear)]
    assert held

    def change(seed):
        for number, one in enumerate(held):
            key = mx.random.key(seed + number)
            one.lora_b = 0.2 * mx.random.normal(one.lora_b.shape, key=key)

    ids = list(range(20))
    plain = logits(model, ids)
    change(0)
    want = logits(model, ids)
    assert np.abs(want - plain).max() > 1e-2 * np.abs(want).max()  # control
    report = patch_model(model, fuse="all")
    tally = report.tallies[kind]
    assert len(tally.fused) == tally.total > 0
    bar = 1e-5 * np.abs(want).max()
    assert np.abs(logits(model, ids) - want).max() < bar
    change(100)  # noticed: what is fused is of other arrays
    got = logits(model, ids)
    unpatch_model(model)
    assert np.abs(got - logits(model, ids)).max() < bar
    assert np.abs(got - want).max() > 10 * bar


def test_what_is_wrong_with_an_adapter(gguf, adapter, tmp_path):
    with pytest.raises(CheckpointError, match=r"there is no adapter_config\.json"):
        load(gguf, adapter_path=tmp_path)
    for name in ("adapter_config.json", "adapters.safetensors"):
        (tmp_path / name).write_bytes((adapter / name).read_bytes())
    other = tiny.write(tmp_path / "other.gguf", tiny.build("phi3", 0))
    with pytest.raises(CheckpointError, match="does not fit"):
        load(other, adapter_path=tmp_path)
    result = invoke("generate", gguf, "--adapter-path", tmp_path / "none")
    assert result.exit_code == 4
    assert "Traceback" not in result.output


def test_progress_is_the_share_of_the_weights(gguf):
    shares = []
    load(gguf, progress=shares.append)
    assert shares == sorted(shares)
    assert shares[0] == 0
    assert 0.5 < shares[-1] < 1
    assert len(set(shares)) > 10


def test_progress_of_a_checkpoint(converted, monkeypatch):
    monkeypatch.setattr(checkpoint, "_STEP", 1000)
    shares = []
    model, _ = load(converted, progress=shares.append)
    assert shares == sorted(shares)
    assert shares[-1] == 1
    assert len(shares) > 10
    stock, _ = mlx_lm.load(str(converted))
    ids = list(range(9))
    assert np.abs(logits(model, ids) - logits(stock, ids)).max() < 1e-5


def test_a_checkpoint_whose_weights_are_cut_off_says_so(converted, tmp_path):
    for file in converted.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-5000])
    with pytest.raises(CheckpointError, match="mlx-lm cannot load this checkpoint"):
        load(tmp_path)
