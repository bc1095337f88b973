"""`mlxfuse bench MODEL`: what it times, in which order, beside what, and what it refuses."""

import csv
import json
import os
import re
import statistics
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

import mlxfuse
from mlxfuse.bench import arms, machine, measure, output, run
from mlxfuse.bench.measure import Test, alternate, numbers, speeds
from mlxfuse.errors import MLXFuseError
from mlxfuse.fusion import checks, patch_model
from mlxfuse.fusion.dispatches import per_token
from mlxfuse.gguf.reader import open_gguf
from mlxfuse.inspect.needs import needs
from mlxfuse.kernels.runtime import kernel as _kernel
from mlxfuse.loader import load
from mlxfuse.nn.kv import cache as kv_cache
from mlxfuse.nn.kv.cache import CompressedKVCache
from mlxfuse.nn.kv.options import KVOptions
from mlxfuse.nn.quantized import QuantizedLinear

from .. import msl
from ..cli.test_cli import invoke
from ..models import tiny

REPOSITORY = Path(mlxfuse.__file__).parents[1]
SMALL = ("-p", "8", "-n", "2", "-r", "2")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    made = tiny.build("llama-q4", 0)
    return tiny.write(tmp_path_factory.mktemp("models") / "tiny.gguf", made)


# --- arguments ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("512", [512]),
        ("512,1024", [512, 1024]),
        ("1-4", [1, 2, 3, 4]),
        ("0-1024+256", [0, 256, 512, 768, 1024]),
        ("128-1024*2", [128, 256, 512, 1024]),
        ("1-10*3, 7", [1, 3, 9, 7]),
        ("5-6+4", [5]),
        ("1-64", list(range(1, 65))),
    ],
)
def test_numbers_are_llama_benchs(text, expected):
    assert numbers(text) == expected


@pytest.mark.parametrize(
    "text",
    ["", "a", "1,", "-1", "1.5", "4-1", "1-4*1", "0-4*2", "1-4+0", "1-65", "1048577", "9" * 9],
)
def test_other_numbers_are_refused(text):
    with pytest.raises(ValueError, match=r"expected|never|more than|at most"):
        numbers(text)


def test_names_and_order_of_the_tests():
    found = measure.tests([512, 0], [128], [0, 4096])
    assert [t.name for t in found] == ["pp512", "tg128", "pp512 @ d4096", "tg128 @ d4096"]
    assert (found[3].tokens, found[2].tokens) == (128, 512)


# --- turns and statistics -----------------------------------------------------------------


def test_arms_take_turns_forth_and_back():
    calls, pauses = [], []
    clock = iter(range(100))

    def arm(name):
        def call():
            calls.append(name)
            return float(next(clock))

        return call

    found = alternate({n: arm(n) for n in "AB"}, 4, pause=1.5, sleep=pauses.append)
    assert "".join(calls) == "ABBAABBA"
    assert pauses == [1.5] * 8
    # On a clock that drifts both have the same sum: no arm gains by its place.
    assert found == {"A": [0.0, 3.0, 4.0, 7.0], "B": [1.0, 2.0, 5.0, 6.0]}
    assert sum(found["A"]) == sum(found["B"])
    alternate({"A": arm("A")}, 1, sleep=lambda s: pytest.fail("a pause of nothing"))


def test_speeds_are_statistics_of_the_samples():
    found = speeds(Test(0, 10, 0), [0.5, 1.0, 2.0])
    assert found["samples_ts"] == [20.0, 10.0, 5.0]
    assert found["samples_ns"] == [500_000_000, 1_000_000_000, 2_000_000_000]
    assert found["median_ts"] == 10.0
    assert (found["min_ts"], found["max_ts"]) == (5.0, 20.0)
    assert found["avg_ts"] == pytest.approx(35 / 3)
    assert found["stddev_ts"] == pytest.approx(statistics.stdev([20, 10, 5]))
    assert found["avg_ns"] == pytest.approx(3.5e9 / 3)
    assert speeds(Test(4, 0, 0), [2.0])["stddev_ts"] == 0.0


# --- the two forms ------------------------------------------------------------------------


def test_stock_is_of_mlx_alone_and_the_same_numbers(model, monkeypatch):
    """Matrices that stay in the file's bytes become MLX's own where those are exactly the same."""
    monkeypatch.setenv("MLXFUSE_KERNELS", "emulated")
    ours, _ = load(model, fuse="off")
    stock, what = arms.stock_of(ours)
    assert {type(m).__module__ for m in stock.modules() if not m.children()} == {
        *("mlx.nn.layers." + m for m in ("linear", "quantized", "normalization")),
        "mlx.nn.layers.positional_encoding",
    }
    assert "affine 4-bit" in what
    assert "dense float32" in what  # Q5_0
    assert type(ours.layers[0].self_attn.q_proj) is QuantizedLinear
    monkeypatch.setenv("MLXFUSE_KERNELS", "reference")
    assert arms.compare(checks.Reference(checks.logits(stock)), ours).error < 1e-5


def test_requantised_stock_is_of_the_files_size_and_not_the_reference(model, monkeypatch):
    monkeypatch.setenv("MLXFUSE_KERNELS", "emulated")
    ours, _ = load(model, fuse="off")
    with pytest.raises(MLXFuseError, match="--stock affine"):
        arms.stock_of(ours, budget=1000)
    stock, what = arms.stock_of(ours, requantize=True, budget=1000)
    assert "dense" not in what
    assert "affine 5-bit (group 32), requantised" in what  # Q5_0 of 96 columns
    assert arms.nbytes(stock) < 1.3 * arms.nbytes(ours)
    reference = arms.decoded(ours)
    assert not ours.training
    found = run._match(reference, stock, what)
    assert found["match"] == "no, requantised"
    assert 1e-4 < found["error"] < 0.2
    exact, _ = arms.stock_of(ours)
    assert arms.compare(reference, exact).error < 1e-5  # the decoded weights are the file's


def test_affine_weights_are_exact_or_none(model, monkeypatch):
    monkeypatch.setenv("MLXFUSE_KERNELS", "emulated")
    ours, _ = load(model, fuse="off")
    weight = ours.layers[0].self_attn.q_proj.weight  # Q4_0
    bits, made = arms._exact(weight, mx.float32)
    want = np.array(arms.decode(arms._flat(weight.parts[0])))
    got = mx.dequantize(made["weight"], made["scales"], made["biases"], 32, bits)
    assert bits == 4
    np.testing.assert_array_equal(np.array(got), want)
    assert arms._exact(weight, mx.bfloat16) is None  # float16 scales are no bfloat16
    other = ours.layers[0].mlp.down_proj.weight  # Q5_0
    assert other.parts[0].segment.name == "Q5_0"
    assert arms._exact(other, mx.float32) is None


def test_active_bytes_are_those_of_the_file(model, monkeypatch):
    monkeypatch.setenv("MLXFUSE_KERNELS", "emulated")
    ours, _ = load(model, fuse="off", dtype="float32")
    with open_gguf(model) as file:
        wanted = needs(file)
    assert arms.nbytes(ours) == wanted.weights
    assert arms.active(ours) == wanted.active < wanted.weights


def test_active_bytes_of_experts():
    from mlx_lm.models.switch_layers import SwitchLinear

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = SwitchLinear(8, 4, 6, bias=False)
            self.args = SimpleNamespace(num_experts_per_tok=2)

    model = Model()
    assert arms.nbytes(model) == 6 * 8 * 4 * 4
    assert arms.active(model) == 2 * 8 * 4 * 4
    model.args = SimpleNamespace()
    assert arms.active(model) is None


@pytest.mark.parametrize("name", ["qwen3moe", "qwen3moe-k-quants"])
def test_stock_experts(name, tmp_path, monkeypatch):
    """Experts too become mlx-lm's own, and read as many bytes as the header says."""
    path = tiny.write(tmp_path / "moe.gguf", tiny.build(name, 0))
    monkeypatch.setenv("MLXFUSE_KERNELS", "emulated")
    ours, _ = load(path, fuse="off", dtype="float32")
    with open_gguf(path) as file:
        assert arms.active(ours) == needs(file).active
    reference = arms.decoded(ours)
    for requantize in (False, True):
        stock, _ = arms.stock_of(ours, requantize=requantize)
        assert not any(isinstance(m, arms.HELD) for m in stock.modules())
        assert {type(m).__module__ for m in stock.modules() if "Switch" in type(m).__name__} == {
            "mlx_lm.models.switch_layers"
        }
        if not requantize:
            assert arms.compare(reference, stock).error < 1e-4
        assert checks.logits(stock).shape == reference.logits.shape


def test_cached_bytes_are_those_in_use():
    from mlx_lm.models.cache import KVCache, QuantizedKVCache

    empty, plain, quantized = KVCache(), KVCache(), QuantizedKVCache(group_size=32, bits=8)
    for cache in (plain, quantized):
        cache.update_and_fetch(mx.zeros((1, 2, 3, 64)), mx.zeros((1, 2, 3, 64)))
    assert plain.nbytes == 2 * 2 * 256 * 64 * 4
    assert arms.cached([empty, plain]) == 2 * 2 * 3 * 64 * 4
    assert arms.cached([quantized]) == 2 * 2 * 3 * (64 + 2 * 2 * 4)


@pytest.mark.parametrize("test", [Test(5, 0, 0), Test(0, 3, 4), Test(5, 0, 4)])
def test_a_runner_reads_and_decodes_what_it_says(model, test):
    """The tokens that the model sees, in each of the timed runs."""
    real, tokenizer = load(model)
    seen = []

    class Spy(nn.Module):
        layers = real.layers

        def __call__(self, tokens, cache):
            seen.append((tokens.shape[1], cache[0].offset))
            return real(tokens, cache=cache)

    runner = arms.Runner(arms.Arm("spy", "", Spy()), test, tokenizer.vocab_size)
    runner.warm_up()
    seen.clear()
    assert runner() > 0
    runner()
    steps = [(1, test.depth + i) for i in range(3)]
    if test.prompt:
        steps = [(4, test.depth), (1, test.depth + 4)]
    assert seen == steps * 2  # the depth was read before, and once
    assert runner.memory > 0
    if test.generated:
        per_token = sum(n for n, _ in needs_of(model).kv) * 4  # float32
        assert runner.read == pytest.approx(per_token * (4 + 7) / 2)
    else:
        assert runner.read is None


def needs_of(path):
    with open_gguf(path) as file:
        return needs(file)


# --- refusing -----------------------------------------------------------------------------


def wrong(weight):
    """A planted bug: one of a matrix's rows is that of another."""
    return mx.concatenate([weight[1:2], weight[1:]])


def test_a_wrong_form_is_not_timed(model, monkeypatch):
    stock, _ = load(model)
    ours, _ = load(model)
    assert arms.compare(checks.Reference(checks.logits(stock)), ours).error == 0
    ours.layers[1].mlp.down_proj.weight = wrong(ours.layers[1].mlp.down_proj.weight)
    with pytest.raises(MLXFuseError, match="not timed: its logits differ"):
        arms.compare(checks.Reference(checks.logits(stock)), ours)
    ours.layers[1].mlp.down_proj.weight = ours.layers[1].mlp.down_proj.weight * mx.nan
    with pytest.raises(MLXFuseError, match="not timed"):
        arms.compare(checks.Reference(checks.logits(stock)), ours)


def test_rounding_is_no_difference():
    want = np.zeros((47, 4), np.float32)
    want[:, 0] = 1000
    got = want.copy()
    got[5, 1] = -2
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checks, "logits", lambda found, before: mx.array(found))
        patch.setitem(arms.BOUNDS, mx.float32, 2.1e-3)
        found = arms.compare(checks.Reference(mx.array(want)), got)
        assert (found.error, found.top1) == (pytest.approx(2e-3), 1.0)
        patch.setitem(arms.BOUNDS, mx.float32, 1.9e-3)
        with pytest.raises(MLXFuseError, match=r"by 0\.002 of the .* explains 0\.0019"):
            arms.compare(checks.Reference(mx.array(want)), got)


def test_dispatches_of_both_forms(model, monkeypatch):
    monkeypatch.setenv("MLXFUSE_KERNELS", "emulated")
    ours, _ = load(model, fuse="off")
    stock, _ = arms.stock_of(ours)
    patch_model(ours, fuse="all")
    both = [arms.Arm("stock", "", stock), arms.Arm("ours", "", ours)]
    assert run._dispatches(both) == {}  # none are made on the CPU
    monkeypatch.setattr(mx, "default_device", lambda: mx.gpu)
    monkeypatch.setattr(run, "per_token", lambda m: (0, int(m is stock)))
    assert run._dispatches(both) == {"stock": 1, "ours": 0}
    monkeypatch.undo()
    # 3 layers: the products of stock are 7 of a layer, those of mlxfuse 4.
    assert per_token(stock)[1] - per_token(ours)[1] > 3 * 3


@pytest.fixture
def emulated(tmp_path, monkeypatch):
    """A model of one format, whose kernels are the Metal source on the test bench."""
    monkeypatch.setenv("MLXFUSE_KERNELS", "emulated")
    with msl.installed(build="fast"):
        yield tiny.write(tmp_path / "tiny.gguf", tiny.build("llama", 0))


def test_emulated_kernels_are_compared_but_not_timed(emulated):
    result = invoke("bench", emulated, *SMALL)
    assert (result.exit_code, result.stdout) == (1, "")
    error = re.search(r"outputs agree to (\S+), but emulated kernels are not timed", result.stderr)
    assert 0 < float(error[1]) < 1e-4


def test_a_planted_wrong_kernel_is_not_timed(emulated, monkeypatch):
    real = _kernel._compiled

    def planted(program, factory):
        factor = 1.01 if program.op == "quantized_matmul" else 1
        return lambda **options: [y * factor for y in real(program, factory)(**options)]

    monkeypatch.setattr(_kernel, "_compiled", planted)
    result = invoke("bench", emulated, *SMALL)
    assert (result.exit_code, result.stdout) == (1, "")
    assert "mlxfuse is not timed: its logits differ from the reference's" in result.stderr


def test_heat_is_told_on_one_line(monkeypatch):
    assert machine.thermal() is None or sys.platform == "darwin"
    said = "Note: no warning\n\nCPU_Speed_Limit \t= 60\n"
    monkeypatch.setattr("platform.system", lambda: "Darwin")
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: SimpleNamespace(stdout=said))
    assert machine.thermal() == "Note: no warning; CPU_Speed_Limit \t= 60"

    def absent(*a, **k):
        raise FileNotFoundError("pmset")

    monkeypatch.setattr(subprocess, "run", absent)
    assert machine.thermal() is None


def test_bandwidth_is_bytes_by_time(monkeypatch):
    """Of a copy, read and written, in 2 s and a sum, read, in 0.5 s."""
    taken = iter([9.0, *[2.0] * 5, 9.0, *[0.5] * 5])
    monkeypatch.setattr(machine, "seconds", lambda call: next(taken))
    monkeypatch.setitem(machine._BYTES, "cpu", 4096)
    assert machine.bandwidth("cpu") == 4096 / 0.5


# --- the command --------------------------------------------------------------------------


def start(*args, **env):
    return subprocess.run(
        [sys.executable, "-m", "mlxfuse", "bench", *map(str, args)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), **env},
    )


def test_the_command(model, tmp_path):
    """Stock beside mlxfuse, the report that is written, and the picture made of it twice."""
    report, picture = tmp_path / "report.json", tmp_path / "a.svg"
    done = start(model, *SMALL, "-d", "0,4", "--report", report, "--plot", picture)
    assert done.returncode == 0, done.stderr
    found = json.loads(report.read_text())
    names = [(row["arm"], row["test"]) for row in found["rows"]]
    tests = ("pp8", "tg2", "pp8 @ d4", "tg2 @ d4")
    assert names == [(arm, test) for test in tests for arm in ("mlx-lm", "mlxfuse")]
    for row in found["rows"]:
        assert len(row["samples_ns"]) == 2
        tokens = row["n_prompt"] + row["n_gen"]
        assert row["samples_ts"] == pytest.approx([tokens * 1e9 / ns for ns in row["samples_ns"]])
        assert (row["gb_s"] is None) == (row["n_gen"] == 0)
        if row["n_gen"]:
            assert row["gb_s"] == pytest.approx(row["read"] * row["median_ts"] / 1e9)
            assert row["share"] == pytest.approx(
                row["gb_s"] * 1e9 / found["environment"]["bandwidth"]
            )
    assert [a["match"] for a in found["arms"]] == ["reference", "yes"]
    env = found["environment"]
    assert (env["mlx"], env["mlxfuse"]) == (mx.__version__, mlxfuse.__version__)
    assert re.fullmatch(r"[0-9a-f]{12}", env["kernels"]["source"])
    assert str(tmp_path) not in report.read_text()  # it is sent to others
    lines = done.stdout.splitlines()
    assert any("no figure of a Mac" in line for line in lines)
    cells = [c.strip() for c in next(x for x in lines if "| tg2 @ d4" in x).split("|")]
    assert cells[2:4] == ["mlx-lm", "tg2 @ d4"]
    again = tmp_path / "b.svg"
    assert start(report, "--plot", again).returncode == 0
    assert again.read_bytes() == picture.read_bytes()
    assert picture.read_text().count("tokens in the cache") == 2


COMPRESSED = ("--kv-bits", "k8v4", "--kv-group-size", "32", "--no-kv-rotate")


@pytest.mark.parametrize("begins", [0, 12])
def test_a_compressed_cache_is_labelled_and_compared_with_its_like(model, begins, monkeypatch):
    became = []
    real = CompressedKVCache.from_cache.__func__

    def from_cache(cls, cache, **settings):
        became.append(cache.offset)
        return real(cls, cache, **settings)

    monkeypatch.setattr(CompressedKVCache, "from_cache", classmethod(from_cache))
    args = (*SMALL, "-d", "10,20", "--fuse", "all", *COMPRESSED, "--quantized-kv-start", begins)
    made = invoke("bench", model, *args, "--json")
    assert made.exit_code == 0, made.output
    found = json.loads(made.stdout)
    assert {row["arm"] for row in found["rows"]} == {"mlx-lm", "mlxfuse k8v4"}
    stock, ours = found["arms"]
    assert (stock["kv"], stock["match"]) == (None, "reference")
    assert ours["kv"] == asdict(KVOptions(8, 4, 32, rotate=False))
    assert ours["match"] == "yes"
    assert 0 < ours["error"] < 1e-4
    assert ours["what"].endswith("; its key-value cache k8v4 in groups of 32")
    # Where they begin plain: 7 of 8 tokens behind 10, the second one decoded behind 10, and 20.
    assert set(became) == ({0, 12, 17, 20} if begins else {0})
    assert not begins or became.count(17) == 3 * 3  # layers, at the start of every run


def test_a_wrong_compressed_attention_is_not_timed(model, monkeypatch):
    real = kv_cache.kept_sdpa

    def planted(*args, **how):
        out, plain = real(*args, **how)
        return out * 1.01, plain

    monkeypatch.setattr(kv_cache, "kept_sdpa", planted)
    result = invoke("bench", model, *SMALL, "--fuse", "all", *COMPRESSED)
    assert (result.exit_code, result.stdout) == (1, "")
    assert "not timed: its logits differ" in " ".join(result.stderr.split())


def test_json_lines_and_csv_are_the_same_rows(model):
    made = invoke("bench", model, *SMALL, "-n", "0", "-o", "json")
    assert made.exit_code == 0, made.output
    found = json.loads(made.stdout)
    lines = [json.loads(line) for line in output.render(found, "jsonl").splitlines()]
    assert [line["samples_ns"] for line in lines] == [r["samples_ns"] for r in found["rows"]]
    assert {line["model_n_params"] for line in lines} == {found["model"]["model_n_params"]}
    table = list(csv.DictReader(output.render(found, "csv").splitlines()))
    assert [float(row["median_ts"]) for row in table] == [r["median_ts"] for r in found["rows"]]
    assert table[0]["device"] == found["environment"]["device"]["name"]


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (("-p", "4-1"), 2, "never reaches its end"),
        (("-p", "0", "-n", "0"), 2, "nothing to time"),
        (("-r", "0"), 2, "greater than or equal to 1"),
        (("--delay", "inf"), 2, "finite"),
        (("--fuse", "everything"), 2, "found everything"),
        (("--kv-bits", "5"), 2, "kv_bits is 4 or 8"),
        (("--report", "/nowhere/report.json"), 2, "no folder"),
        (("--compare", "/nowhere.json"), 1, "no such file"),
        (("--llama-bench",), 1, "needs llama-bench"),
    ],
)
def test_what_cannot_be_done_is_said(model, args, code, message, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    result = invoke("bench", model, *args)
    assert (result.exit_code, result.stdout) == (code, "")
    assert message in " ".join(result.stderr.replace("│", " ").split())


@pytest.mark.parametrize("args", [("-p", "4"), ("--kv-bits", "8"), ("--llama-bench",)])
def test_options_of_a_model_are_not_ignored_for_kernels(args):
    result = invoke("bench", "kernels", *args)
    assert result.exit_code == 2
    assert "need a model" in " ".join(result.stderr.replace("│", " ").split())


def test_a_checkpoint_of_mlx_lm(model, tmp_path):
    """`mlx_lm.load` beside the same after `patch_model`, with one copy of the weights."""
    folder = tmp_path / "checkpoint"
    exported = invoke("export", model, folder, "--mlx")
    assert exported.exit_code == 0
    assert re.search(r"^matrices kept exactly: \d+ of Q", exported.stderr, re.MULTILINE)
    made = invoke("bench", folder, *SMALL, "--fuse", "all", "--json")
    assert made.exit_code == 0, made.output
    found = json.loads(made.stdout)
    assert [a["match"] for a in found["arms"]] == ["reference", "yes"]
    assert "the checkpoint's own weights" in found["arms"][0]["what"]
    assert "qkv 3/3" in found["arms"][1]["what"]
    assert found["model"]["model_type"] == "llama"
    # A checkpoint of MLX-LM has no other parameters than the file.
    assert found["model"]["model_n_params"] == run.about(model)["model_n_params"]
    config = folder / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "model_file": "x.py"}))
    refused = invoke("bench", folder, *SMALL)
    assert (refused.exit_code, refused.stdout) == (3, "")
    assert "code of its own (model_file)" in refused.stderr
