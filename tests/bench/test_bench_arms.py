"""Several arms in one run, int8 ones too, and the command lines of llama-bench."""

import json

import mlx.core as mx
import pytest

from mlxfuse import load, patch_model
from mlxfuse.bench import arms, output, run

from ..cli.test_cli import invoke
from ..models import tiny

SIZES = ("-p", "0", "-n", "2", "-r", "2", "--json")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    made = tiny.build("llama-q4", 0)
    return tiny.write(tmp_path_factory.mktemp("arms") / "tiny.gguf", made)


def found(*args):
    result = invoke("bench", *args, *SIZES)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout), result.stderr


def test_several_arms_in_one_run(model):
    report, _ = found(model, "--fuse", "all", "--fuse", "all,-qkv", "--kv-bits", "k8v4")
    names = ["mlx-lm", "mlxfuse k8v4 all", "mlxfuse k8v4 all,-qkv"]
    assert [arm["name"] for arm in report["arms"]] == names
    assert [row["arm"] for row in report["rows"]] == names
    assert "qkv 3/3" in report["arms"][1]["what"]
    assert "qkv 0/3" in report["arms"][2]["what"]
    assert [arm["match"] for arm in report["arms"]] == ["reference", "yes", "yes"]


def test_arms_share_the_weights_and_nothing_else(model, monkeypatch):
    """The file is read once for both; the second is patched as if it were alone."""
    loaded = []
    real = run.load_model
    monkeypatch.setattr(run, "load_model", lambda *a, **k: loaded.append(a) or real(*a, **k))
    found(model, "--fuse", "all", "--fuse", "off")
    assert len(loaded) == 1
    first, _ = load(model, fuse="off")
    second = arms.copy_of(first)
    pairs = zip(first.named_modules(), second.named_modules(), strict=True)
    for (name, a), (other, b) in pairs:
        assert (name, type(a)) == (other, type(b))
        assert a is not b
    weights = first.layers[0].mlp.up_proj.weight, second.layers[0].mlp.up_proj.weight
    assert weights[0] is weights[1]
    ids = mx.array([[1, 5, 9]])
    want = first(ids)
    patch_model(second, fuse="all")
    assert type(first.layers[0]) is not type(second.layers[0])
    assert mx.array_equal(first(ids), want)
    assert mx.allclose(second(ids), want, atol=1e-4)


def test_rounded_activations_are_timed_and_their_distance_told(model):
    """Where there are no kernels the weights are dense, and nothing is rounded."""
    report, _ = found(model, "--fuse", "all", "--act-quant", "on")
    arm = report["arms"][1]
    assert (arm["name"], arm["match"]) == ("mlxfuse int8", "no, int8")
    assert 0 <= arm["error"] < 0.5
    assert "int8" in arm["what"]


def test_a_command_line_of_llama_bench(model):
    flags = ("-fa", "1", "-t", "8", "-b", "2048", "-ub", "512", "-ngl", "99")
    report, told = found("-m", model, "-ctk", "q8_0", "-ctv", "q4_0", *flags)
    assert report["arms"][1]["kv"]["k_bits"] == 8
    assert report["arms"][1]["kv"]["v_bits"] == 4
    for flag in ("-fa", "-t", "-b", "-ub", "-ngl"):
        assert f"{flag} has no meaning here: " in told
    for args, said in (
        (("-ctk", "q5_1"), "-ctk: q5_1 is not known"),
        (("-ctk", "q8_0", "--kv-bits", "8"), "not both"),
    ):
        result = invoke("bench", model, *args)
        assert result.exit_code == 2
        assert said in result.output


def test_no_share_over_everything():
    assert [output._share(s) for s in (None, 0.5, 1.0, 1.3)] == ["", "50%", "100%", ""]
