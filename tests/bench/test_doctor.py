"""`doctor`, and what a header tells about memory."""

import json
import math
import re
import time

import mlx.core as mx
import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFWriter
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache

from mlxfuse import blas, env
from mlxfuse.bench import cases, doctor
from mlxfuse.errors import DoesNotFitError
from mlxfuse.formats import BY_NAME
from mlxfuse.gguf.reader import open_gguf
from mlxfuse.inspect.needs import PLAIN, STEP, KVBits, Needs, needs
from mlxfuse.inspect.room import check_room
from mlxfuse.kernels.matmul.dequantize import dequantize
from mlxfuse.kernels.runtime import kernel as _kernel
from mlxfuse.loader import load
from mlxfuse.memory import Machine, mac
from mlxfuse.models.plan import Group
from mlxfuse.nn.cpu import StreamedLinear
from mlxfuse.nn.kv.options import KVOptions

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
            assert cache.nbytes == 4 * size * tokens
    assert wanted.cache(tokens) == sum(2 * s * min(tokens, w or tokens) for s, w in wanted.kv)


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
    assert "163.47 kB for each token" in invoke("inspect", path).stdout
    assert "0.001 GB are read for each token" in invoke("doctor", path).stdout


def test_a_step_of_a_prompt_by_hand(tmp_path):
    """qwen2moe: 259 x 64 head; experts 6 x (32 + 32) x 64; a token's outputs in a layer."""
    wanted = needs_of(tiny.write(tmp_path / "m.gguf", tiny.build("qwen2moe", 0)))
    assert wanted.largest == 259 * 64  # the head; a layer's gate and up, of one expert, are fewer
    attention, shared, router = 64 + 32 + 32 + 64, 64 + 64 + 64 + 1, 6
    assert wanted.width == attention + 3 * (32 + 32 + 64) + shared + router
    use = wanted.on(mac(64 << 30), 100)
    assert use.prompt == 2 * (wanted.largest + 100 * wanted.width)
    assert wanted.on(mac(64 << 30), 10**6).prompt == 2 * (wanted.largest + STEP * wanted.width)
    # Vectors and the router are F32 in the file and ordinary numbers in memory.
    floats = 3 * (2 * 64 + 6 * 64 + 64 + 128) + 64
    assert wanted.plain == floats
    assert wanted.kept == wanted.weights - 4 * floats
    assert use.weights == wanted.kept + 2 * floats


@pytest.mark.parametrize(
    ("kernels", "budget", "said"),
    [
        (True, 10**6, "fits: weights"),
        (True, 273_000, "tokens fit; a smaller"),
        (True, 200_000, "does not fit: weights"),
        (True, 200_000, "the weights alone do not fit"),
        (False, 10**6, "are dequantised for each token: very slow"),
    ],
)
def test_inspect_tells_what_fits_here(kernels, budget, said, monkeypatch, tmp_path):
    here = Machine(kernels, budget, budget)
    monkeypatch.setattr("mlxfuse.inspect.header.machine", lambda: here)
    path = tiny.write(tmp_path / "m.gguf", tiny.build("qwen2moe", 0))
    assert said in invoke("inspect", path, "-c", "256").stdout


def test_the_longest_context_is_the_last_that_fits():
    wanted = Needs(1000, 0, ((5, 0), (5, 5)), 1000, 0, {}, 0)
    longest = wanted.longest(Machine(True, 1200, 0))
    # Keys and values of two numbers each, as one of five has no half.
    assert (longest, wanted.cache(longest), wanted.cache(longest + 1)) == (20, 200, 208)
    assert wanted.longest(Machine(True, 999, 0)) == 0


@pytest.mark.parametrize("bits", ["k8v4", "8", "k16v8"])
def test_a_compressed_cache_takes_what_it_is_said_to(bits, tmp_path):
    path = tiny.write(tmp_path / "m.gguf", tiny.build("llama", 0))
    model, _ = load(path, dtype="float16", kv_bits=bits, kv_group_size=32)
    caches = make_prompt_cache(model)
    for _ in range(4):
        mx.eval(model(mx.zeros((1, 64), mx.int32), cache=caches))
    options = KVOptions.parse(bits, 32)
    # Heads of 16 have groups of 16 where 32 are asked for.
    made = KVBits(options.k_bits, options.v_bits, 16)
    assert sum(c.token_bytes for c in caches) == needs_of(path).cache(1, made)
    found = json.loads(invoke("doctor", path, "--json", "--kv-bits", bits, "-c", "9").stdout)
    wanted = needs_of(path).cache(9, KVBits(options.k_bits, options.v_bits))
    assert found["model"]["cache"] == wanted
    found = json.loads(invoke("inspect", path, "--json", "--kv-bits", bits, "-c", "9").stdout)
    assert (found["memory"]["cache"], found["memory"]["context"]) == (wanted, 9)


# --- a Mac with 64 GB ---------------------------------------------------------------------

LAYER = {
    **{"attn_q": (8192, 8192), "attn_k": (1024, 8192), "attn_v": (1024, 8192)},
    **{"attn_output": (8192, 8192), "ffn_gate": (28672, 8192), "ffn_up": (28672, 8192)},
    "ffn_down": (8192, 28672),
}


def no_kernel_for(monkeypatch, name):
    """As if a type had no kernel; more and more of them have one."""
    readable = Group.readable.fget

    def without(self):
        return readable(self) and not any(s.format.name == name for s in self.sources)

    monkeypatch.setattr(Group, "readable", property(without))


@pytest.fixture
def seventy(tmp_path, monkeypatch):
    """The header of a Llama of 70 billion weights, in a file that is all hole."""
    no_kernel_for(monkeypatch, "IQ2_XXS")
    monkeypatch.setenv("MLXFUSE_MEMORY", "64")
    path = tmp_path / "seventy.gguf"
    writer = GGUFWriter(path, "llama")
    for key, value in {
        **{"context_length": 131072, "embedding_length": 8192, "block_count": 80},
        **{"feed_forward_length": 28672, "vocab_size": 256},
        **{"attention.head_count": 64, "attention.head_count_kv": 8},
    }.items():
        writer.add_uint32(f"llama.{key}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"t{i}" for i in range(256)])
    writer.add_token_types([1] * 256)
    kinds = {"IQ2_XXS": (256, 66), "Q4_K": (256, 144), "F32": (1, 4)}

    def add(name, shape, kind):
        block, size = kinds[kind]
        count = math.prod(shape) // block
        stored = (*shape[:-1], shape[-1] // block * size) if block > 1 else shape
        dtype = np.dtype(np.uint8 if block > 1 else np.float32)
        writer.add_tensor_info(name, stored, dtype, count * size, GGMLQuantizationType[kind])

    add("token_embd.weight", (256, 8192), "Q4_K")
    add("output.weight", (256, 8192), "Q4_K")
    add("output_norm.weight", (8192,), "F32")
    for i in range(80):
        for name, shape in LAYER.items():
            add(f"blk.{i}.{name}.weight", shape, "Q4_K" if name == "attn_v" else "IQ2_XXS")
        for name in ("attn_norm", "ffn_norm"):
            add(f"blk.{i}.{name}.weight", (8192,), "F32")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size + 20 * 10**9)
    return path


WITHOUT = 80 * sum(math.prod(shape) for name, shape in LAYER.items() if name != "attn_v")


def test_inspect_and_doctor_tell_what_it_takes_on_a_mac(seventy):
    assert 134e9 < 2 * WITHOUT < 137e9
    for command, kind in (("inspect", "memory"), ("doctor", "model")):
        found = json.loads(invoke(command, seventy, "--json", "-c", "8192").stdout)[kind]
        assert found["fits"] is False
        assert found["longest_context"] == 0
        assert found["budget"] == 48 << 30
        assert 0 <= found["held"] - 2 * WITHOUT < 0.5e9
        assert found["cache"] == 8192 * 80 * 2 * 8 * 128 * 2
        assert found["apart"] == {"IQ2_XXS": WITHOUT // 256 * 66}
        text = invoke(command, seventy, "-c", "8192").stdout
        assert "does not fit: weights 13" in text
        assert "GB of IQ2_XXS have no kernel and become 16-bit numbers" in text
        assert "the weights alone do not fit" in text


def test_load_refuses_it_at_once_and_allocates_nothing(seventy):
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    start = time.perf_counter()
    with pytest.raises(DoesNotFitError) as caught:
        load(seventy, fuse="all")
    assert time.perf_counter() - start < 2
    assert mx.get_peak_memory() - before < 1 << 20
    message = str(caught.value)
    for part in (
        "seventy.gguf: the model does not fit: it needs 13",
        "this machine has 51.5 GB for it",
        "17.5 GB of IQ2_XXS have no kernel and become 16-bit numbers",
        "take a smaller quantisation, or one whose types all have kernels",
        "ignore_memory=True, or --ignore-memory",
    ):
        assert part in message, message
    result = invoke("generate", seventy)
    assert result.exit_code == 1
    assert "does not fit" in result.stderr


def test_what_would_fit_is_said(monkeypatch, tmp_path):
    path = tiny.write(tmp_path / "m.gguf", tiny.build("llama-q4", 0))
    wanted = needs_of(path)

    def message(budget, tokens=1000, bits=PLAIN, physical=10**9):
        here = Machine(True, budget, physical)
        with pytest.raises(DoesNotFitError) as caught:
            check_room(path, wanted, here, tokens, bits)
        return str(caught.value)

    use = wanted.on(mac(1 << 40), 1000)
    said = message(use.total - 1)
    assert "999 tokens fit (context_length)" in said
    assert "it fits with kv_bits=k8v4" in said
    assert f"sudo sysctl iogpu.wired_limit_mb={math.ceil(use.total / 2**20)} lets" in said
    assert "quantisation" not in said
    few = message(use.weights, physical=use.weights)
    assert "take a smaller quantisation;" in few
    assert "k8v4" not in few
    assert "sysctl" not in few
    assert "k8v4" not in message(1000, bits=KVBits(8, 4))
    check_room(path, wanted, Machine(True, use.total, 0), 1000, PLAIN)  # the control


def test_load_goes_on_if_it_is_told_to(monkeypatch, tmp_path):
    path = tiny.write(tmp_path / "m.gguf", tiny.build("llama", 0))  # Q8_0
    no_kernel_for(monkeypatch, "Q8_0")
    ids = mx.array([[1, 2, 3]])
    want = load(path, fuse="all")[0](ids)
    monkeypatch.setattr("mlxfuse.loader.machine", lambda kernels: Machine(True, 1000, 1000))
    with pytest.raises(DoesNotFitError):
        load(path, fuse="all")
    model, _ = load(path, fuse="all", ignore_memory=True)
    assert any(isinstance(m, StreamedLinear) for m in model.modules())
    assert mx.allclose(model(ids), want, atol=1e-4)
    result = invoke("generate", path, "-m", "2", "--ignore-memory", "--fuse", "all")
    assert result.exit_code == 0, result.output


def test_on_this_machine(tmp_path):
    path = tiny.write(tmp_path / "tiny.gguf", tiny.build("llama", 0))
    result = invoke("doctor", path, "--json", "-c", "100")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["packages"]["mlx"] == mx.__version__
    model = found["model"]
    assert model["fits"] is True
    assert model["context"] == 100
    assert model["total"] == model["held"] + model["cache"] + model["prompt"]
    text = invoke("doctor", path).stdout
    assert "tiny.gguf fits" in text
    if not mx.metal.is_available():
        assert found["device"]["blas"] == blas.in_use()
        assert found["kernels"]["unavailable"] == "this MLX has no Metal device"
        assert model["held"] == needs_of(path).dense


def test_what_does_not_fit(monkeypatch, tmp_path):
    path = tiny.write(tmp_path / "tiny.gguf", tiny.build("llama", 0))
    wanted = needs_of(path)
    budget = wanted.on(mac(1 << 40), 10).total
    monkeypatch.setattr(doctor, "machine", lambda kernels: Machine(True, budget, budget))
    found = doctor.diagnose(path)
    assert found["model"]["fits"] is False
    assert found["model"]["longest_context"] == 10
    assert "up to 10 tokens fit" in doctor.render(found)


def test_the_machine_of_a_mac(monkeypatch):
    info = {"device_name": "Apple M4 Pro", "architecture": "applegpu_g16s"}
    info |= {"memory_size": 48 << 30, "max_recommended_working_set_size": 36 << 30}
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(mx, "device_info", lambda: info)
    found = doctor.device()
    assert (found["generation"], found["budget"]) == ("M4", 36 << 30)
    info["architecture"] = "applegpu_g19s"
    assert doctor.device()["generation"] == "newer than M5"


@pytest.mark.parametrize(
    ("case", "chip", "said"),
    [
        (
            "gpt-oss",
            "13g",
            "which an M1 emulates: .* a third faster .* --dtype float16 avoids it, but",
        ),
        ("gpt-oss", "14s", "which an M2 emulates: .* compare mlxfuse perplexity with and without"),
        ("gemma3", "14s", "which an M2 emulates: .* --dtype float16 is no help, as gemma3 leaves"),
        ("gemma3", "15s", ""),  # it computes bfloat16
        ("llama", "13g", ""),  # in float16 anyway
    ],
)
def test_what_emulated_bfloat16_costs(case, chip, said, monkeypatch, tmp_path):
    path = tiny.write(tmp_path / "m.gguf", tiny.build(case, 0))
    info = {"device_name": "Mac", "architecture": f"applegpu_g{chip}", "memory_size": 1 << 34}
    info |= {"max_recommended_working_set_size": 1 << 33}
    monkeypatch.setattr(doctor, "_kernels", lambda: {"unavailable": "none", "variants": []})
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(mx, "device_info", lambda: info)
    found = doctor.diagnose(path)
    assert bool(found["model"]["advice"]) == bool(said)
    assert re.search(said, found["model"]["advice"])
    assert ("emulates" in doctor.render(found)) == bool(said)


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
    # 32 blocks: of ternary weights each has but its scale, that below zero, and zero.
    assert len(np.unique(values)) > (60 if name.startswith("TQ") else 100)
