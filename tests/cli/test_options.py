"""The groups of options: declared once, and every command has what it is to have."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass, fields
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from mlxfuse.cli import app
from mlxfuse.cli._groups import flat
from mlxfuse.cli._text_options import Sampling as Options
from mlxfuse.generate.sampling import Sampling

from ..models import tiny

COMMANDS = sorted(c.name for c in app.registered_commands)


def invoke(*args, **more):
    return CliRunner().invoke(app, [str(a) for a in args], **more)


def test_a_group_becomes_parameters():
    @dataclass(frozen=True, kw_only=True)
    class Group:
        first: Annotated[int, typer.Option()] = 1
        second: Annotated[str, typer.Option("--other")] = "x"

    seen = []
    small = typer.Typer()

    def command(group: Group, last: Annotated[int, typer.Option()] = 3) -> None:
        seen.append((group, last))

    command.__annotations__["group"] = Group
    small.command()(flat(command))
    result = CliRunner().invoke(small, ["--first", "5", "--other", "y"])
    assert result.exit_code == 0, result.output
    assert seen == [(Group(first=5, second="y"), 3)]


def test_one_table_of_sampling_options():
    """The command line has each field of `Sampling`, and generate, chat and server have it."""
    names = {f.name for f in fields(Sampling)}
    assert {f.name for f in fields(Options)} == names
    for command in ("generate", "chat", "server"):
        text = invoke(command, "--help-all").output
        for name in names:
            assert f"--{name.replace('_', '-')}" in text, (command, name)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_fits_a_screen_and_has_an_example(command):
    result = invoke(command, "--help", env={"COLUMNS": "80"})
    assert result.exit_code == 0
    lines = result.output.rstrip().splitlines()
    assert len(lines) <= 50
    assert all(len(line) <= 80 for line in lines)
    examples = result.output.partition("Examples:\n")[2].split("\n")
    assert any(line.startswith(f"  mlxfuse {command}") for line in examples)
    whole = invoke(command, "--help-all").output
    assert "--debug" in whole
    assert "--debug" not in result.output


@pytest.fixture(scope="module")
def warm(tmp_path_factory):
    """A model whose file wants it sampled."""
    made = tiny.build("llama", 0)
    made.metadata |= {"general.sampling.temp": 5.0, "general.sampling.top_k": 40}
    return str(tiny.write(tmp_path_factory.mktemp("warm") / "m.gguf", made))


def answer(*args):
    result = invoke(*args)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_the_file_samples_unless_a_flag_says_otherwise(warm):
    args = ("generate", warm, "-p", "Hello", "-m", "12", "--ignore-chat-template")
    mine = answer(*args, "--seed", "1", "--json")
    assert mine["sampling"] == {"temp": 5.0, "top_k": 40}
    explicit = ("--temp", "5", "--top-k", "40", "--seed", "1", "--json")
    assert answer(*args, *explicit)["tokens"] == mine["tokens"]
    greedy = answer(*args, "--temp", "0", "--json")
    assert greedy["sampling"] == {}
    assert greedy["tokens"] != mine["tokens"]
    footer = invoke(*args, "--top-k", "3").stderr
    assert "Sampling: temp 5 (the file's), top-k 3\n" in footer


def test_bad_biases_and_forgotten_flags_are_told(warm):
    for bias in ("x", "5", "5+x", "+1"):
        result = invoke("generate", warm, "--logit-bias", bias)
        assert result.exit_code == 2
        assert "15043+1" in result.output
    result = invoke("generate", warm, "--logit-bias", "999999+1")
    assert result.exit_code == 1
    assert "999999 is no token of this model" in result.stderr
    result = invoke("generate", warm, "a question")
    assert result.exit_code == 2
    assert "a message is given with -p" in result.output
    both = invoke("generate", warm, "--ignore-chat-template", "--system-prompt", "x")
    assert both.exit_code == 2
    assert "needs the chat template" in " ".join(both.output.split())


def test_a_biased_token_is_the_only_one(warm):
    args = ("generate", warm, "-p", "Hello", "-m", "3", "--ignore-chat-template", "--temp", "0")
    assert answer(*args, "--logit-bias", "70+1000", "--json")["tokens"] == [70, 70, 70]


def test_verbosity(warm):
    args = ("generate", warm, "-p", "Hello", "-m", "2", "--ignore-chat-template")
    assert invoke(*args, "-q").stderr == ""
    assert invoke(*args, "--verbose", "False").stderr == ""  # as mlx_lm.generate takes it
    told = invoke(*args, "-v").stderr
    assert "Loading, header: " in told
    assert "Loading, header: " not in invoke(*args).stderr


def test_a_prompt_and_a_system_prompt_from_files(warm, tmp_path):
    file, system = tmp_path / "p.txt", tmp_path / "s.txt"
    file.write_text("a\\nb")
    system.write_text("be brief")
    args = ("generate", warm, "-m", "1", "--json")
    raw = answer(*args, "-f", file, "--ignore-chat-template")
    assert raw["prompt_tokens"] == 4  # the backslash and the n are two characters of a file
    assert invoke(*args, "-f", file, "-p", "x").exit_code == 2
    assert invoke(*args, "--system-prompt-file", system, "--system-prompt", "x").exit_code == 2
    missing = invoke(*args, "-f", tmp_path / "none")
    assert missing.exit_code == 1
    assert "none" in missing.stderr


def test_ctrl_c_is_watched_before_anything_large_is_imported():
    """Else it is a traceback for as long as the imports take."""
    code = (
        "import sys, mlxfuse.process as p\n"
        "p.watch_interrupts = lambda: print([n for n in ('typer', 'rich') if n in sys.modules])\n"
        "from mlxfuse.__main__ import main\n"
        "sys.argv = ['mlxfuse', '--version']\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[0] == "[]"
    assert done.stdout.splitlines()[1].startswith("mlxfuse ")


def test_a_shell_completes_commands_and_models(tmp_path):
    (tmp_path / "model.gguf").touch()
    (tmp_path / "models").mkdir()
    (tmp_path / "model.txt").touch()
    words = f"mlxfuse inspect {tmp_path}/mod"
    done = subprocess.run(
        [sys.executable, "-m", "mlxfuse"],
        env={
            **os.environ,
            "_MLXFUSE_COMPLETE": "complete_bash",
            "COMP_WORDS": words,
            "COMP_CWORD": "2",
        },
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout.split() == [f"{tmp_path}/model.gguf", f"{tmp_path}/models/"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--num-draft-tokens", "3"), "--num-draft-tokens needs --draft-model or --prompt-lookup"),
        (("--chat-template-config", "["), "--chat-template-config: not JSON"),
        (("--chat-template-config", "[]"), "--chat-template-config: expected a JSON object"),
        (("-f", "/no such file"), "/no such file: no such file or directory"),
        (("--fuse", "qvk"), "--fuse takes auto, all, off or names: qkv"),
    ],
)
def test_what_is_wrong_is_told_with_its_option(arguments, said, tmp_path):
    path = tiny.write(tmp_path / "m.gguf", tiny.build("llama", 0))
    result = invoke("generate", path, *arguments, env={"COLUMNS": "200"})
    assert result.exit_code != 0
    assert said in " ".join(result.output.split())
    assert "Errno" not in result.output
