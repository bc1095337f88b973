"""Resumable, verified HTTP downloads; shared by the hub and the demo model."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Mapping
from io import BufferedRandom
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from .. import env
from ..errors import DownloadError

if TYPE_CHECKING:
    import requests

# Called as (label, bytes done, bytes in all).
Progress = Callable[[str, int, int], None]

CHUNK = 1 << 18
TIMEOUT = (10, 30)  # seconds to connect, seconds between two reads
RETRIES = 4  # attempts in a row that bring no byte before giving up


def public_url(url: str) -> str:
    """``url`` without the user, password and query that may hold secrets."""
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    return f"{parts.scheme}://{host}{parts.path}"


def session() -> requests.Session:
    """A session that honours the proxy and certificate variables that pip honours."""
    import requests

    result = requests.Session()
    result.headers["User-Agent"] = "mlxfuse"
    # REQUESTS_CA_BUNDLE and CURL_CA_BUNDLE are read by requests itself, and win.
    if bundle := env.ca_bundle():
        result.verify = bundle
    return result


def fetch(
    url: str,
    target: Path,
    *,
    size: int,
    sha256: str,
    headers: Mapping[str, str] | None = None,
    label: str,
    progress: Progress | None = None,
) -> None:
    """Download ``url`` to ``target``; a partial file from an earlier run is continued.

    The bytes go to ``target`` + ``.part``, which is renamed only when it has ``size``
    bytes and that ``sha256`` (hex). Processes that want the same file take turns.

    Raises:
        DownloadError: the server cannot be reached or refuses, the disk is full, or the
            content is not what was promised (the partial file is then removed).
    """
    part = target.with_name(target.name + ".part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        while not target.exists():
            with part.open("a+b") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                # While this process waited, another may have finished or removed the file.
                if target.exists() or not _same_file(file, part):
                    continue
                free = shutil.disk_usage(target.parent).free
                missing = size - os.fstat(file.fileno()).st_size
                if free < missing:
                    raise DownloadError(
                        f"{label}: {missing:,} bytes are needed in {target.parent}, "
                        f"{free:,} are free"
                    )
                _fill(file, url, size, dict(headers or {}), label, progress)
                _verify(file, part, size, sha256, label)
                file.flush()
                os.fsync(file.fileno())
                part.replace(target)
    except OSError as error:
        raise DownloadError(f"{label}: cannot write {part}: {error.strerror or error}") from error


def _same_file(file: BufferedRandom, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _fill(
    file: BufferedRandom,
    url: str,
    size: int,
    headers: dict[str, str],
    label: str,
    progress: Progress | None,
) -> None:
    """Append to ``file`` until it has ``size`` bytes, reconnecting where a connection drops."""
    import requests

    transient = (
        requests.ConnectionError,
        requests.Timeout,
        requests.exceptions.ChunkedEncodingError,
    )
    failures = 0
    with session() as http:
        while (done := file.seek(0, os.SEEK_END)) < size:
            if progress:
                progress(label, done, size)
            try:
                _fill_once(http, file, url, size, headers, label, progress)
                problem: Exception | str = "the connection closed early"
            except transient as error:
                problem = error
            except requests.RequestException as error:
                raise DownloadError(f"{label}: {public_url(url)}: {error}") from error
            reached = file.seek(0, os.SEEK_END)
            failures = 0 if reached > done else failures + 1
            if failures >= RETRIES:
                raise DownloadError(
                    f"{label}: {public_url(url)} gave {reached:,} of {size:,} bytes ({problem}); "
                    "run the command again to continue where it stopped"
                )
            if reached < size:
                time.sleep(0.2 * 2**failures)


def _fill_once(
    http: requests.Session,
    file: BufferedRandom,
    url: str,
    size: int,
    headers: dict[str, str],
    label: str,
    progress: Progress | None,
) -> None:
    done = file.seek(0, os.SEEK_END)
    # A compressed transfer would make byte ranges count something else.
    wanted = headers | {"Accept-Encoding": "identity"}
    if done:
        wanted["Range"] = f"bytes={done}-"
    with http.get(url, headers=wanted, stream=True, timeout=TIMEOUT) as response:
        if response.status_code >= 400:
            raise DownloadError(
                f"{label}: {public_url(url)} answered {response.status_code} {response.reason}"
            )
        resumed = response.headers.get("Content-Range", "").startswith(f"bytes {done}-")
        if done and not (response.status_code == 206 and resumed):
            file.truncate(0)  # the server sends the file from its start
            done = 0
        for chunk in response.iter_content(CHUNK):
            done += len(chunk)
            if done > size:
                file.truncate(0)
                raise DownloadError(f"{label}: {public_url(url)} sends more than {size:,} bytes")
            file.write(chunk)
            if progress:
                progress(label, done, size)


def _verify(file: BufferedRandom, part: Path, size: int, sha256: str, label: str) -> None:
    """Refuse and remove a partial file that is complete but not what was promised."""
    file.flush()
    found_size = os.fstat(file.fileno()).st_size
    if found_size != size:
        part.unlink()
        raise DownloadError(f"{label}: expected {size:,} bytes, found {found_size:,}; try again")
    file.seek(0)
    found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256.lower():
        part.unlink()
        raise DownloadError(
            f"{label}: expected sha256 {sha256}, found {found}; the download was removed, try again"
        )
