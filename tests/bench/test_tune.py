"""`mlxfuse tune`: what it measures and stores, and what is made of the stored file."""

import json
import os
import re
import warnings
from collections import Counter
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest

from mlxfuse.bench import kernels as bench_kernels
from mlxfuse.bench import tune
from mlxfuse.errors import KernelError
from mlxfuse.fusion import patch_model, unpatch_model
from mlxfuse.fusion.choose import SLOWER
from mlxfuse.kernels.matmul import product, quantized_matmul
from mlxfuse.kernels.runtime import kernel as _kernel
from mlxfuse.kernels.runtime import self_test, tuning
from mlxfuse.kernels.runtime.tuning import Tuning
from mlxfuse.loader import load

from .. import msl
from ..cli.test_cli import invoke, start
from ..models import tiny

MACHINE = {"device": "Apple M9", "mlx": "1.2.3", "kernels": "0123456789ab"}
CASE = "vector Q4_0:64+Q4_0:32+Q8_0:32 x64 float32"


@pytest.fixture(autouse=True)
def machine(tmp_path, monkeypatch):
    """A machine of its own that could have been tuned; kernels run on the test bench."""
    monkeypatch.setenv("MLXFUSE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("MLXFUSE_KERNELS", "emulated")
    monkeypatch.setattr(tuning, "machine", lambda: dict(MACHINE))
    tuning.known.cache_clear()
    with msl.installed(build="fast"):
        yield
    tuning.known.cache_clear()


@pytest.fixture
def model(tmp_path):
    return load(tiny.write(tmp_path / "tiny.gguf", tiny.build("llama-q4", 0)), fuse="off")[0]


class Clock:
    """A clock that goes on by what each launch would take."""

    def __init__(self, monkeypatch, cost):
        self.now = 0.0
        self.cost = cost
        self.seen = Counter()

        def run_call(call, *, emulated=False):
            self.seen[call.kind, call.variant] += 1
            self.now += cost(call)
            return []

        monkeypatch.setattr(tune, "run_call", run_call)

    def __call__(self):
        return self.now


# --- measuring ----------------------------------------------------------------------------


def test_the_fastest_variant_of_each_case_wins(model, monkeypatch):
    """Where what it takes is known: 8 rows win for qkv only, tiles win, the batch is a tie."""

    def cost(call):
        if call.kind == "vector":
            fast = call.split
            return {"rows4": 2.0, "rows8": 1.0 if fast else 1.97, "rows2": 3.0}[call.variant]
        return {"tiles64": 1.0}.get(call.variant, 2.0)

    patch_model(model, fuse="all")
    clock = Clock(monkeypatch, cost)
    monkeypatch.setattr(self_test, "compare", lambda *a, **k: "")
    found = tune.tune_kernels(model, 2, rows=(1, 2, 33, 65), emulated=True, clock=clock)
    winners = found.winners.variants["quantized_matmul"]
    kinds = Counter((case.split()[0], name) for case, name in winners.items())
    assert winners[CASE] == "rows8"
    assert found.times[CASE] == pytest.approx({"rows4": 2.0, "rows8": 1.0, "rows2": 3.0})
    # qkv, gate and up, o, down and the head; faster by less than the margin is no faster.
    assert kinds == {
        ("vector", "rows8"): 1,
        ("vector", "rows4"): 4,
        ("batch", "rows2"): 5,
        ("prompt", "tiles64"): 10,  # of 33 rows and of 65, which are cases of their own
    }
    # Warmed up once, then twice in turns, each time for the 3 layers.
    assert clock.seen["vector", "rows2"] == 3 * (4 * 3 + 1)


def test_a_wrong_variant_is_not_timed(model, monkeypatch):
    real = _kernel.run

    def planted(launch, *, emulated=False):
        factor = 1.01 if ", 8, 2>(" in launch.program.body else 1
        return [y * factor for y in real(launch, emulated=emulated)]

    patch_model(model, fuse="all")
    monkeypatch.setattr(_kernel, "run", planted)
    clock = Clock(monkeypatch, lambda call: 1.0 if call.variant == "rows8" else 2.0)
    found = tune.tune_kernels(model, 1, rows=(1,), emulated=True, clock=clock)
    assert {tuple(times) for times in found.times.values()} == {("rows4", "rows2")}
    assert set(found.winners.variants["quantized_matmul"].values()) == {"rows4"}


def test_prompts_of_experts_are_measured_where_they_have_two_forms(tmp_path, monkeypatch):
    """Not before an M5; a wrong form is not timed."""
    path = tiny.write(tmp_path / "experts.gguf", tiny.build("qwen3moe", 0))
    model, _ = load(path, dtype="float16", fuse="all")
    assert not any(case.startswith("grouped") for case in tune.cases(model, (1,)))
    for module in (tune, product):
        monkeypatch.setattr(module, "tensors", lambda: True)
    found = {c: calls for c, calls in tune.cases(model, (1,)).items() if c.startswith("grouped")}
    assert len(found) == 2  # gate and up, and down
    for case, calls in found.items():
        assert calls[0].variants == ("tiles", "tensor")
        assert all(call.case == case for call in calls)
        with msl.installed(build="fast"):
            assert tune._right(calls[0], calls[0].variants, emulated=True) == ["tiles", "tensor"]


def test_products_of_experts_are_measured(tmp_path, monkeypatch):
    """One row by the chosen experts, and their sum, each in every variant but a wrong one."""
    path = tiny.write(tmp_path / "experts.gguf", tiny.build("qwen3moe", 0))
    model, _ = load(path, fuse="off")
    real = _kernel.run

    def planted(launch, *, emulated=False):
        wrong = "summed_tile" in launch.program.body and ", 8, " in launch.program.body
        return [y * (1.01 if wrong else 1) for y in real(launch, emulated=emulated)]

    patch_model(model, fuse="all")
    monkeypatch.setattr(_kernel, "run", planted)
    clock = Clock(monkeypatch, lambda call: float(call.variant[4:]))
    found = tune.tune_kernels(model, 1, rows=(), emulated=True, clock=clock)
    gathered, summed = "vector Q4_0:32+Q4_0:32 x64 float32", "summed Q5_0:64 x32 float32"
    assert found.winners.variants["quantized_matmul"] == {gathered: "rows2", summed: "rows2"}
    assert found.times == {
        gathered: pytest.approx({"rows4": 4, "rows2": 2}),  # gate and up: no rows8, which spills
        summed: pytest.approx({"rows4": 4, "rows2": 2}),
    }


def test_gate_and_up_do_not_take_eight_rows_of_each(model):
    """They would spill: not measured, and a stored winner of such a case is not for them."""
    patch_model(model, fuse="all")
    calls = [c for found in tune.cases(model, (1,)).values() for c in found[:1]]
    for call in calls:
        tuning.store(Tuning({"quantized_matmul": {call.case: "rows8"}}))
        assert ("rows8" in call.variants) is not call.gated
        assert quantized_matmul.tuned(call).variant == ("" if call.gated else "rows8")
    assert {call.gated for call in calls} == {True, False}


def is_fused(model, module, piece):
    form = vars(model.layers[0][module]).get("_fused")
    return bool(getattr(form, piece, None))


def test_fusions_are_kept_where_they_are_not_slower(model, monkeypatch):
    """Steps of a fake clock: with gate and up fused decoding is slower, with qkv it is faster."""
    patch = patch_model(model, fuse="all")
    state = {"now": 0.0}

    def decode(model, count):
        slow, fast = is_fused(model, "mlp", "up"), is_fused(model, "self_attn", "qkv")
        state["now"] += count * (2.0 + slow - fast)

    monkeypatch.setattr(tune, "_decode", decode)
    found = tune.tune_fusions(model, patch.fused, 2, clock=lambda: state["now"])
    winners = {site.split()[0]: name for site, name in found.winners.fusions.items()}
    assert winners["gate_up"] == "separate"
    assert winners["qkv"] == "fused"
    (site,) = [s for s in found.times if s.startswith("qkv")]
    assert site == "qkv Attention Q4_0+Q4_0+Q8_0 32x64+64x64+32x64"  # by path
    assert found.times[site] == pytest.approx({"fused": 2.0, "separate": 3.0})
    assert is_fused(model, "mlp", "up")  # as it was
    tuning.store(found.winners)
    monkeypatch.setattr("mlxfuse.fusion.patch._has_kernels", lambda *a: False)
    unpatch_model(model)
    patch = patch_model(model, fuse="auto")
    assert not patch.tallies["gate_up"].fused
    assert len(patch.tallies["qkv"].fused) == 3
    assert [s.reason for s in patch.skipped if s.name == "gate_up"] == [SLOWER] * 3
    unpatch_model(model)
    assert len(patch_model(model, fuse="all").tallies["gate_up"].fused) == 3


def test_best():
    assert tune.best({"a": 1.0, "b": 0.97}, "a") == "b"
    assert tune.best({"a": 1.0, "b": 0.99}, "a") == "a"
    assert tune.best({"a": 1.0, "b": 2.0}, "a") == "a"


@pytest.mark.parametrize(
    ("kind", "build", "place"),
    [
        ("vector", "fast", 0),  # q, k and v
        ("vector", "checked", -1),  # the head, whose 259 rows fill no last tile
        ("batch", "fast", 0),
        ("batch", "checked", -1),
        ("prompt", "fast", 0),
    ],
)
def test_every_variant_computes_the_same(kind, build, place, model):
    """Through the public function, by the stored winner; the launches differ."""
    patch_model(model, fuse="all")
    rows = {"vector": 1, "batch": 3, "prompt": 9}[kind]
    call = list(tune.cases(model, (rows,)).values())[place][0]
    with msl.installed(build=build):
        check_variants(call, kind)


def check_variants(call, kind):
    (want,) = [np.concatenate([np.array(y) for y in quantized_matmul.KERNEL.reference(call)], -1)]
    bodies = set()
    there = {*call.variants, "tensor"} if kind == "prompt" else {*call.variants}  # not on this GPU
    assert there == set(tuning.VARIANTS["quantized_matmul"][kind])
    for name in call.variants:
        tuning.store(Tuning({"quantized_matmul": {call.case: name}}))
        (y,) = quantized_matmul.quantized_matmul(call.x, call.weight)
        np.testing.assert_allclose(np.array(y), want, rtol=1e-4, atol=1e-4)
        chosen = quantized_matmul.tuned(call)
        assert chosen.variant == name
        if chosen.route != "dequantize":
            bodies.add(quantized_matmul.KERNEL.launch(chosen).program.body)
    assert len(bodies) == len(call.variants) - (kind == "prompt")


# --- the file -----------------------------------------------------------------------------


def test_what_is_stored_is_read_again_and_added_to(tmp_path):
    assert not tuning.active()
    tuning.store(Tuning({"quantized_matmul": {CASE: "rows8"}}))
    path = tuning.store(Tuning({"quantized_matmul": {"batch x": "rows1"}}, {"qkv": "separate"}))
    assert tuning.active()
    assert tuning.winner("quantized_matmul", CASE) == "rows8"
    assert tuning.winner("quantized_matmul", "batch x") == "rows1"
    assert (tuning.winner("quantized_matmul", "none"), tuning.winner("none", CASE)) == ("", "")
    assert (tuning.separate("qkv"), tuning.separate("gate_up")) == (True, False)
    assert json.loads(path.read_text()) == {
        **MACHINE,
        "variants": {"quantized_matmul": {CASE: "rows8", "batch x": "rows1"}},
        "fusions": {"qkv": "separate"},
    }
    assert os.listdir(path.parent) == ["tuning.json"]
    path.unlink()
    tuning.known.cache_clear()
    assert tuning.winner("quantized_matmul", CASE) == ""


def test_a_write_that_fails_leaves_the_file_whole(monkeypatch):
    path = tuning.store(Tuning({"quantized_matmul": {CASE: "rows8"}}))
    before = path.read_bytes()

    def full(*args):
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="no space"):
        tuning.store(Tuning({"quantized_matmul": {CASE: "rows2"}}))
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == ["tuning.json"]


def written(content):
    path = tuning.path()
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    tuning.known.cache_clear()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not what mlxfuse tune writes"),
        (b"[" * 100_000, "not what mlxfuse tune writes"),
        (b"\xff", "not what mlxfuse tune writes"),
        (b" " * ((1 << 20) + 1), "not what mlxfuse tune writes"),
        ([1], "not what mlxfuse tune writes"),
        ({}, "another device and another mlx and another kernels"),
        ({**MACHINE, "device": "Apple M1"}, "measured with another device;"),
        ({**MACHINE, "kernels": "x"}, "measured with another kernels;"),
        ({**MACHINE, "variants": 3, "fusions": []}, "in part ignored: 2 of its entries"),
        ({**MACHINE, "variants": {"quantized_matmul": 3}}, "1 of its entries"),
        ({**MACHINE, "variants": {"quantized_matmul": {CASE: "rows64"}}}, "1 of its entries"),
        ({**MACHINE, "variants": {"quantized_matmul": {CASE: "tiles"}}}, "1 of its entries"),
        ({**MACHINE, "variants": {"quantized_matmul": {CASE: [8]}}}, "1 of its entries"),
        ({**MACHINE, "variants": {"os.system": {CASE: "rows8"}}}, "1 of its entries"),
        ({**MACHINE, "fusions": {"qkv": "faster"}}, "1 of its entries"),
    ],
)
def test_anything_else_is_ignored_with_one_line(content, message):
    written(content)
    with pytest.warns(RuntimeWarning, match=re.escape(message)) as caught:
        assert not tuning.active()
    assert len(caught) == 1
    assert "\n" not in str(caught[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not tuning.separate("qkv")
        assert tuning.winner("quantized_matmul", CASE) == ""


def test_what_is_right_beside_what_is_wrong_counts():
    cases = {CASE: "rows8", "batch x": "rows8"}
    written({**MACHINE, "variants": {"quantized_matmul": cases}})
    with pytest.warns(RuntimeWarning, match="1 of its entries"):
        assert tuning.winner("quantized_matmul", CASE) == "rows8"
    assert tuning.winner("quantized_matmul", "batch x") == ""


def test_a_file_of_another_user_is_ignored(monkeypatch):
    tuning.store(Tuning({"quantized_matmul": {CASE: "rows8"}}))
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    with pytest.warns(RuntimeWarning, match="it is not yours"):
        assert not tuning.active()


@pytest.mark.skipif(mx.metal.is_available(), reason="there is a device")
def test_without_a_device_nothing_counts(monkeypatch):
    tuning.store(Tuning({"quantized_matmul": {CASE: "rows8"}}))
    monkeypatch.undo()
    assert tuning.machine() is None


# --- the command --------------------------------------------------------------------------


@pytest.mark.skipif(mx.metal.is_available(), reason="there is a device")
@pytest.mark.parametrize(
    ("mode", "reason"),
    [("auto", "this MLX has no Metal device"), ("emulated", "would measure the emulation")],
)
@pytest.mark.parametrize("command", [("tune",), ("bench", "kernels")])
def test_without_a_device_it_refuses(mode, reason, command, monkeypatch):
    monkeypatch.setenv("MLXFUSE_KERNELS", mode)
    with start(*command, text=True) as process:
        out, err = process.communicate(timeout=120)
    assert (process.returncode, out) == (KernelError.exit_code, "")
    assert "on a Metal device only" in err
    assert reason in err


def test_the_whole_of_it(model, monkeypatch):
    """As on a device, with the test bench in its place."""
    monkeypatch.setattr(tune, "on_device", lambda what: None)
    real, fusions = tune.tune_kernels, tune.tune_fusions
    small = {"rows": (1,), "emulated": True}
    monkeypatch.setattr(tune, "tune_kernels", lambda *a, **k: real(*a, **k, **small))
    monkeypatch.setattr(tune, "tune_fusions", lambda m, f, *a, **k: fusions(m, f[:1], *a, **k))
    said = []
    found = tune.tune(model, repetitions=1, say=said.append)
    stored = json.loads(tuning.path().read_text())
    assert stored["variants"] == found.winners.variants
    assert stored["fusions"] == found.winners.fusions
    assert set(found.times) == {*found.winners.variants["quantized_matmul"], *stored["fusions"]}
    assert len(said) == len(found.times) == 5 + 1
    assert not hasattr(model, "_mlxfuse_patch")
    assert self_test.calls(lambda: model(mx.zeros((1, 1), mx.int32)))


@pytest.mark.parametrize("as_json", [False, True])
def test_what_is_printed_while_it_measures_is_not_on_stdout(tmp_path, monkeypatch, as_json):
    """Scripts read stdout."""
    path = tiny.write(tmp_path / "m.gguf", tiny.build("llama-q4", 0))
    winners = Tuning({"quantized_matmul": {CASE: "rows8"}})

    def measured(*_, **__):
        print("words of a library")
        return SimpleNamespace(winners=winners, times={CASE: {"rows8": 2e-6}})

    monkeypatch.setattr(bench_kernels, "on_device", lambda what: None)
    monkeypatch.setattr(tune, "tune", measured)
    result = invoke("tune", path, *(["--json"] if as_json else []))
    assert result.exit_code == 0, result.output
    assert "words of a library" in result.stderr
    if as_json:
        assert json.loads(result.stdout)["seconds"] == {CASE: {"rows8": 2e-6}}
    else:
        first, last = result.stdout.splitlines()
        assert first == f"{CASE}: rows8 (rows8 2.0 us)"
        assert last.startswith("stored in ")


def test_winners_are_of_one_set_of_metal_sources(tmp_path, monkeypatch):
    """A file that changes, comes or goes makes them another set."""
    monkeypatch.undo()
    for name in ("common.h", "a.metal"):
        (tmp_path / name).write_text(name)
    monkeypatch.setattr(tuning, "metal_dir", lambda: tmp_path)
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(mx, "device_info", lambda: {"device_name": "Apple M9"})
    found = []
    for change in (lambda: None, lambda: (tmp_path / "a.metal").write_text("other"),
                   lambda: (tmp_path / "b.metal").write_text("new")):  # fmt: skip
        change()
        tuning.source_hash.cache_clear()
        found.append(tuning.machine())
    tuning.source_hash.cache_clear()
    assert len({machine["kernels"] for machine in found}) == 3
    assert all(m["device"] == "Apple M9" for m in found)
    # Stored with one set, they do not count with another.
    monkeypatch.setenv("MLXFUSE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tuning, "machine", lambda: found[0])
    tuning.known.cache_clear()
    tuning.store(Tuning({"quantized_matmul": {CASE: "rows8"}}))
    assert tuning.winner("quantized_matmul", CASE) == "rows8"
    monkeypatch.setattr(tuning, "machine", lambda: found[1])
    tuning.known.cache_clear()
    with pytest.warns(RuntimeWarning, match="measured with another kernels"):
        assert tuning.winner("quantized_matmul", CASE) == ""
    tuning.known.cache_clear()
