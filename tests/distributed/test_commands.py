"""Commands on two ranks: one answer, which is one process's, and one end."""

import json
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import openai
import pytest
from typer.testing import CliRunner

from mlxfuse.cli import app
from mlxfuse.ranks import group, join
from tests.distributed.launch import ROOT, free_ports, start
from tests.models import tiny

TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}"
LIMIT = 120  # seconds after which a test gives up
LAUNCH = Path(sys.executable).parent / "mlx.launch"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    made = tiny.build("llama", 0)
    made.metadata["tokenizer.chat_template"] = TEMPLATE
    return str(tiny.write(tmp_path_factory.mktemp("models") / "tiny.gguf", made))


def alone(*args, text=None):
    """What one process prints."""
    result = CliRunner().invoke(app, [str(a) for a in args], input=text)
    assert result.exit_code == 0, result.output
    return result.stdout


@contextmanager
def ranks(*args, count=2):
    """The command as ranks, which are killed where they are not needed any more."""
    made = start(count, "mlxfuse", *args, stderr=subprocess.PIPE)
    try:
        yield made
    finally:
        for process in made:
            process.kill()
            process.wait()
            process.stdout.close()
            process.stderr.close()


def ended(*args):
    """(exit code, stdout, stderr) of each of two ranks."""
    with ranks(*args) as made:
        said = [process.communicate(timeout=LIMIT) for process in made]
        return [(p.returncode, *each) for p, each in zip(made, said, strict=True)]


def test_generate_gives_one_answer_which_is_that_of_one_process(model, tmp_path):
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("Good morning. ")
    # Only rank 0's machine has the prompt.
    files = (str(prompt), str(tmp_path / "none"))
    how = ("-m", "12", "--temp", "0.9", "--seed", "3")
    (code, out, err), other = ended("generate", model, "-f", files, *how)
    assert (code, out) == (0, alone("generate", model, "-f", prompt, *how))
    assert "2 machines: this one, rank 0, has 1 of 2 key/value heads" in err
    assert other == (0, "", "")


def test_other_files_are_told_of_on_every_rank(model, tmp_path):
    other = str(tiny.write(tmp_path / "tiny.gguf", tiny.build("llama", 1)))
    found = ended("generate", (model, other), "-p", "Hi")
    for rank, (code, out, err) in enumerate(found):
        assert (code, out) == (1, "")
        message = rf"mlxfuse: rank {rank}: the ranks differ in the model's files: rank 0 has .+\n"
        assert re.fullmatch(message, err)


def test_what_one_rank_lacks_ends_the_others(model, tmp_path):
    first, second = ended("generate", (model, str(tmp_path / "none.gguf")), "-p", "Hi")
    # MLX's ring may write lines of its own.
    own = re.findall("mlxfuse: .*", first[2])
    assert first[:2] == (1, "")
    assert own == ["mlxfuse: rank 0: rank 1 has failed, which ends all ranks"]
    assert second[:2] == (1, "")
    assert re.fullmatch(r"mlxfuse: rank 1: .*none\.gguf: no such file.*\n", second[2])


def test_perplexity_of_a_pipeline_is_that_of_one_process(model, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("Some text that is long enough. " * 12)
    how = ("-f", str(text), "-c", "64", "--chunks", "2", "--json")
    (code, out, _), other = ended("perplexity", model, "--pipeline", *how)
    assert (code, other) == (0, (0, "", ""))
    assert "layers 0 to" in json.loads(out)["load"]["notes"][0]
    (found, want) = (json.loads(o)["perplexity"] for o in (out, alone("perplexity", model, *how)))
    assert found["value"] == pytest.approx(want["value"], rel=1e-5)


def test_bench_times_what_the_ranks_share(model):
    how = ("-p", "0", "-n", "2", "-r", "2", "--fuse", "all", "--json")
    (code, out, _), other = ended("bench", model, *how)
    assert (code, other) == (0, (0, "", ""))
    arms = json.loads(out)["arms"]
    assert [arm["match"] for arm in arms] == ["reference", "yes"]
    assert all(arm["what"].endswith("shared by 2 ranks") for arm in arms)


def test_what_each_rank_would_hold_is_told(model):
    first, second = json.loads(alone("inspect", model, "--ranks", "2", "--json"))["ranks"]
    for rank in (first, second):
        assert rank["kv_heads"] == [1, 2]
        assert rank["replicated"] < rank["weights"] / 10
        # Of each of three layers the sums after attention and MLP, and that of the embedding.
        assert (rank["sums"], rank["summed"]) == (7, 64 * 2)
        assert rank["gathered"] == tiny.VOCABULARY * 2
    whole = first["weights"] + second["weights"] - first["replicated"]
    assert whole == json.loads(alone("inspect", model, "--json"))["memory"]["weights"]
    told = alone("doctor", model, "--ranks", "2").splitlines()
    assert "on 2 machines like this one, for each token: 7 sums of 0.1 kB" in told[-5]
    assert re.match("rank 1: .* of the model, 1 of 2 key/value heads", told[-2])
    how = ("--ranks", "3", "--pipeline", "--json")
    staged = json.loads(alone("inspect", model, *how))["ranks"]
    assert [rank["layers"] for rank in staged] == [[0, 0], [1, 1], [2, 2]]
    assert staged[0]["sums"] == 4  # one a stage, and the embedding's
    many = CliRunner().invoke(app, ["inspect", model, "--ranks", "1000"])
    assert (many.exit_code, many.stdout) == (3, "")
    assert "cannot be shared by 1000 machines" in many.stderr


@pytest.mark.skipif(not LAUNCH.exists(), reason="mlx.launch is not installed beside Python")
def test_chat_under_mlx_launch(model):
    said = "Hello\nWho are you?\n/reset\nHello\n/bye\n"
    how = ("-m", "12", "--temp", "0.7", "--seed", "5")
    command = [LAUNCH, "-n", "2", "--starting-port", str(free_ports(1)[0]), "--python"]
    process = subprocess.Popen(
        [*command, sys.executable, "--", "-m", "mlxfuse", "chat", model, *how],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        # It never passes on that its input has ended, and spins once it has: the pipe stays open.
        process.stdin.write(said.encode())
        process.stdin.flush()
        assert process.wait(timeout=LIMIT) == 0
        assert process.stdout.read().decode() == alone("chat", model, *how, text=said)
    finally:
        process.terminate()
        process.communicate()


@contextmanager
def served(model, *how):
    """Two ranks of a server, and a client's address."""
    with ranks("server", model, "--port", "0", *how) as made:
        line = made[0].stderr.readline()
        yield made, re.search(r"http://\S+/v1", line)[0]


def ask(url, prompt, **more):
    client = openai.OpenAI(base_url=url, api_key="none", timeout=LIMIT, max_retries=0)
    return client.completions.create(model="", prompt=prompt, **more)


def test_a_server_on_two_ranks_answers_together_and_ends_together(model):
    texts = [f"Hello {n}, " + "so " * n for n in range(8)]
    want = [
        json.loads(alone("generate", model, "-p", text, "-m", "16", "--temp", "0",
                         "--ignore-chat-template", "--json"))["text"]
        for text in texts
    ]  # fmt: skip
    got = {}
    # Some prompt caches are kept, others not: on both ranks the same.
    with served(model, "--prompt-cache-bytes", "60K") as (made, url):

        def client(n, text):
            # Half of them choose at random, with samplers of their own: they disturb nobody.
            ask(url, text, max_tokens=4 + n, temperature=0.8, seed=n if n % 2 else None)
            got[n] = ask(url, text, max_tokens=16, temperature=0).choices[0].text

        threads = [threading.Thread(target=client, args=each) for each in enumerate(texts)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(LIMIT)
        assert [got[n] for n in range(8)] == want

        # A client that hangs up, and one that is answered after it.
        with ask(url, "Hi", max_tokens=100, stream=True) as stream:
            next(iter(stream))
        scored = ask(url, "Hello", max_tokens=2, logprobs=1, echo=True, temperature=0)
        assert len(scored.choices[0].logprobs.tokens) == 7

        # A rank that is lost while the others compute.
        stream = ask(url, "Hi", max_tokens=110, stream=True, logit_bias={"2": -100})
        next(iter(stream))
        began = time.monotonic()
        made[1].kill()
        _, err = made[0].communicate(timeout=LIMIT)
        assert time.monotonic() - began < 10
        assert made[0].returncode == 1
        # MLX's ring writes lines of its own, in pieces.
        own = re.findall("mlxfuse: .*", err)
        assert own == ["mlxfuse: rank 0: rank 1 is lost (it has gone), which ends all ranks"]


def test_ctrl_c_ends_a_server_on_every_rank(model):
    with served(model) as (made, url):
        assert ask(url, "Hi", max_tokens=1).choices
        made[0].send_signal(signal.SIGINT)
        for process in made:
            process.communicate(timeout=LIMIT)
        assert [process.returncode for process in made] == [130, 130]


@pytest.mark.parametrize(
    "args",
    [
        ("generate", "--draft-model", "m.gguf"),
        ("generate", "--prompt-cache-file", "c.safetensors"),
        ("generate", "-p", "-"),
        ("server", "--draft-model", "m.gguf"),
        ("perplexity", "-f", "-"),
    ],
)
def test_what_cannot_be_used_with_several_ranks_is_refused(args, monkeypatch):
    monkeypatch.setenv("MLX_RANK", "0")
    monkeypatch.delenv("MLX_HOSTFILE", raising=False)
    result = CliRunner().invoke(app, args)
    assert result.exit_code == 2
    assert "cannot be used under mlx.launch" in " ".join(result.output.split())


@pytest.mark.parametrize(("hosts", "code"), [("\n", 0), ("[", 1)])
def test_one_process_needs_no_ring(hosts, code, model, tmp_path, monkeypatch):
    (tmp_path / "hosts.json").write_text(hosts)  # blank after mlx.launch -n 1
    monkeypatch.setenv("MLX_RANK", "0")
    monkeypatch.setenv("MLX_HOSTFILE", str(tmp_path / "hosts.json"))
    for cached in (group, join):
        cached.cache_clear()
    result = CliRunner().invoke(app, ["generate", model, "-p", "Hi", "-m", "2"])
    assert result.exit_code == code, result.output
    assert ("mlxfuse: rank 0: MLX cannot connect the ranks: " in result.stderr) is bool(code)


@pytest.mark.parametrize(("error", "code"), [("KeyboardInterrupt", 130), ("OSError", 1)])
def test_ctrl_c_says_nothing_wherever_it_is_noticed(error, code):
    raising = f"import sys, mlxfuse.process as p; sys.excepthook = p.unexpected; raise {error}"
    ended = subprocess.run(
        [sys.executable, "-c", raising], capture_output=True, text=True, check=False, timeout=LIMIT
    )
    assert ended.returncode == code
    assert bool(ended.stderr) is (code == 1)
