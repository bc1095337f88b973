"""`doctor`, and what a header tells about memory."""

import json

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache

from mlxfuse import blas, env
from mlxfuse.bench import cases, doctor
from mlxfuse.formats import BY_NAME
from mlxfuse.gguf.reader import open_gguf
from mlxfuse.inspect.needs import Needs, needs
from mlxfuse.kernels.matmul.dequantize import dequantize
from mlxfuse.kernels.runtime import kernel as _kernel
from mlxfuse.loader import load

from ..cli.test_cli import invoke
from ..models import tiny


@pytest.fixture(
    params=[
        "llama",
        "qwen3",
        "gemma2",
        "gemma2-pattern",
        "gemma3",
        "gpt-oss",
        "gemma4",
        "gemma4-e4b",
    ]
)
def path(request, tmp_path):
    return tiny.write(tmp_path / "tiny.gguf", tiny.build(request.param, 0))


def needs_of(path):
    with open_gguf(path) as file:
        return needs(file)


def test_needs_are_what_the_model_takes(path):
    """The cache of as many tokens as a step of mlx-lm's caches, in its own type: float32."""
    wanted = needs_of(path)
    model, _ = load(path)
    assert wanted.dense == sum(a.nbytes for _, a in tree_flatten(model.parameters()))
    caches = make_prompt_cache(model)
    tokens = 256
    for _ in range(tokens // 64):
        mx.eval(model(mx.zeros((1, 64), mx.int32), cache=caches))
    for (size, window), cache in zip(wanted.kv, caches, strict=True):
        assert window == getattr(cache, "max_size", 0)
        if not window:
            assert cache.nbytes == 2 * size * tokens
    assert wanted.cache(tokens) == sum(s * min(tokens, w or tokens) for s, w in wanted.kv)


def test_active_bytes_leave_out_the_other_rows_and_experts(tmp_path):
    made = tiny.build("llama-q4", 0)  # its output head is not the embedding
    wanted = needs_of(tiny.write(tmp_path / "a.gguf", made))
    embedding = made.tensors["token_embd.weight"][0].nbytes
    assert wanted.weights - wanted.active == embedding - embedding // tiny.VOCABULARY
    tied = needs_of(tiny.write(tmp_path / "b.gguf", tiny.build("llama", 0)))
    assert tied.active == tied.weights
    made = tiny.build("gemma4-e2b", 0)  # and a table of each layer's inputs
    wanted = needs_of(tiny.write(tmp_path / "c.gguf", made))
    inputs = made.tensors["per_layer_token_embd.weight"][0].nbytes
    assert wanted.weights - wanted.active == inputs - inputs // tiny.VOCABULARY


def test_experts_count_by_those_that_are_used(tmp_path):
    made = tiny.build("llama", 0)
    before = needs_of(tiny.write(tmp_path / "a.gguf", made))
    made.metadata |= {"llama.expert_count": 8, "llama.expert_used_count": 2}
    name, kind = "blk.0.ffn_gate_exps.weight", next(iter(made.tensors.values()))[1]
    made.tensors[name] = (np.zeros((8, 4, 34), np.uint8), kind)
    after = needs_of(tiny.write(tmp_path / "b.gguf", made))
    size = after.weights - before.weights
    assert size == 8 * 4 * 34
    assert after.active - before.active == size // 4


def test_what_a_mixture_takes_by_hand(tmp_path):
    """Q8_0 has 34 bytes for 32 weights: 68 for a row of 64, 34 for one of 32."""
    path = tiny.write(tmp_path / "m.gguf", tiny.build("qwen2moe", 0))
    attention = (64 + 32 + 32 + 64) * 68 + (64 + 32 + 32) * 4
    experts = 6 * (32 * 68 + 32 * 68 + 64 * 34)
    shared = 3 * 64 * 68 + 64 * 4
    norms, router = 2 * 64 * 4, 6 * 64 * 4
    layers = 3 * (attention + experts + shared + norms + router)
    head = 259 * 68 + 64 * 4
    assert (layers, head) == (204_288, 17_868)
    wanted = needs_of(path)
    assert wanted.weights == layers + head + 259 * 68 == 239_768
    # 3 of 6 experts, one row of the embedding.
    assert wanted.active == layers - 3 * experts // 2 + head + 68 == 163_472
    # Keys and values of 2 heads of 16 in float16, in 3 layers.
    assert wanted.cache(256) == 256 * 3 * 2 * 2 * 16 * 2 == 98_304
    for command in ("doctor", "inspect"):
        found = json.loads(invoke(command, path, "--json").stdout)
        assert found["model" if command == "doctor" else "memory"]["active"] == 163_472
    assert "163.47 kB read for each token" in invoke("inspect", path).stdout
    assert "0.001 GB of the file are read for each token" in invoke("doctor", path).stdout


@pytest.mark.parametrize(
    ("platform", "more", "said"),
    [
        ("darwin", 10 * 384, "fits with 10 tokens in about 243.61 kB"),
        ("darwin", 256 * 384, "fits with its whole context in about 338.07 kB"),
        ("darwin", 383, "does not fit in about 240.15 kB"),
        # Half of it in float32, the rest dequantised; 768 bytes a token.
        ("linux", 0, "fits with 156 tokens in about 239.77 kB, "),
    ],
)
def test_inspect_tells_what_fits_here(platform, more, said, monkeypatch, tmp_path):
    monkeypatch.setattr("mlxfuse.inspect.header.budget", lambda: 239_768 + more)
    monkeypatch.setattr("mlxfuse.inspect.header.sys.platform", platform)
    path = tiny.write(tmp_path / "m.gguf", tiny.build("qwen2moe", 0))
    assert said in invoke("inspect", path).stdout


def test_the_longest_context_is_the_last_that_fits():
    wanted = Needs(1000, 0, 0, ((10, 0), (10, 5)))
    longest = wanted.longest(1200)
    assert (longest, wanted.cache(longest), wanted.cache(longest + 1)) == (15, 200, 210)
    assert wanted.longest(999) == 0


def test_on_this_machine(tmp_path):
    path = tiny.write(tmp_path / "tiny.gguf", tiny.build("llama", 0))
    result = invoke("doctor", path, "--json", "-c", "100")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["packages"]["mlx"] == mx.__version__
    model = found["model"]
    assert model["fits"] is True
    assert model["context"] == 100
    assert model["total"] == model["weights"] + model["cache"]
    text = invoke("doctor", path).stdout
    assert "tiny.gguf fits" in text
    if not mx.metal.is_available():
        assert found["device"]["blas"] == blas.in_use()
        assert found["kernels"]["unavailable"] == "this MLX has no Metal device"
        assert model["weights"] == needs_of(path).dense


def test_what_does_not_fit(monkeypatch, tmp_path):
    path = tiny.write(tmp_path / "tiny.gguf", tiny.build("llama", 0))
    wanted = needs_of(path)
    budget = wanted.weights + wanted.cache(10)
    device = {"name": "M1", "kind": "metal", "architecture": "applegpu_g13g", "generation": "M1"}
    device |= {"memory": 1 << 33, "budget": budget}
    monkeypatch.setattr(doctor, "device", lambda: device)
    found = doctor.diagnose(path)
    assert found["model"]["fits"] is False
    assert found["model"]["longest_context"] == 10
    assert "up to 10 tokens fit" in doctor.render(found)
    device["budget"] = wanted.weights - 1
    assert "the weights alone do not fit" in doctor.render(doctor.diagnose(path))


def test_the_machine_of_a_mac(monkeypatch):
    info = {"device_name": "Apple M4 Pro", "architecture": "applegpu_g16s"}
    info |= {"memory_size": 48 << 30, "max_recommended_working_set_size": 36 << 30}
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(mx, "device_info", lambda: info)
    found = doctor.device()
    assert (found["generation"], found["budget"]) == ("M4", 36 << 30)
    info["architecture"] = "applegpu_g19s"
    assert doctor.device()["generation"] == "newer than M5"


@pytest.fixture
def few(monkeypatch, tmp_path):
    """Products of one format, and one other kernel."""
    monkeypatch.setenv("MLXFUSE_CACHE", str(tmp_path))
    table = [*cases.cases(cases.SMALL, [BY_NAME["Q4_K"]])]
    monkeypatch.setattr(doctor, "cases", lambda sizes: [*table[:6], table[8]])


def test_the_kernels_self_tests(few, kernels, monkeypatch):
    found = doctor._kernels()
    assert found["unavailable"] is None
    names = [
        *("dequantize, Q4_K 16x512", "quantized_matmul, Q4_K 16x512, 1 row"),
        *("int8_matmul, Q4_K 16x512, 1 row of int8", "quantized_matmul, Q4_K 16x512, 4 rows"),
        *("int8_matmul, Q4_K 16x512, 4 rows of int8", "rms_norm, 1 row of 512, residual"),
        "quantized_matmul, Q4_K 2 of 4 experts 16x512",
    ]
    results = {f"{v['kernel']}, {v['variant']}": v["failure"] for v in found["variants"]}
    assert results == dict.fromkeys(names, "")
    # A kernel that is wrong is named with what is wrong.
    (env.cache_dir() / "self-tests.json").unlink()
    right = _kernel.run
    monkeypatch.setattr(_kernel, "run", lambda *a, **k: [y * 1.01 for y in right(*a, **k)])
    monkeypatch.setattr(doctor.self_test, "disabled", {})
    wrong = doctor._kernels()
    failures = [v["failure"] for v in wrong["variants"]]
    assert all("largest error" in failure for failure in failures), failures
    text = doctor.render(doctor.diagnose() | {"kernels": wrong})
    assert "int8_matmul 0 of 2, rms_norm 0 of 1" in text
    assert "quantized_matmul, Q4_K 16x512, 1 row is not used: largest error" in text
    passed = doctor.render(doctor.diagnose() | {"kernels": found})
    assert "dequantize 1 of 1, quantized_matmul 3 of 3, int8_matmul 2 of 2" in passed
    assert "tuning    none: built-in variants" in passed


@pytest.mark.parametrize("name", [f.name for f in BY_NAME.values() if f.kernel])
def test_samples_decode_to_finite_numbers_that_differ(name):
    values = np.array(dequantize(cases.sample(BY_NAME[name]), None, mx.float32))
    assert np.isfinite(values).all()
    assert len(np.unique(values)) > 100
