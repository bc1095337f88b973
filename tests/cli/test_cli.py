"""The command line: what it prints where, and its exit codes."""

import json
import math
import os
import pkgutil
import pty
import re
import signal
import struct
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import pytest
from mlx_lm.models.cache import make_prompt_cache, save_prompt_cache
from typer.testing import CliRunner

import mlxfuse
from mlxfuse.cli import app
from mlxfuse.formats import BY_NAME, FORMATS
from mlxfuse.generate.run import Settings, new_cache
from mlxfuse.inspect.header import render
from mlxfuse.loader import load
from mlxfuse.terminal import neutralize

from ..models import tiny

TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}"
REPOSITORY = Path(mlxfuse.__file__).parents[1]
RAW = ("--ignore-chat-template", "--temp", "0")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    made = tiny.build("llama", 0)
    made.metadata["tokenizer.chat_template"] = TEMPLATE
    return str(tiny.write(tmp_path_factory.mktemp("models") / "tiny.gguf", made))


def invoke(*args, text=None):
    return CliRunner().invoke(app, [str(a) for a in args], input=text)


def answer(*args, text=None):
    result = invoke("generate", *args, "--json", text=text)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def start(*args, **more):
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY), **more.pop("env", {})}
    # Where the suite runs in a shell's background, Ctrl-C is ignored, and so by its children.
    default = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
    more = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **default, **more}
    return subprocess.Popen([sys.executable, "-m", "mlxfuse", *map(str, args)], env=env, **more)


# --- generate -----------------------------------------------------------------------------


def test_json_is_the_whole_of_stdout(model):
    from mlx_lm.generate import stream_generate

    got = answer(model, "-p", "Hello", "-m", "8", *RAW)
    loaded, tokenizer = load(model)
    ids = tokenizer.encode("Hello")
    want = [int(r.token) for r in stream_generate(loaded, tokenizer, ids, max_tokens=8)]
    assert got["tokens"] == want
    assert got["text"] == tokenizer.decode(want)
    assert got["prompt_tokens"] == 5
    assert got["generation_tokens"] == 8
    assert got["finish_reason"] == "length"
    for name in ("prompt_tps", "generation_tps", "load_seconds", "peak_memory"):
        assert got[name] > 0, name


@pytest.mark.parametrize(
    ("command", "name", "args"),
    [
        ("generate", "generate.run.stream_generate", ("-p", "x", "-m", "2")),
        ("chat", "generate.run.stream_generate", ("-m", "2")),
        ("chat", "generate.run.make_prompt_cache", ("-m", "2")),
        ("perplexity", "generate.perplexity.perplexity", ("--ctx-size", "16", "-f", "-")),
        ("bench", "bench.run.bench", ("-p", "2", "-n", "0", "-r", "2")),
    ],
)
def test_what_mlx_lm_prints_is_not_on_stdout(command, name, args, model, monkeypatch):
    found = f"mlxfuse.{name}"
    real = pkgutil.resolve_name(found)

    def talks(*args, **kwargs):
        print("[WARNING] words")
        return real(*args, **kwargs)

    monkeypatch.setattr(found, talks)
    result = invoke(command, model, *args, "--json", text="some text that is long enough " * 4)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)
    assert "[WARNING] words" in result.stderr


def test_text_on_stdout_and_footer_on_stderr(model):
    want = answer(model, "-p", "Hello", "-m", "8", *RAW)["text"]
    result = invoke("generate", "--model", model, "-p", "Hello", "-m", "8", *RAW)
    assert result.exit_code == 0
    assert result.stdout.encode("utf-8", "replace") == (want + "\n").encode("utf-8", "replace")
    lines = result.stderr.splitlines()[-3:]
    assert re.fullmatch(r"Prompt: 5 tokens, [\d.]+ tokens-per-sec", lines[0])
    assert re.fullmatch(r"Generation: 8 tokens, [\d.]+ tokens-per-sec", lines[1])
    assert re.fullmatch(r"Peak memory: [\d.]+ GB", lines[2])
    quiet = invoke("generate", model, "-p", "Hello", "-m", "8", *RAW, "--verbose", "False")
    assert (quiet.stdout, quiet.stderr) == (result.stdout, "")


def test_what_was_fused_is_a_table(model):
    """Of plain text where stderr is no terminal, with the reasons and the calls without kernels."""
    err = invoke("generate", model, "-p", "x", "-m", "1", *RAW, "--fuse", "all").stderr
    lines = [re.split(r" {2,}", line.strip()) for line in err.splitlines()]
    assert ["fusion", "fused", "of", "why not all, and which formats"] in lines
    rows = [line for line in lines if line[0] in ("qkv", "gate/up", "residual", "norm+rope")]
    assert rows == [[name, "3", "3"] for name in ("qkv", "gate/up", "residual", "norm+rope")]
    assert re.search(r"^Dispatches of a token: 5\d unfused, 3\d fused$", err, flags=re.M)
    if not mx.metal.is_available():
        assert "Without its kernel: norm_rope " in err
    assert not set(err) & set("│┃━─[]")
    assert "fusion" not in invoke("generate", model, "-m", "1", *RAW, "--fuse", "off").stderr


def test_the_prompt_as_the_model_gets_it(model):
    def tokens(*args, text=None):
        return answer(model, "-m", "1", *args, text=text)["prompt_tokens"]

    assert tokens("-p", "abc", "--ignore-chat-template") == 2  # the vocabulary has one merge
    assert tokens("-p", "x\\ny", "--ignore-chat-template") == 3
    assert tokens("-p", "-", "--ignore-chat-template", text="x\\ny") == 4
    chat = len("[user]x\n")
    assert tokens("-p", "x") == chat
    assert tokens("-p", "x", "--system-prompt", "y") == chat + len("[system]y\n")
    assert tokens("-p", "x", "--prefill-response", "z") == chat + len("[assistant]z")


def test_sampling_flags_reach_the_sampler(model):
    args = (model, "-p", "Hello", "-m", "12", "--ignore-chat-template")
    greedy = answer(*args)["tokens"]
    hot = answer(*args, "--temp", "5", "--seed", "1")["tokens"]
    assert hot != greedy
    assert answer(*args, "--temp", "5", "--seed", "1")["tokens"] == hot
    assert answer(*args, "--temp", "5", "--seed", "2")["tokens"] != hot
    # With one candidate left any temperature is greedy.
    for flag, value in (("--top-k", "1"), ("--top-p", "0.000001"), ("--min-p", "1")):
        assert answer(*args, "--temp", "5", "--seed", "1", flag, value)["tokens"] == greedy, flag


def test_an_extra_end_token_stops(model):
    args = (model, "-p", "Hello", "-m", "12", *RAW)
    tokens = answer(*args)["tokens"]
    stop = next(i for i, t in enumerate(tokens) if t not in tokens[:i] and i > 2)
    got = answer(*args, "--extra-eos-token", str(tokens[stop]))
    assert got["tokens"] == tokens[:stop]
    assert got["finish_reason"] == "stop"
    assert got["generation_tokens"] == stop + 1
    result = invoke("generate", *args, "--extra-eos-token", "<nothing>")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "<nothing>" in result.stderr


def test_abounded_cache_and_small_prefill_steps(model):
    args = (model, "-p", "Hello you there", "-m", "12", *RAW)
    tokens = answer(*args)["tokens"]
    assert answer(*args, "--prefill-step-size", "3")["tokens"] == tokens
    assert answer(*args, "--max-kv-size", "64")["tokens"] == tokens
    assert answer(*args, "--max-kv-size", "6")["tokens"] != tokens


def test_a_draft_model_changes_nothing_but_speed(model, tmp_path):
    args = (model, "-p", "Hello", "-m", "10", *RAW)
    other = tiny.write(tmp_path / "draft.gguf", tiny.build("llama", 1))
    for draft in (model, other):
        got = answer(*args, "--draft-model", draft, "--num-draft-tokens", "2")
        assert got["tokens"] == answer(*args)["tokens"]


def make_cache(path_of_model, path, text, **metadata):
    loaded, tokenizer = load(path_of_model)
    cache = make_prompt_cache(loaded)
    loaded(mx.array([tokenizer.encode(text)]), cache=cache)
    save_prompt_cache(str(path), cache, metadata)
    return cache


def test_the_prompt_follows_a_stored_cache(model, tmp_path):
    path = tmp_path / "cache.safetensors"
    make_cache(model, path, "Hello ", model=model)
    want = answer(model, "-p", "Hello you", "-m", "8", *RAW)
    got = answer(model, "-p", "you", "-m", "8", *RAW, "--prompt-cache-file", path)
    assert got["tokens"] == want["tokens"]
    assert got["prompt_tokens"] == 3
    # In the template, only what follows the user's place is new.
    make_cache(model, path, "[user]He", model=model)
    want = answer(model, "-p", "Hey", "-m", "8")
    got = answer(model, "-p", "y", "-m", "8", "--prompt-cache-file", path)
    assert got["tokens"] == want["tokens"]


def spoil_nothing(cache):
    pass


def spoil_heads(cache):
    cache[1].keys = cache[1].keys[:, :1]


def spoil_positions(cache):
    cache[0].offset = 10**6


def spoil_values(cache):
    cache[2].values = cache[2].values[:, :, :3]


def spoil_layers(cache):
    cache.pop()


def spoil_type(cache):
    cache[0].keys = cache[0].keys.astype(mx.int32)


@pytest.mark.parametrize(
    ("spoil", "code"),
    [
        (spoil_nothing, 0),
        (spoil_heads, 4),
        (spoil_positions, 4),
        (spoil_values, 4),
        (spoil_layers, 4),
        (spoil_type, 4),
    ],
)
def test_a_cache_that_does_not_fit_is_refused(model, tmp_path, spoil, code):
    path = tmp_path / "cache.safetensors"
    cache = make_cache(model, path, "Hello ")
    spoil(cache)
    save_prompt_cache(str(path), cache)
    result = invoke("generate", model, "-p", "x", "-m", "1", *RAW, "--prompt-cache-file", path)
    assert result.exit_code == code, result.stderr
    assert bool(result.stdout) == (code == 0)


def test_a_file_that_is_no_prompt_cache(model, tmp_path):
    args = ("generate", model, "-m", "1", "--prompt-cache-file")
    path = tmp_path / "cache.safetensors"
    assert invoke(*args, path).exit_code == 1
    path.write_bytes(b"\xff" * 100)
    assert invoke(*args, path).exit_code == 4
    mx.save_safetensors(str(path), {"0": mx.zeros(3)}, {"1.0": "Popen"})
    result = invoke(*args, path)
    assert result.exit_code == 4
    assert "Popen" in result.stderr
    mx.save_safetensors(str(path), {"0": mx.zeros(3)}, {"1.0": "KVCache"})
    assert invoke(*args, path).exit_code == 4
    make_cache(model, path, "x", model="another/model")
    result = invoke(*args, path)
    assert result.exit_code == 1
    assert "another/model" in result.stderr


# --- errors -------------------------------------------------------------------------------


def bad_files(model, folder):
    data = Path(model).read_bytes()
    name = b"blk.0.attn_q.weight"
    where = data.index(name) + len(name)
    (dimensions,) = struct.unpack_from("<I", data, where)
    kind = where + 4 + 8 * dimensions

    def write(name, content):
        path = folder / name
        path.write_bytes(content)
        return path

    unknown_type = data[:kind] + struct.pack("<I", 4) + data[kind + 4 :]
    empty = folder / "none"
    empty.mkdir()
    return {
        "no such file": ("nosuch.gguf", 1, "no such file"),
        "a folder": (empty, 1, "folder that has no model"),
        "text": (write("text.gguf", b"Hello, I am not a model.\n" * 9), 4, "text.gguf"),
        "empty": (write("empty.gguf", b""), 4, "empty.gguf"),
        "truncated header": (write("cut.gguf", data[:3000]), 4, "cut.gguf"),
        "truncated data": (write("short.gguf", data[:-1000]), 4, "short.gguf"),
        "architecture": (
            write("arch.gguf", data.replace(b"llama", b"lla\x1bma"[:5])), 3, "lla\\x1bm"
        ),
        "tensor type": (write("type.gguf", unknown_type), 3, "Q4_2"),
    }  # fmt: skip


@pytest.mark.parametrize(
    "case",
    ["no such file", "a folder", "text", "empty", "truncated header", "truncated data",
     "architecture", "tensor type"],
)  # fmt: skip
@pytest.mark.parametrize("command", ["generate", "inspect"])
def test_bad_files(model, tmp_path, case, command):
    path, code, message = bad_files(model, tmp_path)[case]
    result = invoke(command, path)
    if (case, command) == ("architecture", "inspect"):
        # Inspecting tells what is not supported instead of failing.
        assert (result.exit_code, result.stderr) == (0, "")
        assert "not supported: architecture lla\\x1bm; supported: " in result.stdout
        return
    assert (result.exit_code, result.stdout) == (code, "")
    assert message in result.stderr
    assert "\x1b" not in result.stderr
    assert "Traceback" not in result.stderr
    assert len(result.stderr.splitlines()) <= 3
    assert "Traceback" in invoke(command, path, "--debug").stderr


def test_gguf_is_recognised_by_its_magic(model, tmp_path):
    path = tmp_path / "model.bin"
    path.write_bytes(Path(model).read_bytes())
    assert invoke("inspect", path).exit_code == 0


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["a.gguf", "--model", "b.gguf"], "given twice"),
        (["-m", "a.gguf"], "-m is --max-tokens"),
        (["-m", "0"], "-1 for no limit"),
        (["-m", "x"], "whole number"),
        (["--temp", "nan"], "temp"),
        (["--temp", "inf"], "finite"),
        (["--temp", "-1"], "temp"),
        (["--top-p", "1.5"], "top-p"),
        (["--seed", "-1"], "seed"),
        (["--dtype", "int8"], "dtype"),
        (["--chat-template-config", "{"], "not JSON"),
        (["--chat-template-config", "[]"], "JSON object"),
        (["--chat-template-config", "[" * 100_000], "not JSON"),
        (["--max-kv-size", "64", "--draft-model", "d.gguf"], "--draft-model"),
        (["--nosuch"], "--nosuch"),
    ],
)
def test_usage_errors(args, message):
    result = invoke("generate", *args)
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in re.sub(r"[\s│]+", " ", result.stderr)


def test_no_arguments_shows_the_commands():
    result = invoke()
    assert result.exit_code == 2
    assert "generate" in result.output
    assert "inspect" in result.output


def test_offline_without_the_model(tmp_path):
    env = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "MLXFUSE_CACHE": str(tmp_path)}
    for args, message in ((["org/repo"], b"offline"), ([], b"Put SmolLM2")):
        process = start("generate", *args, env=env)
        out, err = process.communicate(timeout=60)
        assert (process.returncode, out) == (5, b""), err
        assert message in err
        assert b"Traceback" not in err


def test_an_unexpected_error_is_one_line(model):
    code = (
        "import sys, mlxfuse.cli as c, mlxfuse.inspect.header as i\n"
        "def broken(*_): raise KeyError('\\x1b[31m')\n"
        "i.inspect = broken\n"
        f"sys.argv = ['mlxfuse', 'inspect', {model!r}, *sys.argv[1:]]\n"
        "c.main()\n"
    )
    run = [sys.executable, "-c", code]
    done = subprocess.run(run, capture_output=True, text=True, cwd=REPOSITORY, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.count("\n") == 1
    assert "KeyError" in done.stderr
    assert "\x1b" not in done.stderr
    done = subprocess.run(
        [*run, "--debug"], capture_output=True, text=True, cwd=REPOSITORY, check=False
    )
    assert "Traceback" in done.stderr


# --- terminals, pipes, Ctrl-C -------------------------------------------------------------


def test_a_terminal_gets_no_control_characters(model):
    args = (model, "-p", "Hello", "-m", "60", "--temp", "1.5", "--seed", "3",
            "--ignore-chat-template")  # fmt: skip
    text = answer(*args)["text"]
    assert neutralize(text) != text, "choose a seed whose text has control characters"
    master, slave = pty.openpty()
    process = start("generate", *args, "--verbose", "False", stdout=slave)
    os.close(slave)
    shown = b""
    while piece := _read_terminal(master):
        shown += piece
    assert process.wait(timeout=60) == 0
    assert shown.decode().replace("\r\n", "\n") == neutralize(text) + "\n"


def on_terminal(*args):
    """What a command shows on a terminal that is its stderr, and its stdout."""
    master, slave = pty.openpty()
    process = start(*args, stderr=slave, env={"TERM": "xterm", "COLUMNS": "100"})
    os.close(slave)
    shown = b""
    while piece := _read_terminal(master):
        shown += piece
    stdout = process.stdout.read()
    assert process.wait(timeout=60) == 0
    return shown.decode(), stdout


def _read_terminal(master):
    try:
        return os.read(master, 4096)
    except OSError:  # Linux reports the closed other side of a pty as EIO
        return b""


def test_a_terminal_sees_what_is_being_done(model, tmp_path):
    args = ("generate", model, "-p", "Hello", "-m", "3", *RAW)
    shown, stdout = on_terminal(*args)
    assert "loading tiny.gguf" in shown
    assert "\x1b[?25h" in shown, "the cursor is shown again"
    # The line is gone before the footer.
    assert "\x1b[2K" in shown[: shown.index("Prompt: 5 tokens")]
    assert "loading" not in shown[shown.index("Prompt: 5 tokens") :]
    piped = invoke(*args)
    assert stdout.decode() == piped.stdout
    assert "loading" not in piped.stderr
    assert "ing" not in on_terminal(*args, "--json")[0]
    assert on_terminal(*args, "--verbose", "False")[0] == ""


def test_a_prompt_beyond_the_context_is_told(model):
    told = invoke("generate", model, "-p", "x" * 257, "-m", "1", *RAW)
    assert "the prompt has 257 tokens, the model was made for 256" in told.stderr
    assert "made for" not in invoke("generate", model, "-p", "x" * 256, "-m", "1", *RAW).stderr


def test_abounded_cache_bounds_sliding_windows_too(tmp_path):
    loaded, _ = load(tiny.write(tmp_path / "m.gguf", tiny.build("gemma2", 0)))
    assert {cache.max_size for cache in new_cache(loaded, Settings(max_kv_size=5))} == {5}
    assert sorted({cache.max_size for cache in new_cache(loaded, Settings(max_kv_size=50))}) == [
        6,
        50,
    ]


def test_a_closed_pipe_is_quiet(model):
    process = start("generate", model, "-p", "Hello", "-m", "-1", *RAW)
    assert process.stdout.read(1)
    process.stdout.close()
    assert process.wait(timeout=60) == 141
    assert process.stderr.read() == b""


@pytest.mark.parametrize("delay", [0.0, 0.7, 3.0])
def test_ctrl_c_while_loading_and_reading_the_prompt(model, delay):
    process = start("generate", model, "-p", "-", "-m", "1", *RAW, stdin=subprocess.PIPE)
    # More than a pipe holds: this returns when the command has begun to read.
    process.stdin.write(b"Hello " * 300_000)
    process.stdin.close()
    time.sleep(delay)
    check_interrupt(process)


def test_ctrl_c_while_generating(model):
    process = start("generate", model, "-p", "Hello", "-m", "-1", *RAW)
    assert process.stdout.read(1)
    check_interrupt(process)


def check_interrupt(process):
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=30) == 130  # unasked it would go on for minutes
    assert b"Traceback" not in process.stderr.read()


@pytest.mark.parametrize(("watch", "code"), [(True, 130), (False, 1)])
def test_ctrl_c_while_importing(tmp_path, watch, code):
    (tmp_path / "native.py").write_text(
        "import os, signal\ntry:\n  os.kill(os.getpid(), signal.SIGINT)\n"
        "  for _ in range(99): pass\n"
        "except KeyboardInterrupt: raise SystemError('broken off')\n"
    )
    lines = [
        "import mlxfuse.process as p",
        "p.watch_interrupts()" if watch else "",
        "import native",
    ]
    process = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{Path(mlxfuse.__file__).parents[1]}"},
        capture_output=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert (process.returncode, b"SystemError" in process.stderr) == (code, not watch)


@pytest.mark.parametrize(("watch", "stops"), [(True, True), (False, False)])
def test_ctrl_c_in_a_native_call(watch, stops):
    code = (
        "import hashlib, mlxfuse.process as p\n"
        f"{'p.watch_interrupts()' if watch else ''}\n"
        "print('ready', flush=True)\n"
        "hashlib.pbkdf2_hmac('sha256', b'', b'', 2_000_000_000)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        cwd=REPOSITORY,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    process.stdout.readline()
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    if stops:
        assert process.wait(timeout=30) == 130
        return
    # Control: without the watcher the interpreter never gets to see it.
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=3)
    process.kill()
    process.wait()


@pytest.mark.parametrize("command", ["generate", "chat", "perplexity", "server", "bench"])
def test_options_without_a_meaning_are_refused_before_a_model_is_fetched(command):
    more = ["-f", "-"] if command == "perplexity" else []
    for option, value, said in (("--fuse", "nope", "nope"), ("--kv-bits", "5", "4 or 8")):
        result = invoke(command, "no.such/model", option, value, *more, text="Hello\n")
        assert result.exit_code == 2
        assert said in result.output


# --- inspect ------------------------------------------------------------------------------


def inspected(name, folder):
    path = tiny.write(folder / f"{name}.gguf", tiny.build(name, 0))
    result = invoke("inspect", path, "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    return json.loads(result.stdout), path


def test_inspect_counts_everything(tmp_path):
    found, path = inspected("llama-q4", tmp_path)
    case = tiny.CASES["llama-q4"]
    weights = tiny.build("llama-q4", 0).tensors
    assert found["architecture"] == "llama"
    assert found["supported"] is True
    assert found["size"] == path.stat().st_size
    assert found["layers"] == case.layers
    assert found["context_length"] == 256
    assert found["tokenizer"] == {"model": "gpt2", "pre": "gpt-2", "tokens": tiny.VOCABULARY}
    assert found["chat_template"] is False
    assert found["unsupported"] == []
    counts = {}
    for data, kind in weights.values():
        size = data.nbytes
        tensors, total = counts.get(kind, (0, 0))
        counts[kind] = tensors + 1, total + size
    got = {t["type"]: (t["tensors"], t["bytes"]) for t in found["tensor_types"]}
    assert got == counts
    made = tiny.build("llama-q4", 0)
    assert found["parameters"] == sum(made.weights(name).size for name in weights)


@pytest.mark.parametrize(
    ("name", "qkv", "gate"),
    [
        ("llama", ("equal", ["Q8_0"] * 3), ("equal", ["Q8_0"] * 2)),
        ("llama-q4", ("mixed", ["Q4_0", "Q4_0", "Q8_0"]), ("equal", ["Q4_0"] * 2)),
        ("llama-fused-qkv", ("stored as one", ["Q4_1"]), ("equal", ["Q4_1"] * 2)),
        ("phi3-4k", ("stored as one", ["F32"]), ("stored as one", ["F32"])),
    ],
)
def test_inspect_tells_what_goes_together(tmp_path, name, qkv, gate):
    found, _ = inspected(name, tmp_path)
    layers = list(range(tiny.CASES[name].layers))
    for group, (kind, types) in (("q|k|v", qkv), ("gate|up", gate)):
        assert found["fusion"][group] == [{"kind": kind, "types": types, "layers": layers}]


@pytest.mark.parametrize("kernel", [True, False])
def test_inspect_marks_what_is_not_one_kernel(tmp_path, monkeypatch, kernel):
    """A group one of whose members has a type without a kernel."""
    if not kernel:
        plain = replace(BY_NAME["Q8_0"], traits=None)
        monkeypatch.setitem(FORMATS, plain.id, plain)
    found, _ = inspected("llama-q4", tmp_path)
    types, layers = ["Q4_0", "Q4_0", "Q8_0"], [0, 1, 2]
    kind = "mixed" if kernel else "apart"
    assert found["fusion"]["q|k|v"] == [{"kind": kind, "types": types, "layers": layers}]
    # gate and up have types with kernels.
    assert found["fusion"]["gate|up"] == [{"kind": "equal", "types": types[:2], "layers": layers}]
    text = render(found)
    assert ("Q4_0|Q4_0|Q8_0 (not one kernel)" in text) is not kernel
    assert text.count("(not one kernel)") == (not kernel)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: m.metadata.pop("llama.block_count"), "the key 'llama.block_count' is missing"),
        (lambda m: m.metadata.update({"llama.expert_count": 4}), "the key 'llama.expert_used_c"),
        (
            lambda m: m.metadata.update({"llama.attention.head_count_kv": [2.0, math.nan, 2.0]}),
            "llama.attention.head_count_kv is not a list of integers",
        ),
        (lambda m: m.tensors.pop("blk.1.ffn_up.weight"), "blk.1.ffn_up.weight is missing"),
        (lambda m: m.metadata.update({"tokenizer.ggml.add_eos_token": 1}), "tokenizer.ggml.add_e"),
    ],
)
def test_inspect_tells_what_generate_would_refuse(tmp_path, change, reason):
    made = tiny.build("llama", 0)
    change(made)
    path = tiny.write(tmp_path / "m.gguf", made)
    found = json.loads(invoke("inspect", path, "--json").stdout)
    assert found["supported"] is False
    assert [r[: len(reason)] for r in found["unsupported"]] == [reason]
    shown = invoke("inspect", path).stdout
    assert "supported     no, see below\n" in shown
    assert f"\nnot supported: {reason}" in shown
    assert invoke("generate", path).exit_code in (3, 4)


def test_inspect_for_people_is_safe_to_print(tmp_path):
    made = tiny.build("llama", 0)
    made.metadata["general.name"] = "[bold]evil\x1b[31m\u202ename\n2[/]"
    path = tiny.write(tmp_path / "m.gguf", made)
    result = invoke("inspect", path)
    assert "name          [bold]evil\\x1b[31m\\u202ename\\x0a2[/]\n" in result.stdout
    assert "q|k|v            Q8_0                    0-2\n" in result.stdout


def test_fuse_takes_known_names(model):
    bad = invoke("generate", model, "--fuse", "qkv,nosuch")
    assert bad.exit_code == 2
    assert bad.stdout == ""
    assert "nosuch" in bad.stderr
    assert answer(model, "--fuse", "off", "-m", "2", *RAW)["load"]["patch"]["fusions"] == {}
    found = answer(model, "--fuse", "qkv", "-m", "2", *RAW)["load"]["patch"]
    layers = len(found["fused"])
    assert found["fusions"] == {"qkv": {"fused": layers, "of": layers}}
    assert found["fused"][0]["path"] == "model.layers.0.self_attn"


@pytest.mark.parametrize("rank", [0, 1])
def test_what_runs_in_one_process_says_so_under_mlx_launch(rank):
    run = start("doctor", env={"MLX_RANK": str(rank)})
    out, err = run.communicate()
    assert (run.returncode, out) == (3, b"")
    assert (b"rank 0: this command runs in one process" in err) is (rank == 0)
    assert err.count(b"\n") == (rank == 0)
