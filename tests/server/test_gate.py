"""Who may call, and what is answered to what is no request."""

import http.client
import json
import socket
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from urllib.parse import urlsplit

import pytest

from mlxfuse.server.gate import BODY_LIMIT

from .conftest import serving
from .speaker import Speaker, tokenizer

ASK = {"prompt": "Hi", "max_tokens": 1}


@pytest.fixture(scope="module")
def made():
    tok = tokenizer()
    return Speaker(tok, ["x"]), tok


@pytest.fixture(scope="module")
def server(made):
    with serving(*made) as server:
        yield server


@pytest.fixture(scope="module")
def guarded(made):
    with serving(*made, api_key="s3cret", allowed_origins=("https://ours.example",)) as server:
        yield server


def send(server, body=ASK, path="/v1/completions", method="POST", **headers):
    """(status, JSON of the answer, its headers)."""
    u = urlsplit(server.address)
    connection = http.client.HTTPConnection(u.hostname, u.port, timeout=30)
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(method, path, raw, {"Content-Type": "application/json", **named})
    answer = connection.getresponse()
    text = answer.read()
    return answer.status, json.loads(text) if text else None, answer.headers


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Host": "localhost:1"}, 200),
        ({"Host": "127.0.0.1"}, 200),
        ({"Host": "[::1]:8080"}, 200),
        ({"Host": "192.168.1.7:8080"}, 200),
        ({"Host": "my-mac"}, 200),
        ({"Host": "host.docker.internal:8080"}, 200),
        ({"Host": "evil.example"}, 403),
        ({"Host": "localhost.evil.example"}, 403),
        ({"Host": "127.0.0.1.evil.example"}, 403),
        ({"Host": "a.local"}, 403),
        ({"Host": "["}, 403),
        ({"Origin": "http://["}, 403),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://evil.example", "Content_Type": "text/plain"}, 403),
        ({"Origin": "http://localhost:3000"}, 403),
        ({"Origin": "http://localhost:80", "Host": "localhost:80"}, 200),
    ],
    ids=str,
)
def test_hosts_and_origins(server, headers, status):
    got, body, _ = send(server, **headers)
    assert got == status
    if status == 403:
        assert body["error"]["type"] == "permission_error"


def test_an_allowed_page_gets_the_headers_it_needs(guarded):
    key = {"Authorization": "Bearer s3cret"}
    origin = {"Origin": "https://ours.example"}
    status, _, headers = send(guarded, **key, **origin)
    assert status == 200
    assert headers["Access-Control-Allow-Origin"] == "https://ours.example"
    asks = {"Access_Control_Request_Method": "POST", "Access_Control_Request_Headers": "x-api-key"}
    status, _, headers = (
        send(guarded, b"", method="OPTIONS", **origin, **asks)
        if False
        else (_preflight(guarded, {**origin, **asks}))
    )
    assert status == 200
    assert headers["Access-Control-Allow-Origin"] == "https://ours.example"
    assert "x-api-key" in headers["Access-Control-Allow-Headers"].lower()
    assert send(guarded, **key, Origin="https://evil.example")[0] == 403


def _preflight(server, headers):
    u = urlsplit(server.address)
    connection = http.client.HTTPConnection(u.hostname, u.port, timeout=30)
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request("OPTIONS", "/v1/completions", headers=named)
    answer = connection.getresponse()
    answer.read()
    return answer.status, None, answer.headers


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 401),
        ({"Authorization": "Bearer wrong"}, 401),
        ({"Authorization": "Bearer "}, 401),
        ({"Authorization": "Bearer s3cret"}, 200),
        ({"x_api_key": "s3cret"}, 200),
        ({"x_api_key": "s3cre\u00e9"}, 401),
    ],
    ids=str,
)
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/models", "/nowhere"])
def test_the_key(guarded, headers, status, path):
    method = "POST" if path == "/v1/completions" else "GET"
    got, body, _ = send(guarded, path=path, method=method, **headers)
    assert got == (404 if (path, status) == ("/nowhere", 200) else status)
    if got == 401:
        assert body["error"]["code"] == "invalid_api_key"


def test_health_needs_no_key(guarded):
    assert send(guarded, path="/health", method="GET")[:2] == (200, {"status": "ok"})


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/messages"])
@pytest.mark.parametrize(
    "body",
    [b"", b"\xff\xfe", b"{", b"[]", b"7", b"[" * 100_000, b'{"a":' * 9000, b'{"max_tokens": NaN}',
     b'{"messages": "\\ud800"}', b'{"seed": ' + b"9" * 5000 + b"}", b"{}", b"null"],
    ids=lambda b: repr(b[:12]),
)  # fmt: skip
def test_a_body_that_is_no_request(server, path, body):
    status, answer, _ = send(server, body, path)
    assert status == 400
    assert answer["error"]["type"] == "invalid_request_error"
    assert answer["error"]["message"]
    assert send(server)[0] == 200


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/v1/completions", 405), ("POST", "/v1/models", 405), ("GET", "/none", 404),
     ("PUT", "/v1/messages", 405), ("GET", "/v1/models/../../etc", 404)],
)  # fmt: skip
def test_other_paths_and_methods(server, method, path, status):
    got, body, _ = send(server, method=method, path=path)
    assert got == status
    assert "message" in body["error"]


def test_a_chunked_body(server):
    """Taken, and refused once it is too long."""
    u = urlsplit(server.address)

    def status(chunks):
        connection = http.client.HTTPConnection(u.hostname, u.port, timeout=30)
        connection.request("POST", "/v1/completions", chunks, encode_chunked=True)
        return connection.getresponse().status

    assert status(iter([b'{"prompt": "Hi", ', b'"max_tokens": 1}'])) == 200
    many = (b" " * (1 << 20) for _ in range((BODY_LIMIT >> 20) + 1))
    assert status(many) == 413


def test_no_request_makes_the_server_call_another(server):
    asked = []

    class Listener(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)

    other = HTTPServer(("127.0.0.1", 0), Listener)
    thread = threading.Thread(target=other.serve_forever)
    thread.start()
    try:
        url = f"http://127.0.0.1:{other.server_address[1]}/secret"
        image = {"type": "image_url", "image_url": {"url": url}}
        chat = {"messages": [{"role": "user", "content": [image]}]}
        assert send(server, chat, "/v1/chat/completions")[0] == 400
        source = {"type": "image", "source": {"type": "url", "url": url}}
        chat = {"messages": [{"role": "user", "content": [source]}], "max_tokens": 1}
        assert send(server, chat, "/v1/messages")[0] == 400
        form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"$ref": url}}}
        assert send(server, ASK | {"response_format": form})[0] == 400
    finally:
        other.shutdown()
        thread.join()
        other.server_close()
    assert asked == []


def test_half_a_request_keeps_nobody_waiting(server):
    u = urlsplit(server.address)
    with socket.create_connection((u.hostname, u.port)) as slow:
        slow.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Le")
        assert send(server)[0] == 200


def test_ipv6(made):
    if not socket.has_ipv6:
        pytest.skip("no IPv6 here")
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("no IPv6 here")
    with serving(*made, host="::1") as server:
        assert server.address.startswith("http://[::1]:")
        assert send(server)[0] == 200
