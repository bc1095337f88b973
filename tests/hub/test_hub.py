"""References to models: paths, and repositories of a hub on 127.0.0.1."""

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from mlxfuse.errors import DownloadError, ModelRefError
from mlxfuse.hub import folders
from mlxfuse.hub import resolve as hub
from mlxfuse.hub.download import fetch

from .server import serve

COMMIT = "a" * 40
OTHER = "b" * 40
BODY = b"GGUF" + bytes(i * 11 % 253 for i in range(300_000))


# --- what a reference means -------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "ref"),
    [
        ("org/repo", ("org/repo", None, None)),
        ("org/repo:q4_k_m", ("org/repo", None, "q4_k_m")),
        ("org/repo@v1.0:Q8_0", ("org/repo", "v1.0", "Q8_0")),
        ("org/repo@refs/pr/3", ("org/repo", "refs/pr/3", None)),
        ("org/repo:sub/model-Q4_0.gguf", ("org/repo", None, "sub/model-Q4_0.gguf")),
        ("hf.co/org/repo:Q4_0", ("org/repo", None, "Q4_0")),
        ("hf:org/repo", ("org/repo", None, None)),
        ("hf://org/repo", ("org/repo", None, None)),
        ("https://huggingface.co/org/Some.Repo-GGUF/", ("org/Some.Repo-GGUF", None, None)),
        (
            "https://huggingface.co/org/repo/blob/main/m-Q4_0.gguf?download=true",
            ("org/repo", "main", "m-Q4_0.gguf"),
        ),
        ("hf.co/org/repo.gguf", ("org/repo.gguf", None, None)),
    ],
)
def test_parse(text, ref):
    assert hub.parse(text) == hub.Ref(*ref)


@pytest.mark.parametrize(
    "text",
    ["nosuch.gguf", "models/nosuch.gguf", "/a/b", "./a/b", "../a", "~/m.gguf", "a/b/c", "org", "",
     "a\\b", "org/../x", "-/x", "org/repo:", "\x1b[31m/x", "a" * 10_000],
)  # fmt: skip
def test_neither_a_file_nor_a_repository(text):
    with pytest.raises(ModelRefError, match="no such file") as caught:
        hub.resolve(text)
    assert caught.value.exit_code == 1
    assert "\x1b" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_a_path_that_exists_wins(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("org").mkdir()
    Path("org/repo").write_bytes(BODY)
    assert hub.resolve("org/repo") == Path("org/repo")


def test_only_regular_files(tmp_path):
    with pytest.raises(ModelRefError, match="has no model"):
        hub.resolve(str(tmp_path))
    os.mkfifo(tmp_path / "pipe.gguf")
    with pytest.raises(ModelRefError, match="not a regular file"):
        hub.resolve(str(tmp_path / "pipe.gguf"))
    with pytest.raises(ModelRefError, match="not a regular file"):
        hub.resolve("/dev/null")


def test_a_revision_needs_a_repository(tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(BODY)
    with pytest.raises(ModelRefError, match="revision"):
        hub.resolve(str(path), revision="main")
    with pytest.raises(ModelRefError, match="two revisions"):
        hub.resolve("org/repo@v1", revision="v2")


# --- which of a repository's files ------------------------------------------------------

LISTING = [
    "README.md",
    "mmproj-F16.gguf",
    "mmproj-model-Q4_K_M.gguf",
    "imatrix_unsloth.gguf",
    "model-imatrix.gguf",
    "MTP/model-Q4_K_M.gguf",
    "model-draft-Q4_K_M.gguf",
    "model-UD-Q4_K_M.gguf",
    "model-UD-Q2_K_XL.gguf",
    "model-Q4_K_M.gguf",
    "model-Q4_0.gguf",
    "model.i1-IQ3_XXS.gguf",
    "BF16/model-BF16-00002-of-00002.gguf",
    "BF16/model-BF16-00001-of-00002.gguf",
    "Q8_0/model-Q8_0-00001-of-00003.gguf",
    "Q8_0/model-Q8_0-00003-of-00003.gguf",
    "../../evil-Q6_K.gguf",
    "/etc/evil-Q6_K.gguf",
    "a\\evil-Q6_K.gguf",
    "evil\x1b[31m-Q6_K.gguf",
]


def pick(choice, names=LISTING):
    return folders.choose("org/repo", choice, names)


@pytest.mark.parametrize(
    ("choice", "files"),
    [
        (None, ["model-Q4_K_M.gguf"]),
        ("q4_k_m", ["model-Q4_K_M.gguf"]),
        ("UD-Q4_K_M", ["model-UD-Q4_K_M.gguf"]),
        ("ud-q2_k_xl", ["model-UD-Q2_K_XL.gguf"]),
        ("IQ3_XXS", ["model.i1-IQ3_XXS.gguf"]),
        (
            "bf16",
            ["BF16/model-BF16-00001-of-00002.gguf", "BF16/model-BF16-00002-of-00002.gguf"],
        ),
        ("Model-Q4_0.gguf", ["model-Q4_0.gguf"]),
        # Named in full, a draft model is taken: --draft-model needs it.
        ("model-draft-Q4_K_M.gguf", ["model-draft-Q4_K_M.gguf"]),
    ],
)
def test_choose(choice, files):
    assert list(pick(choice)) == files


@pytest.mark.parametrize("choice", ["Q2_K_XL", "Q8_0", "Q6_K", "mmproj", "Q3_K"])
def test_what_is_not_there_lists_what_is(choice):
    with pytest.raises(ModelRefError) as caught:
        pick(choice)
    message = str(caught.value)
    assert message.split("among")[1].split() == [
        "BF16", "IQ3_XXS", "Q4_0", "Q4_K_M", "UD-Q2_K_XL", "UD-Q4_K_M",
    ]  # fmt: skip
    assert "evil" not in message


def test_the_default_is_only_for_one_or_q4_k_m():
    assert pick(None, ["a-Q8_0.gguf", "mmproj-F16.gguf"]) == ("a-Q8_0.gguf",)
    with pytest.raises(ModelRefError, match=r"Q4_K_M is not there.*\n  Q6_K\n  Q8_0"):
        pick(None, ["a-Q8_0.gguf", "a-Q6_K.gguf"])
    with pytest.raises(ModelRefError, match=r"several.*\n  a-Q4_K_M.gguf\n  b-Q4_K_M.gguf"):
        pick(None, ["a-Q4_K_M.gguf", "b-Q4_K_M.gguf"])
    with pytest.raises(ModelRefError, match="no complete GGUF model"):
        pick(None, ["model.safetensors", "x-00001-of-00002.gguf"])


def test_a_hostile_listing_costs_nothing():
    start = time.thread_time()
    names = [f"m-{i:05}-of-99999.gguf" for i in range(20_000)]
    names += ["Q" * 5_000 + ".gguf", "-" * 5_000 + "Q4_K.gguf", "Q4" + "_A" * 5_000 + "!.gguf"]
    with pytest.raises(ModelRefError):
        pick(None, names)
    assert time.thread_time() - start < 2


# --- a hub ------------------------------------------------------------------------------


@pytest.fixture
def fake():
    with serve() as server:
        yield server


def publish(server, files, commit=COMMIT, repo="org/repo", revisions=("main",)):
    listing = {
        "id": repo,
        "modelId": repo,
        "sha": commit,
        "siblings": [{"rfilename": name} for name in files],
    }
    server.add(f"/api/models/{repo}", listing)
    for revision in (*revisions, commit):
        server.add(f"/api/models/{repo}/revision/{revision}", listing)
    for name, body in files.items():
        digest = hashlib.sha256(body).hexdigest()
        # Only the commit's own address exists: a branch could move between two shards.
        path = f"/{repo}/resolve/{commit}/{name}"
        server.add(path, body, headers={"ETag": f'"{digest}"', "X-Repo-Commit": commit})


DRIVER = """
import sys
from mlxfuse.hub import download
from mlxfuse.hub import resolve as hub
from mlxfuse.errors import MLXFuseError
download.CHUNK = 4096
try:
    print(hub.resolve(*sys.argv[1:]))
except MLXFuseError as error:
    print(error, file=sys.stderr)
    raise SystemExit(error.exit_code)
"""


@pytest.fixture
def start(fake, tmp_path):
    """Resolve a reference in a process of its own: the hub's variables are read at import."""

    def run(ref, **more):
        env = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
        env |= {"HF_ENDPOINT": fake.url, "HF_HOME": str(tmp_path / "hf"), "NO_PROXY": "127.0.0.1"}
        env |= {"PYTHONPATH": str(Path(hub.__file__).parents[2])} | more
        return subprocess.Popen(
            [sys.executable, "-c", DRIVER, ref],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return run


def finish(process):
    out, err = process.communicate(timeout=60)
    assert "Traceback" not in err
    return process.returncode, out.strip(), err


def test_download_into_the_shared_cache_then_offline(fake, start, tmp_path):
    publish(fake, {"m-Q4_K_M.gguf": BODY, "m-Q8_0.gguf": b"no"})
    code, out, err = finish(start("org/repo:q4_k_m", HF_TOKEN="hf_secret"))
    assert code == 0, err
    path = Path(out)
    assert path.read_bytes() == BODY
    snapshot = f"hf/hub/models--org--repo/snapshots/{COMMIT}/m-Q4_K_M.gguf"
    assert path == tmp_path / snapshot
    file_path = f"/org/repo/resolve/{COMMIT}/m-Q4_K_M.gguf"
    assert [h["authorization"] for h in fake.seen(file_path)] == ["Bearer hf_secret"]
    assert not list(tmp_path.rglob("*.part"))
    # Again: asked for its commit, downloaded no more.
    assert finish(start("org/repo"))[:2] == (0, out)
    assert len(fake.seen(file_path)) == 1
    # Offline: nothing is asked at all.
    count = len(fake.requests)
    assert finish(start("org/repo:Q4_K_M", HF_HUB_OFFLINE="1"))[:2] == (0, out)
    code, out, err = finish(start("org/repo:Q8_0", HF_HUB_OFFLINE="1"))
    assert (code, out) == (5, "")
    assert "not in the cache" in err
    assert len(fake.requests) == count


def test_every_shard_comes_from_one_commit(fake, start):
    names = [f"m-Q8_0-{i:05}-of-00003.gguf" for i in (1, 2, 3)]
    publish(fake, dict.fromkeys(names, BODY) | {names[1]: BODY + b"2"}, revisions=("v1",))
    code, out, err = finish(start("org/repo@v1:Q8_0"))
    assert code == 0, err
    folder = Path(out).parent
    assert folder.name == COMMIT
    assert Path(out).name == names[0]
    assert (folder / names[1]).read_bytes() == BODY + b"2"
    assert sorted(p.name for p in folder.iterdir()) == names


def test_a_killed_download_is_continued(fake, start, tmp_path):
    publish(fake, {"m-Q4_K_M.gguf": BODY})
    url = f"/org/repo/resolve/{COMMIT}/m-Q4_K_M.gguf"
    fake.pages[url].pause = 0.05
    process = start("org/repo")
    deadline = time.monotonic() + 60
    while not (part := sum(p.stat().st_size for p in tmp_path.rglob("*.part"))) > 40_000:
        assert time.monotonic() < deadline, "nothing was downloaded"
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    (part,) = tmp_path.rglob("*.part")
    kept = part.stat().st_size
    fake.pages[url].pause = 0
    code, out, err = finish(start("org/repo"))
    assert code == 0, err
    assert Path(out).read_bytes() == BODY
    assert [h.get("range") for h in fake.seen(url)] == [None, f"bytes={kept}-"]
    assert not list(tmp_path.rglob("*.part"))


def test_content_that_is_not_what_the_hub_promised(fake, start, tmp_path):
    publish(fake, {"m-Q4_K_M.gguf": BODY})
    fake.pages[f"/org/repo/resolve/{COMMIT}/m-Q4_K_M.gguf"].body = BODY[:-1] + b"!"
    code, out, err = finish(start("org/repo"))
    assert (code, out) == (5, "")
    assert "expected sha256" in err
    assert not [p for p in tmp_path.rglob("*") if p.is_file() and b"GGUF" in p.read_bytes()]


@pytest.mark.parametrize(
    ("status", "headers", "message"),
    [
        (404, {"X-Error-Code": "RepoNotFound"}, "no such repository"),
        (401, {}, "HF_TOKEN"),
        (403, {"X-Error-Code": "GatedRepo"}, "gated"),
        (404, {"X-Error-Code": "RevisionNotFound"}, "no revision v9"),
        (500, {}, "500"),
    ],
)
def test_refusals(fake, start, status, headers, message):
    fake.add(
        "/api/models/org/repo/revision/v9", b"{}", status=status, headers=headers, kind="text/plain"
    )
    code, out, err = finish(start("org/repo@v9"))
    assert (code, out) == (5, ""), err
    assert message in err


def test_what_begins_in_a_folder_is_a_path(tmp_path, monkeypatch):
    """A misspelt path is not asked of a hub, whatever it looks like."""
    monkeypatch.chdir(tmp_path)
    assert hub.parse("k/out").repo == "k/out"
    Path("k").mkdir()
    with pytest.raises(ModelRefError, match="k/out: no such file"):
        hub.resolve("k/out")


def test_an_unreachable_hub_falls_back_to_the_cache(fake, start):
    publish(fake, {"m-Q4_K_M.gguf": BODY})
    _, out, _ = finish(start("org/repo"))
    assert finish(start("org/repo:Q4_K_M", HF_ENDPOINT="http://127.0.0.1:9"))[:2] == (0, out)
    fake.add("/api/models/org/repo", "{}", status=503)
    assert finish(start("org/repo"))[:2] == (0, out)
    code, _, err = finish(start("org/repo:Q8_0", HF_ENDPOINT="http://127.0.0.1:9"))
    assert code == 5
    assert "not in the cache" in err


def test_a_repository_with_a_checkpoint(fake, start):
    index = b'{"weight_map": {"a": "model-1.safetensors"}}'
    files = {
        "config.json": b"{}",
        "model-1.safetensors": BODY,
        "model.safetensors.index.json": index,
        "tokenizer.json": b"{}",
        "x.py": b"raise SystemExit",
        "original/consolidated.safetensors": b"no",
    }
    publish(fake, files)
    code, out, err = finish(start("org/repo"))
    assert code == 0, err
    names = sorted(p.name for p in Path(out).iterdir())
    assert names == sorted(files.keys() - {"x.py", "original/consolidated.safetensors"})
    assert (Path(out) / "model-1.safetensors").read_bytes() == BODY
    assert finish(start("org/repo", HF_HUB_OFFLINE="1"))[:2] == (0, out)
    code, _, err = finish(start("org/repo:8bit"))
    assert code == 1
    assert "leave out what is behind the colon" in err
    # A checkpoint without one of its shards is not offered offline.
    (Path(out) / "model-1.safetensors").unlink()
    assert finish(start("org/repo", HF_HUB_OFFLINE="1"))[0] == 5


def test_an_unreachable_hub(start):
    code, out, err = finish(start("org/repo", HF_ENDPOINT="http://127.0.0.1:9"))
    assert (code, out) == (5, "")
    assert "cannot be reached" in err


@pytest.mark.parametrize("listing", [{}, {"sha": "../x"}, {"sha": COMMIT, "siblings": 3}, [], "x"])
def test_a_listing_that_is_none(fake, start, listing):
    import json

    fake.add("/api/models/org/repo", json.dumps(listing), kind="application/json")
    code, out, err = finish(start("org/repo"))
    assert (code in (1, 5), out) == (True, ""), err


def test_offline_without_any_cache(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "none"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(DownloadError, match="offline"):
        hub.resolve("org/repo")


@pytest.mark.parametrize(("free", "there", "fits"), [(99, 0, False), (100, 0, True),
                                                     (39, 60, False), (40, 60, True)])  # fmt: skip
def test_a_disk_without_room_is_told_before_anything_is_asked(
    free, there, fits, fake, tmp_path, monkeypatch
):
    body = bytes(range(100))
    fake.add("/file", body)
    target = tmp_path / "file"
    if there:
        (tmp_path / "file.part").write_bytes(body[:there])
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1000, 0, free))
    digest = hashlib.sha256(body).hexdigest()
    ask = partial(fetch, f"{fake.url}/file", target, size=100, sha256=digest, label="a model")
    if fits:
        ask()
        assert target.read_bytes() == body
        return
    with pytest.raises(DownloadError, match=rf"a model: {100 - there} bytes .*, {free} are free"):
        ask()
    assert not fake.requests
    assert not target.exists()
    assert (tmp_path / "file.part").read_bytes() == body[:there]
