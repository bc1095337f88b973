"""An HTTP server on 127.0.0.1 for tests: files with byte ranges, and ways to fail."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Page:
    """What one path answers.

    cut     close the connection after that many bytes of the answer, for that many requests.
    pause   seconds between two 4 kB pieces.
    ranges  False: byte ranges are ignored.
    """

    body: bytes = b""
    kind: str = "application/octet-stream"
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    cut: tuple[int, int] = (0, 0)
    pause: float = 0.0
    ranges: bool = True


@dataclass
class Server:
    url: str
    pages: dict[str, Page]
    # (method, path, headers in lower case) of each request.
    requests: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)

    def add(self, path: str, body: bytes | dict | str, **more: object) -> None:
        if isinstance(body, dict):
            more.setdefault("kind", "application/json")
            body = json.dumps(body)
        if isinstance(body, str):
            body = body.encode()
        self.pages[path] = Page(body, **more)  # type: ignore[arg-type]

    def seen(self, path: str, method: str = "GET") -> list[dict[str, str]]:
        """The headers of each request for ``path``."""
        return [h for m, p, h in self.requests if (m, p) == (method, path)]


@contextmanager
def serve() -> Iterator[Server]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.answer(False)

        def do_GET(self) -> None:
            self.answer(True)

        def answer(self, with_body: bool) -> None:
            path = self.path.partition("?")[0]
            headers = {key.lower(): value for key, value in self.headers.items()}
            server.requests.append((self.command, path, headers))
            page = server.pages.get(path, Page(b"no such page", status=404))
            body, status = page.body, page.status
            start = 0
            asked = headers.get("range", "")
            if with_body and page.ranges and status == 200 and asked.startswith("bytes="):
                start, status = int(asked[6:].split("-")[0]), 206
            self.send_response(status)
            self.send_header("Content-Type", page.kind)
            for key, value in page.headers.items():
                self.send_header(key, value)
            if status == 206:
                self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
            self.send_header("Content-Length", str(len(body) - start))
            self.end_headers()
            if not with_body:
                return
            rest = body[start:]
            size, times = page.cut
            if times:
                page.cut = (size, times - 1)
                rest = rest[:size]
                self.close_connection = True
            try:
                for i in range(0, len(rest), 4096):
                    self.wfile.write(rest[i : i + 4096])
                    if page.pause:
                        time.sleep(page.pause)
            except (BrokenPipeError, ConnectionResetError):
                self.close_connection = True

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    httpd.daemon_threads = True
    server = Server(f"http://127.0.0.1:{httpd.server_address[1]}", {})
    thread = threading.Thread(target=httpd.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        httpd.shutdown()
        httpd.server_close()
        thread.join()
