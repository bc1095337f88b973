"""Who may call, and how much they may send: what is checked of every request, before its path."""

from __future__ import annotations

import hmac
import ipaddress
import json
import socket
from collections.abc import Callable
from typing import Any
from urllib.parse import SplitResult, urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .requests import RequestError

# Bytes of a request's body that are read: a conversation, not an upload.
BODY_LIMIT = 16 << 20


class Gate:
    """Refuses what does not come from a program that its user means to call this server.

    A web page may make a browser send it requests: with ``Origin`` the page's own, and, where the
    page's name was bound to this machine's address, with that name as ``Host``.

    Args:
        key: what ``Authorization: Bearer`` or ``x-api-key`` must give; None: nothing.
        origins: web pages that may call, ``*`` for all.
        host: the name that the server was told to listen at.
        body: the form of an error for a path.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        key: str | None,
        origins: tuple[str, ...],
        host: str,
        body: Callable[[str, RequestError], dict[str, Any]],
    ) -> None:
        self._app, self._body = app, body
        self._key = None if key is None else key.encode()
        self._origins = origins
        self._names = {host.lower(), "localhost", socket.gethostname().lower()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI application."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            headers = Headers(scope=scope)
            self._check(scope, headers)
            length = headers.get("content-length", "0")
            if not length.isdecimal() or int(length) > BODY_LIMIT:
                raise _too_long()
        except RequestError as error:
            await self._refuse(scope, send, error)
            return
        await self._app(scope, _limited(receive), send)

    def _check(self, scope: Scope, headers: Headers) -> None:
        host = headers.get("host", "")
        if host and not self._ours(_split(f"//{host}").hostname or ""):
            raise RequestError(
                f"Host: {host[:100]!r} is not a name of this server; use its address, or localhost",
                status=403,
            )
        origin = headers.get("origin")
        same = origin is not None and _split(origin).netloc == host
        if origin is not None and not same and not {origin, "*"} & set(self._origins):
            raise RequestError(
                f"web pages of {origin[:100]!r} may not call this server; --cors-origin allows it",
                status=403,
            )
        if self._key is not None and scope["path"] != "/health":
            bearer = headers.get("authorization", "").removeprefix("Bearer ")
            given = headers.get("x-api-key", bearer).strip().encode()
            if not hmac.compare_digest(given, self._key):
                raise RequestError(
                    "the API key is missing or wrong: send it as Authorization: Bearer KEY",
                    code="invalid_api_key",
                    status=401,
                )

    def _ours(self, name: str) -> bool:
        """Whether no one else can bind this name to an address of this machine."""
        try:
            ipaddress.ip_address(name)
            return True
        except ValueError:
            # Names without a dot, and .internal (containers'), are not for sale.
            name = name.lower().rstrip(".")
            known = name in self._names or name.removesuffix(".local") in self._names
            return (
                known
                or ("." not in name and name != "")
                or name.endswith((".localhost", ".internal"))
            )

    async def _refuse(self, scope: Scope, send: Send, error: RequestError) -> None:
        body = json.dumps(self._body(scope["path"], error)).encode()
        headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
        headers.append((b"content-length", str(len(body)).encode()))
        await send({"type": "http.response.start", "status": error.status, "headers": headers})
        await send({"type": "http.response.body", "body": body})


def _split(url: str) -> SplitResult:
    """Its parts; those of no address where it is none."""
    try:
        return urlsplit(url)
    except ValueError:
        return urlsplit("")


def _too_long() -> RequestError:
    return RequestError(f"the body is too long: at most {BODY_LIMIT:,} bytes", status=413)


def _limited(receive: Receive) -> Receive:
    """Of a body that comes in chunks, and does not say how long it is."""
    read = 0

    async def limited() -> Message:
        nonlocal read
        message = await receive()
        read += len(message.get("body", b""))
        if read > BODY_LIMIT:
            raise _too_long()
        return message

    return limited
