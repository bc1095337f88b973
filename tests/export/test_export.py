"""Exported folders: the same logits, nothing half written, nothing believed."""

import json
import math
import mmap
import shutil
import subprocess
import sys

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from mlx.utils import tree_flatten
from safetensors.numpy import load_file, save_file

from mlxfuse.errors import ExportError, GGUFError, MLXFuseError, UnsupportedError
from mlxfuse.export import streams as exporting
from mlxfuse.export.folder import LIST
from mlxfuse.export.mlx_checkpoint import EXACT, affine, export_mlx
from mlxfuse.export.streams import export
from mlxfuse.formats import BY_NAME
from mlxfuse.gguf.blocks import dequantize
from mlxfuse.gguf.exported import CONFIG, _starts, open_model
from mlxfuse.gguf.reader import open_gguf
from mlxfuse.loader import load
from mlxfuse.models import mapped
from mlxfuse.nn.quantized import QuantizedLinear

from ..cli.test_cli import REPOSITORY, TEMPLATE, invoke
from ..kernels.weights import random_blocks
from ..models import tiny

IDS = mx.array([[1, 5, 9, 200, 7]])
CASES = (
    "llama-q4",
    "llama-k-quants",
    "llama-fused-qkv",
    "qwen2",
    "qwen3moe",
    "gpt-oss",
    "gemma3",
    "gemma4-e4b",
    "gemma4-a4b",
    "phi3",
    "qwen35",
)


@pytest.fixture
def made(tmp_path):
    def make(name):
        gguf = tiny.build(name, 0)
        gguf.metadata["tokenizer.chat_template"] = TEMPLATE
        return tiny.write(tmp_path / f"{name}.gguf", gguf)

    return make


@pytest.fixture
def folder(made, tmp_path):
    target = tmp_path / "out"
    export(made("llama-q4"), target)
    return target


def logits(path, **options):
    model, tokenizer = load(path, **options)
    return np.array(model(IDS)), tokenizer, model


@pytest.mark.parametrize("fuse", ["off", "all"])
@pytest.mark.parametrize("name", CASES)
def test_a_folder_gives_the_same_bits(made, tmp_path, name, fuse):
    path, target = made(name), tmp_path / "out"
    export(path, target)
    want, tokenizer, _ = logits(path, fuse=fuse)
    path.unlink()
    got, again, model = logits(target, fuse=fuse)
    assert np.array_equal(got, want)
    assert again.chat_template == tokenizer.chat_template == TEMPLATE
    assert again.encode("Hello") == tokenizer.encode("Hello")
    if fuse == "all" and name != "gemma3":  # whose weights are F32 here
        assert any(isinstance(m, QuantizedLinear) for m in model.modules())
        assert "relayout" not in model.load_report.seconds


@pytest.mark.parametrize("name", CASES)
def test_every_tensors_bytes_are_the_files(made, tmp_path, name):
    """Also of some rows only, in the file's order."""
    from mlxfuse.models.config import read_config
    from mlxfuse.models.plan import plan, stored_rows

    path, target = made(name), tmp_path / "out"
    export(path, target)
    with open_gguf(path) as file, open_model(target) as exported:
        assert exported.metadata.keys() == file.metadata.keys()
        exported.arrange(stored_rows(plan(exported, read_config(exported))))
        for tensor in file.tensors.values():
            again = exported.tensors[tensor.name]
            assert np.array_equal(exported.read(again), file.read(tensor)), tensor.name
            rows = slice(1, tensor.rows - 1)
            assert np.array_equal(exported.read(again, rows), file.read(tensor, rows)), tensor.name
            assert np.array_equal(exported.view(again), file.view(tensor)), tensor.name


def test_several_safetensors_files(made, tmp_path, monkeypatch):
    path = made("llama-q4")
    monkeypatch.setattr(exporting, "SHARD_BYTES", 20_000)
    export(path, tmp_path / "out")
    assert len(list((tmp_path / "out").glob("model-*"))) > 2
    assert np.array_equal(logits(tmp_path / "out")[0], logits(path)[0])


@pytest.fixture
def shared(monkeypatch):
    """As on Metal, where MLX takes whole pages that are not its own; gives what it was given."""
    taken = []

    def from_dlpack(array, *, copy):
        assert copy is False
        assert array.ctypes.data % mmap.PAGESIZE == array.nbytes % mmap.PAGESIZE == 0
        taken.append(array)
        return mx.array(array)

    monkeypatch.setattr(mx, "from_dlpack", from_dlpack)
    monkeypatch.setattr(mapped, "shares", lambda: True)
    return taken


@pytest.mark.parametrize("name", ["llama-q4", "llama-k-quants", "qwen3moe"])
def test_mapped_weights_are_the_files(made, tmp_path, shared, monkeypatch, name):
    path, target = made(name), tmp_path / "out"
    export(path, target)
    want, _, relaid = logits(path, fuse="all")
    got, _, model = logits(target, fuse="all")
    assert np.array_equal(got, want)
    assert model.load_report.ways.keys() <= {"mapped", "read"}
    assert sum(model.load_report.ways.values()) == relaid.load_report.ways["relaid"]
    assert model.load_report.ways["mapped"] > 0.9 * relaid.load_report.ways["relaid"]
    assert [a.flags.writeable for a in shared] == [False] * len(shared)
    # Each file once, and the model keeps its pages.
    assert len(shared) == len(list(target.glob("model-*"))) == len(model.mapped_files._words)
    assert not any("mapped" in name for name, _ in tree_flatten(model.parameters()))


def test_what_mlx_does_not_take_is_read(made, folder, shared, monkeypatch):
    def refuse(array, *, copy):
        raise ValueError("larger than a buffer may be")

    monkeypatch.setattr(mx, "from_dlpack", refuse)
    got, _, model = logits(folder, fuse="all")
    assert model.load_report.ways.keys() == {"read"}
    assert np.array_equal(got, logits(made("llama-q4"), fuse="all")[0])
    # Nor are arrays that the library wrote, which does not align them.
    path = next(folder.glob("model-*"))
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    text = data[8 : 8 + size].rstrip(b" ") + b" "
    path.write_bytes((len(text)).to_bytes(8, "little") + text + data[8 + size :])
    monkeypatch.setattr(mx, "from_dlpack", lambda array, *, copy: mx.array(array))
    got, _, model = logits(folder, fuse="all")
    aligned = (8 + len(text)) % mapped.ALIGNMENT == 0
    assert model.load_report.ways.keys() == ({"mapped", "read"} if aligned else {"read"})


def test_memory_is_shared_only_where_it_is(monkeypatch):
    """Tried by writing; a copy that MLX calls none is seen."""
    assert mapped.shares.__wrapped__() is mx.metal.is_available()
    monkeypatch.setattr(mx, "from_dlpack", lambda array, *, copy: mx.array(array))
    assert mapped.shares.__wrapped__() is False
    monkeypatch.setattr(mx, "from_dlpack", lambda array, *, copy: array)
    assert mapped.shares.__wrapped__() is True


def test_files_are_whole_pages_and_others_read_them(tmp_path):
    """The library's reader and MLX's; arrays of an odd size come last."""
    arrays = {
        "a": np.arange(7, dtype=np.uint8).reshape(7, 1),
        "b": np.arange(64, dtype=np.uint32).reshape(4, 16),
        "c": np.arange(16, dtype=np.float16).reshape(2, 8),
    }
    path = tmp_path / "model.safetensors"
    exporting.save_file(arrays, path, {"format": "mlxfuse"})
    size = path.stat().st_size
    assert -size % exporting.PAGE < mapped.ALIGNMENT
    starts = _starts(path)
    assert [starts[name] % mapped.ALIGNMENT for name in ("b", "c")] == [0, 0]
    assert starts["a"] == size - 7
    for found in (load_file(path), {n: np.array(a) for n, a in mx.load(str(path)).items()}):
        assert found.keys() == arrays.keys()
        for name, array in arrays.items():
            assert found[name].dtype == array.dtype
            assert np.array_equal(found[name], array)


def test_the_command(made, tmp_path):
    path, target = made("llama-q4"), tmp_path / "sub" / "out"
    result = invoke("export", path, target, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["size"] == sum(p.stat().st_size for p in target.iterdir())
    got = invoke("generate", target, "-p", "Hello", "-m", "4")
    assert got.exit_code == 0, got.output
    assert got.stdout == invoke("generate", path, "-p", "Hello", "-m", "4").stdout
    found = json.loads(invoke("inspect", target, "--json").stdout)
    assert found["architecture"] == "llama"
    assert found["supported"] is True


# --- targets ------------------------------------------------------------------------------


def test_a_target_in_use_is_refused(made, folder):
    path = made("llama-q4")
    before = contents(folder)
    with pytest.raises(MLXFuseError, match="an earlier export; --force replaces it"):
        export(path, folder)
    export(path, folder, force=True)
    assert contents(folder) == before
    with pytest.raises(MLXFuseError, match="not a folder"):
        export(path, path)
    with pytest.raises(MLXFuseError, match="exported already"):
        export(folder, folder.with_name("again"))


def contents(folder):
    """Every file below a folder, with its bytes."""
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()
    }


def add_a_note(folder):
    (folder / "notes.txt").write_text("x")
    return "notes.txt"


def add_a_folder(folder):
    (folder / "sub").mkdir()
    (folder / "sub" / "y").write_text("x")
    return "sub/"


def add_a_link(folder):
    name = "model-00001-of-00001.safetensors"
    (folder / name).rename(folder.parent / "weights")
    (folder / name).symlink_to(folder.parent / "weights")
    return name


def edit_the_configuration(folder):
    with (folder / CONFIG).open("a") as file:
        file.write(" ")
    return CONFIG


def lose_the_list(folder):
    (folder / LIST).unlink()
    return sorted(contents(folder))[0]


def break_the_list(folder):
    (folder / LIST).write_text('{"files": [1]}')
    return sorted(contents(folder))[0]


@pytest.mark.parametrize(
    "change",
    [
        add_a_note,
        add_a_folder,
        add_a_link,
        edit_the_configuration,
        lose_the_list,
        break_the_list,
    ],
)
@pytest.mark.parametrize("write", [export, export_mlx])
def test_force_replaces_nothing_but_an_earlier_export(made, tmp_path, change, write):
    path, target = made("llama-q4"), tmp_path / "out"
    write(path, target)
    name = change(target)
    before = contents(tmp_path)
    with pytest.raises(MLXFuseError, match=f"not empty, and {name} in it"):
        write(path, target, force=True)
    assert contents(tmp_path) == before


def test_force_replaces_what_macos_has_looked_at_and_what_lost_a_file(made, folder):
    before = contents(folder)
    (folder / ".DS_Store").write_text("x")
    (folder / CONFIG).unlink()
    export(made("llama-q4"), folder, force=True)
    assert contents(folder) == before
    only = folder.with_name("only")
    only.mkdir()
    (only / ".DS_Store").write_text("x")
    export(made("llama-q4"), only)
    assert contents(only) == before


@pytest.mark.parametrize("force", [False, True])
def test_a_target_that_holds_or_is_inside_the_source_is_refused(made, tmp_path, force):
    path = made("llama-q4")
    (tmp_path / "link").symlink_to(tmp_path)
    (tmp_path / "away").mkdir()
    (tmp_path / "away" / "m.gguf").symlink_to(path)
    export(path, tmp_path / "streams")
    before = contents(tmp_path)
    for source, target, message in (
        (path, tmp_path, "holds .*llama-q4.gguf, which is exported"),
        (path, tmp_path / "link" / ".." / tmp_path.name, "holds"),
        (tmp_path / "link" / path.name, tmp_path, "holds"),
        (tmp_path / "away" / "m.gguf", tmp_path / "away", "holds"),
        (tmp_path / "streams", tmp_path / "streams", "holds"),
        (tmp_path / "streams", tmp_path / "streams" / "new", "is inside"),
    ):
        for write in (export, export_mlx):
            if source.is_file() or write is export_mlx:
                with pytest.raises(MLXFuseError, match=message):
                    write(source, target, force=force)
    assert contents(tmp_path) == before


def test_what_is_put_into_the_target_meanwhile_stays(made, folder, monkeypatch):
    def note(*arrays):
        add_a_note(folder)
        save_file(*arrays)

    before = contents(folder) | {"notes.txt": b"x"}
    monkeypatch.setattr(exporting, "save_file", note)
    with pytest.raises(MLXFuseError, match=r"notes\.txt"):
        export(made("llama-q4"), folder, force=True)
    assert contents(folder) == before
    assert not list(folder.parent.glob(".*"))


def test_the_next_export_removes_what_a_killed_one_left(made, tmp_path):
    path, target = made("llama-q4"), tmp_path / "out"
    code = (
        "import os\n"
        "from pathlib import Path\n"
        "from mlxfuse.export import streams as e\n"
        "save = e.save_file\n"
        "def killed(*a):\n"
        "    save(*a)\n"
        "    os.kill(os.getpid(), 9)\n"
        "e.save_file = killed\n"
        f"e.export(Path({str(path)!r}), Path({str(target)!r}))\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=False)
    (left,) = tmp_path.glob(".out.*")
    assert list(left.glob("model-*"))
    other = tmp_path / ".out.mine.partial"  # a name that looks alike
    other.mkdir()
    export(path, target)
    assert {p.name for p in tmp_path.iterdir()} == {path.name, "out", other.name}
    # Killed between taking the old one away and putting the new one there.
    before = contents(target)
    target.rename(left.with_name(".out.mlxfuse-old"))
    with pytest.raises(MLXFuseError, match="an earlier export"):
        export(path, target)
    assert contents(target) == before
    # A folder of that name that no export made is not removed.
    left.mkdir()
    (left / "x").write_text("x")
    with pytest.raises(MLXFuseError, match="no export's"):
        export(path, target, force=True)
    assert (left / "x").exists()


def test_two_exports_to_one_folder_do_not_meet(made, tmp_path, monkeypatch):
    path, target = made("llama-q4"), tmp_path / "out"

    def meanwhile(*arrays):
        monkeypatch.setattr(exporting, "save_file", save_file)
        with pytest.raises(MLXFuseError, match="another export writes"):
            export(path, target)
        save_file(*arrays)

    monkeypatch.setattr(exporting, "save_file", meanwhile)
    export(path, target)
    assert np.array_equal(logits(target)[0], logits(path)[0])


def test_an_export_that_fails_leaves_nothing(made, folder, monkeypatch):
    path = made("llama-q4")
    target = folder.with_name("new")
    before = {p.name for p in folder.parent.iterdir()}

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(exporting, "save_file", full)
    for name in (target, folder):
        with pytest.raises(OSError, match="No space left"):
            export(path, name, force=True)
    assert {p.name for p in folder.parent.iterdir()} == before
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 5, 5))
    with pytest.raises(MLXFuseError, match="are needed"):
        export(path, target)


def test_killed_at_any_moment_the_target_is_absent_or_whole(made, tmp_path):
    path, target = made("llama-q4"), tmp_path / "out"
    code = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from mlxfuse.export import streams as e\n"
        "save = e.save_file\n"
        "def slow(*a):\n"
        "    print('saving', flush=True)\n"
        "    time.sleep(0.02)\n"
        "    save(*a)\n"
        "e.save_file, e.SHARD_BYTES = slow, 10_000\n"
        "print('ready', flush=True)\n"
        f"e.export(Path({str(path)!r}), Path({str(target)!r}), force=True)\n"
        "print('done', flush=True)\n"
    )
    seen = set()
    for lines in (1, 2, 4, 7, 99):
        run = subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=REPOSITORY
        )
        for _ in range(lines):
            if not run.stdout.readline():
                break
        run.kill()
        run.wait()
        seen.add(target.exists())
        if target.exists():
            assert np.array_equal(logits(target)[0], logits(path)[0])
            shutil.rmtree(target)
    assert seen == {True, False}


# --- folders that are not to be believed --------------------------------------------------


def change(folder, edit):
    (path,) = folder.glob("model-*")
    arrays = load_file(path)
    edit(arrays)
    save_file(arrays, path)


def first(arrays, ending):
    return next(name for name in sorted(arrays) if name.endswith(ending))


def short(arrays):
    name = first(arrays, "codes")
    arrays[name] = arrays[name][:, :-1].copy()


def fewer_rows(arrays):
    name = first(arrays, "codes")
    arrays[name] = arrays[name][:-1].copy()


def other_type(arrays):
    name = first(arrays, "codes")
    arrays[name] = arrays[name].view(np.float32)


def missing(arrays):
    del arrays[first(arrays, "scales")]


def surplus(arrays):
    arrays["model.layers.9.qkv.Q4_0.codes"] = np.zeros((1, 4), np.uint32)


def raw_short(arrays):
    name = first(arrays, "attn_norm.weight")
    arrays[name] = arrays[name][:, :-1].copy()


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (short, "expected uint32 of shape"),
        (fewer_rows, "expected uint32 of shape"),
        (other_type, "found F32 of shape"),
        (missing, "is missing"),
        (surplus, "has no place in the model"),
        (raw_short, "expected uint8 of shape"),
    ],
)
def test_arrays_that_are_not_the_models(folder, edit, message):
    change(folder, edit)
    with pytest.raises(ExportError, match=message):
        load(folder, fuse="all")


def test_files_that_are_not_what_they_should_be(folder):
    (path,) = folder.glob("model-*")
    data = path.read_bytes()
    for broken in (data[:-10], b"", b"\xff" * 100, data[:4]):
        path.write_bytes(broken)
        with pytest.raises(ExportError, match="not a safetensors file"):
            load(folder)
    path.write_bytes(data)
    config = folder / CONFIG
    for text, message in (
        ("{", "not JSON"),
        ("[]", "mlxfuse_layout"),
        ('{"mlxfuse_layout": "x"}', "export the model again"),
        ("[" * 100_000, "not JSON"),
    ):
        config.write_text(text)
        with pytest.raises(ExportError, match=message):
            load(folder)
    config.unlink()
    # Without it the folder is one with a GGUF file, which ends after its header.
    with pytest.raises(GGUFError, match=r"header\.gguf.*truncated"):
        load(folder)


def test_nothing_in_a_folder_is_run(folder):
    """mlx-lm would import what config.json calls model_file."""
    mark = folder / "ran"
    (folder / "evil.py").write_text(f"open({str(mark)!r}, 'w')\n")
    config = json.loads((folder / CONFIG).read_text())
    config |= {"model_file": "evil.py", "auto_map": {"AutoTokenizer": "evil.Tokenizer"}}
    (folder / CONFIG).write_text(json.dumps(config))
    load(folder)
    assert not mark.exists()


# --- --mlx --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EXACT)
def test_affine_is_exact(name):
    format = BY_NAME[name]
    data = random_blocks(format, 9, 96)
    arrays = {k: mx.array(v) for k, v in affine(data, format).items()}
    # In float32: MLX computes in the type of the scales.
    got = mx.dequantize(
        arrays["weight"],
        arrays["scales"].astype(mx.float32),
        arrays["biases"].astype(mx.float32),
        group_size=32,
        bits=EXACT[name],
    )
    want = dequantize(data, format, (9, 96))
    assert np.allclose(np.array(got), want, rtol=0, atol=2**-22 * np.abs(want).max())


@pytest.mark.parametrize(
    "name", ["llama-q4", "llama-k-quants", "qwen2", "qwen3", "qwen2moe", "qwen3moe"]
)
def test_stock_mlx_lm_runs_it(made, tmp_path, name):
    path, target = made(name), tmp_path / "mlx"
    summary = export_mlx(path, target)
    model, tokenizer = mlx_lm.load(str(target))
    model.set_dtype(mx.float32)
    got, (want, ours, _) = np.array(model(IDS)), logits(path)
    assert np.abs(got - want).max() <= 4e-3 * np.abs(want).max()
    assert tokenizer.encode("Hello") == ours.encode("Hello")
    assert tokenizer.chat_template == TEMPLATE
    if name == "llama-q4":
        assert set(summary["exact"]) == {"Q4_0", "Q8_0", "Q5_0"}
        assert summary["float16"] == {}
        kinds = {type(m).__name__ for m in model.modules()}
        assert {"QuantizedLinear", "QuantizedEmbedding"} <= kinds
    if name == "llama-k-quants":
        assert set(summary["float16"]) == {"Q4_K", "Q6_K"}
    text = mlx_lm.generate(model, tokenizer, "Hello", max_tokens=3)
    assert isinstance(text, str)


def test_scales_that_would_overflow_stay_float16(made, tmp_path):
    gguf = tiny.build("llama", 0)
    data, _ = gguf.tensors["blk.0.ffn_up.weight"]
    blocks = data.reshape(-1, 34)
    blocks[0, :2] = np.array([1000], np.float16).view(np.uint8)  # 128 times that is no float16
    blocks[0, 2:] = 0
    path = tiny.write(tmp_path / "big.gguf", gguf)
    summary = export_mlx(path, tmp_path / "mlx")
    assert summary["float16"] == {"Q8_0": 1}


LONG = mx.array([[(7 * i + i * i) % 250 for i in range(40)]])


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("llama-rope-linear", "linear"),
        ("llama-rope-freqs", "longrope"),
        ("llama-yarn", "yarn"),
        ("qwen2-yarn", "yarn"),
        ("gemma3-rope-linear", "linear"),
        ("phi3", "longrope"),
        ("phi3-4k", None),
        ("gemma3", None),
        ("gpt-oss", "yarn"),
    ],
)
def test_rotary_scaling_is_told_to_mlx_lm(tmp_path, name, kind):
    """Over 40 tokens, of weights that float16 holds; without what it is told the logits differ."""
    gguf = tiny.build(name, 0)
    for tensor, (array, of) in gguf.tensors.items():
        if of == "F32":
            gguf.tensors[tensor] = array.astype(np.float16).astype(np.float32), of
    if name == "phi3":  # as converters write it
        gguf.metadata["phi3.rope.scaling.attn_factor"] = math.sqrt(math.log(1024, 512))
    path, target = tiny.write(tmp_path / "m.gguf", gguf), tmp_path / "mlx"
    export_mlx(path, target)
    want = np.array(load(path)[0](LONG))
    config = json.loads((target / "config.json").read_text())
    assert config.get("rope_scaling", {}).get("type") == kind

    def error():
        model, _ = mlx_lm.load(str(target))
        model.set_dtype(mx.float32)
        return np.abs(np.array(model(LONG)) - want).max() / np.abs(want).max()

    # mlx-lm rounds the factor of gemma's embeddings to bfloat16.
    assert error() <= (4e-3 if "gemma" in name else 1e-5)
    if kind is not None:
        del config["rope_scaling"]
        (target / "config.json").write_text(json.dumps(config))
        assert error() > 1e-2


@pytest.mark.parametrize("name", ["gemma4", "gemma4-e4b", "gemma4-a4b"])
def test_gemma4_for_stock_mlx_lm(tmp_path, name):
    """Released files' factors are 1, and 1e30 where a head is not rotated."""
    gguf = tiny.build(name, 0)
    gguf.metadata["gemma4.final_logit_softcapping"] = 0.0  # mlx-lm's default is a cap
    for tensor, (array, of) in gguf.tensors.items():
        if of == "F32" and tensor != "rope_freqs.weight":
            gguf.tensors[tensor] = array.astype(np.float16).astype(np.float32), of
    factors = np.ones(16, np.float32)
    factors[5:] = 1e30
    gguf.tensors["rope_freqs.weight"] = factors, "F32"
    path, target = tiny.write(tmp_path / "m.gguf", gguf), tmp_path / "mlx"
    export_mlx(path, target)
    want = np.array(load(path)[0](LONG))

    def error():
        model, _ = mlx_lm.load(str(target))
        model.set_dtype(mx.float32)
        return np.abs(np.array(model(LONG)) - want).max() / np.abs(want).max()

    assert error() <= 1e-5
    config = json.loads((target / "config.json").read_text())
    config["rope_parameters"]["full_attention"]["partial_rotary_factor"] = 0.25
    (target / "config.json").write_text(json.dumps(config))
    assert error() > 1e-3


@pytest.mark.parametrize("at", [0, 1, 15])
def test_gemma4_with_other_factors_is_refused(tmp_path, at):
    gguf = tiny.build("gemma4", 0)
    factors = np.ones(16, np.float32)
    factors[5:] = 1e30
    factors[at] = 2.0
    gguf.tensors["rope_freqs.weight"] = factors, "F32"
    with pytest.raises(UnsupportedError, match=r"rotary scaling \(it knows proportional"):
        export_mlx(tiny.write(tmp_path / "m.gguf", gguf), tmp_path / "mlx")


def test_an_exported_folder_becomes_a_checkpoint_too(made, tmp_path):
    path = made("llama-q4")
    export(path, tmp_path / "streams")
    export_mlx(path, tmp_path / "one")
    export_mlx(tmp_path / "streams", tmp_path / "two")
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_what_mlx_lm_cannot_be_told_is_refused(tmp_path):
    for name, arch, keys in (
        ("qwen3moe", "qwen3moe", {"type": "linear", "factor": 4.0}),
        ("llama", "llama", {"attn_factor": 0.5}),
        ("phi3", "phi3", {}),  # whose magnitude is not that of its contexts
    ):
        gguf = tiny.build(name, 0)
        gguf.metadata |= {f"{arch}.rope.scaling.{k}": v for k, v in keys.items()}
        with pytest.raises(UnsupportedError, match="rotary scaling"):
            export_mlx(tiny.write(tmp_path / "m.gguf", gguf), tmp_path / "mlx")
    path = tiny.write(tmp_path / "m.gguf", tiny.build("qwen35", 0))
    with pytest.raises(UnsupportedError, match="no class that runs qwen35"):
        export_mlx(path, tmp_path / "mlx")
    assert not (tmp_path / "mlx").exists()


def test_sizes_on_disk(made, tmp_path):
    path = made("llama-q4")
    export_mlx(path, tmp_path / "mlx")
    arrays = mx.load(str(next((tmp_path / "mlx").glob("model-*"))))
    model, _ = mlx_lm.load(str(tmp_path / "mlx"))
    assert {k for k, _ in tree_flatten(model.parameters())} == arrays.keys()
