"""The scripts in examples/, each run as a user would; patch_mlx_lm.py is in tests/fusion."""

import os
import subprocess
import sys

import pytest
from mlx_lm import generate

from mlxfuse.loader import load

from .cli.test_cli import REPOSITORY, TEMPLATE
from .models import tiny


def model(folder, name):
    made = tiny.build(name, 0)
    made.metadata["tokenizer.chat_template"] = TEMPLATE
    return tiny.write(folder / f"{name}.gguf", made)


def run(script, *args):
    done = subprocess.run(
        [sys.executable, f"examples/{script}", *map(str, args)],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "PYTHONIOENCODING": "utf-8:replace"},
        capture_output=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode(), done.stderr.decode()


def expected(path, text, count, *, templated=True, **options):
    loaded, tokenizer = load(path, **options)
    if templated:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True
        )
    answer = generate(loaded, tokenizer, text, max_tokens=count)
    return answer.encode("utf-8", "replace").decode()


def test_quickstart(tmp_path):
    path = model(tmp_path, "llama")
    assert run("quickstart.py", path, "two", "words")[0] == expected(path, "two words", 64) + "\n"


def test_long_context(tmp_path):
    path = model(tmp_path, "llama")
    (tmp_path / "text.txt").write_text("All of it. " * 12)
    out, err = run("long_context.py", tmp_path / "text.txt", path)
    question = "Sum up this text in one sentence.\n\n" + "All of it. " * 12
    assert out == expected(path, question, 64, kv_bits="k8v4") + "\n"
    assert "MB hold" in err


@pytest.mark.parametrize(("name", "fused"), [("gemma3", True), ("llama", False)])
def test_custom_detector(tmp_path, name, fused):
    path = model(tmp_path, name)
    out, err = run("custom_detector.py", path)
    assert out == expected(path, "The sky is", 32, templated=False) + "\n"
    layers, norms = tiny.CASES["gemma3"].layers, 6  # q, k and the four of a layer
    count = layers * norms + 1
    assert (f"ready_norm {count}/{count}" in err) is fused


@pytest.mark.parametrize(
    ("name", "layers", "hidden", "nbytes"),
    [("8B", 32, 4096, 4.92e9), ("70B", 80, 8192, 42.5e9)],
)
def test_what_two_macs_send_each_other(name, layers, hidden, nbytes):
    """The arithmetic of the page: sums twice a layer and of the embedding, and half the logits."""
    page = (REPOSITORY / "examples" / "two_macs.md").read_text()
    (row,) = (line for line in page.splitlines() if line.startswith(f"| {name}:"))
    sums = 2 * layers + 1
    summed = 2 * sums * hidden
    sent = summed + 128_256
    assert row.split(" | ")[1:] == [
        str(sums),
        f"{sent / 1e6:.2f} MB",
        f"{sent / 1e7:.2f} ms",
        f"{sent / 1.25e6:.2f} ms",
        f"{summed / 1e7:.2f} s",
        f"{summed / 1.25e6:.2f} s |",
    ]
    alone, two = nbytes / 273e6, nbytes / 273e6 / 2
    assert f"{alone:.1f} ms a token on one and {two:.1f} ms" in page or (
        f"{alone:.1f} and {two:.1f} ms" in page
    )
    assert f"{two / (sums + 1):.2f} ms ({name})" in page
