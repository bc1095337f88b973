"""`ls` finds what other programs keep, `rm` removes only what is in the caches."""

import json
import os

import pytest
from huggingface_hub import constants
from typer.testing import CliRunner

from mlxfuse.cli import app
from mlxfuse.hub.demo import demo_path

from ..models import tiny

COMMIT = "a" * 40


def invoke(*args, **more):
    return CliRunner().invoke(app, [str(a) for a in args], **more)


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A home folder with models of Hugging Face's cache, LM Studio, llama.cpp, and the demo."""
    body = tiny.write(tmp_path / "m.gguf", tiny.build("llama", 0)).read_bytes()
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("MLXFUSE_CACHE", str(tmp_path / "ours"))
    monkeypatch.setenv("LLAMA_CACHE", str(tmp_path / "llama"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    repo = tmp_path / "hub" / "models--org--repo"
    snapshot = repo / "snapshots" / COMMIT
    for folder in (repo / "blobs", repo / "refs", snapshot):
        folder.mkdir(parents=True)
    (repo / "refs" / "main").write_text(COMMIT)
    for name, blob in (("m-Q4_0.gguf", "1"), ("m-Q8_0.gguf", "2"), ("copy.txt", "2")):
        (repo / "blobs" / blob).write_bytes(body)
        (snapshot / name).symlink_to(repo / "blobs" / blob)
    files = {
        "studio": tmp_path / ".lmstudio" / "models" / "pub" / "repo" / "s-Q4_0.gguf",
        "llama": tmp_path / "llama" / "broken.gguf",
        "demo": demo_path(),
    }
    for name, path in files.items():
        path.parent.mkdir(parents=True)
        path.write_bytes(body[:100] if name == "llama" else body)
    return tmp_path, snapshot, files


def test_ls_finds_them_all(machine):
    _, _, files = machine
    result = invoke("ls", "--json")
    assert result.exit_code == 0, result.output
    rows = {row["ref"]: row for row in json.loads(result.stdout)}
    studio, broken = str(files["studio"]), str(files["llama"])
    assert set(rows) == {"org/repo:Q4_0", "org/repo:Q8_0", "the demo model", studio, broken}
    assert rows[studio]["place"] == "LM Studio"
    for ref in rows.keys() - {broken}:
        row = rows[ref]
        assert (row["architecture"], row["problem"], row["fits"]) == ("llama", "", True)
        assert row["size"] == files["studio"].stat().st_size
    assert rows[broken]["problem"].startswith("no: ")
    shown = invoke("ls", env={"COLUMNS": "200"}).stdout
    assert "org/repo:Q8_0" in shown
    assert "LM Studio" in shown


def test_rm_removes_one_model_and_no_shared_content(machine):
    folder, snapshot, _ = machine
    blobs = snapshot.parents[1] / "blobs"
    assert invoke("rm", "org/repo:q4_0").exit_code == 2  # nobody can be asked
    assert (blobs / "1").exists()
    result = invoke("rm", "org/repo:q4_0", "--yes")
    assert result.exit_code == 0, result.output
    assert not (snapshot / "m-Q4_0.gguf").is_symlink()
    assert not (blobs / "1").exists()
    assert invoke("rm", "org/repo:Q8_0", "-y").exit_code == 0
    assert not (snapshot / "m-Q8_0.gguf").is_symlink()
    assert (blobs / "2").exists()  # copy.txt has the same content
    assert invoke("rm", "org/repo", "-y").exit_code == 0
    assert list((folder / "hub").iterdir()) == []
    assert invoke("rm", "demo", "-y").exit_code == 0
    assert not demo_path().exists()


def test_a_model_of_an_older_revision_is_listed_and_removed(machine):
    _, snapshot, _ = machine
    repo = snapshot.parents[1]
    newer = repo / "snapshots" / ("b" * 40)
    (newer / "big").mkdir(parents=True)
    (repo / "blobs" / "3").write_bytes((repo / "blobs" / "1").read_bytes())
    for name, blob in (("m-Q8_0.gguf", "2"), ("m-Q5_0.gguf", "3"), ("big/m-Q5_0.gguf", "3")):
        (newer / name).symlink_to(repo / "blobs" / blob)
    os.utime(repo / "blobs" / "3", (2e9, 2e9))
    rows = {row["ref"]: row["path"] for row in json.loads(invoke("ls", "--json").stdout)}
    assert rows["org/repo:Q4_0"] == str(snapshot / "m-Q4_0.gguf")
    assert rows["org/repo:Q8_0"] == str(newer / "m-Q8_0.gguf")
    # Two have this type: each has the name by which it can be asked for.
    named = {ref for ref in rows if "5_0" in ref}
    assert named == {"org/repo:m-Q5_0.gguf", "org/repo:big/m-Q5_0.gguf"}
    assert invoke("rm", "org/repo:m-Q5_0.gguf", "-y").exit_code == 0
    assert (newer / "big" / "m-Q5_0.gguf").is_symlink()
    assert not (newer / "m-Q5_0.gguf").is_symlink()
    assert invoke("rm", "org/repo:Q4_0", "-y").exit_code == 0
    assert not (snapshot / "m-Q4_0.gguf").is_symlink()
    assert invoke("rm", "org/repo:Q8_0", "-y").exit_code == 0
    assert not (snapshot / "m-Q8_0.gguf").is_symlink()
    assert not (newer / "m-Q8_0.gguf").is_symlink()


def test_what_rm_does_not_remove(machine):
    folder, _, files = machine
    before = sorted(p for p in folder.rglob("*"))
    for ref, said in (
        (files["studio"], "is a path"),
        (folder, "is a path"),
        ("org/other", "is not in Hugging Face's cache"),
        ("org/repo:Q2_K", "is not there"),
        ("org/repo@main", "leave out @main"),
        ("org/repo@main:Q4_0", "leave out @main"),
        ("../x", "no such file"),
    ):
        result = invoke("rm", ref, "--yes")
        assert result.exit_code == 1, ref
        assert said in result.stderr
    assert sorted(p for p in folder.rglob("*")) == before


def test_pull_prints_where_it_is(machine, monkeypatch):
    _, snapshot, _ = machine
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    result = invoke("pull", "org/repo:Q8_0")
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{snapshot / 'm-Q8_0.gguf'}\n"
