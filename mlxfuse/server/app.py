"""The HTTP server: an ASGI application over the engine, and the process's part around it."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import AsyncGenerator, AsyncIterator, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from functools import partial
from typing import Any

import uvicorn
from mlx_lm.tokenizer_utils import TokenizerWrapper
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from ..generate.run import Settings, add_eos_tokens
from ..nn.kv.options import compress_caches
from ..ranks import Ranks
from . import anthropic
from .anthropic import MessagesRequest
from .engine import Engine
from .gate import Gate
from .jobs import Event, Job, Limits
from .listener import bind
from .prompts import Plan, Planner
from .replies import Reply, error_body
from .requests import ChatRequest, CompletionRequest, RequestError, parse, read_body
from .text import Piece

log = logging.getLogger(__name__)

# Answers that are generated or wait; more are refused.
MAX_ANSWERS = 1024
_PATHS = (
    "there are POST /v1/chat/completions, /v1/completions, /v1/messages and "
    "/v1/messages/count_tokens, and GET /v1/models and /health"
)
# Seconds without anything to send after which a stream says that it lives.
_SILENCE = 10.0


class Answers:
    """The pieces of a plan's answers, as the engine delivers them.

    Leaving it, with all answers or without, cancels what still runs.
    """

    def __init__(self, engine: Engine, plan: Plan) -> None:
        loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._left = set(range(plan.count))

        def deliver(index: int, event: Event) -> None:
            try:
                loop.call_soon_threadsafe(self._queue.put_nowait, (index, event))
            except RuntimeError:  # the loop has ended, and the client with it
                self.jobs[index].cancelled = True

        self.jobs: list[Job] = [plan.make(i, partial(deliver, i)) for i in range(plan.count)]
        engine.submit(*self.jobs)

    def done(self, index: int) -> None:
        """This answer needs no more."""
        self._left.discard(index)
        self.jobs[index].cancelled = True

    async def pieces(
        self, silence: float | None = None
    ) -> AsyncGenerator[tuple[int, Piece] | None]:
        """(answer, piece) until all are whole; None after each ``silence`` seconds of nothing.

        Raises:
            RequestError: an answer failed.
        """
        try:
            while self._left:
                try:
                    index, event = await asyncio.wait_for(self._queue.get(), silence)
                except TimeoutError:
                    yield None
                    continue
                if isinstance(event, Exception):
                    raise RequestError(str(event), status=500) from event
                if index not in self._left:
                    continue
                if event.finish is not None:
                    self._left.discard(index)
                yield index, event
        finally:
            for job in self.jobs:
                job.cancelled = True


class Application:
    """Routes, and what they share: one model behind an engine and a planner."""

    def __init__(
        self,
        engine: Engine,
        planner: Planner,
        tokenizer: TokenizerWrapper,
        name: str,
        details: dict[str, Any],
    ) -> None:
        self._engine, self._planner, self._tokenizer = engine, planner, tokenizer
        self._name = name
        self._details = {"context_length": planner.context, **details}
        # Templates and tokenizers are for one thread at a time, and not for the event loop's.
        self._worker = ThreadPoolExecutor(1, "mlxfuse-planner")

    def routes(self) -> list[Route]:
        """Each path also without the version in front, as llama.cpp and MLX-LM have it."""
        posts = {
            "/chat/completions": self.chat,
            "/completions": self.completions,
            "/messages": self.messages,
            "/messages/count_tokens": self.count_tokens,
        }
        found = [
            Route(prefix + path, handler, methods=["POST"])
            for path, handler in posts.items()
            for prefix in ("/v1", "")
        ]
        for prefix in ("/v1", ""):
            found.append(Route(f"{prefix}/models", self.models))
            found.append(Route(f"{prefix}/models/{{name:path}}", self.model))
        return [*found, Route("/health", self.health)]

    async def chat(self, request: Request) -> Response:
        """``/v1/chat/completions``."""
        body = parse(ChatRequest, read_body(await request.body()))
        return await self._openai(request, body, await self._plan(self._planner.chat, body))

    async def completions(self, request: Request) -> Response:
        """``/v1/completions``."""
        body = parse(CompletionRequest, read_body(await request.body()))
        return await self._openai(request, body, await self._plan(self._planner.completion, body))

    async def _openai(self, request: Request, body: Any, plan: Plan) -> Response:
        reply = Reply(body, plan, self._tokenizer, self._name)
        return await self._answer(request, reply, plan, body.stream)

    async def messages(self, request: Request) -> Response:
        """``/v1/messages``."""
        body = parse(MessagesRequest, read_body(await request.body()), anthropic.IGNORED)
        if body.max_tokens is None:
            raise RequestError("max_tokens: Field required", param="max_tokens")
        plan = await self._plan(self._planner.chat, body.chat())
        reply = anthropic.Reply(plan, self._tokenizer, self._name)
        return await self._answer(request, reply, plan, body.stream)

    async def count_tokens(self, request: Request) -> Response:
        """``/v1/messages/count_tokens``."""
        body = parse(MessagesRequest, read_body(await request.body()), anthropic.IGNORED)
        plan = await self._plan(self._planner.chat, body.chat())
        return JSONResponse({"input_tokens": len(plan.prompts[0])})

    async def models(self, request: Request) -> Response:
        """``/v1/models``: the one that is served."""
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def model(self, request: Request) -> Response:
        """``/v1/models/NAME``."""
        if request.path_params["name"] != self._name:
            raise RequestError(
                f"the model served is {self._name!r}", code="model_not_found", status=404
            )
        return JSONResponse(self._model())

    def _model(self) -> dict[str, Any]:
        head = {"id": self._name, "object": "model", "created": 0, "owned_by": "mlxfuse"}
        return head | self._details

    async def health(self, request: Request) -> Response:
        """``/health``: whether requests are answered."""
        if not self._engine.alive:
            return JSONResponse({"status": "unavailable"}, 503)
        return JSONResponse({"status": "ok"})

    async def _plan(self, plan: Any, body: Any) -> Plan:
        if not self._engine.alive:
            raise RequestError("the model no longer computes", status=503)
        loop = asyncio.get_running_loop()
        made: Plan = await loop.run_in_executor(self._worker, plan, body)
        if self._engine.running + made.count > MAX_ANSWERS:
            raise RequestError("too many requests wait already", status=503)
        return made

    async def _answer(
        self, request: Request, reply: Reply | anthropic.Reply, plan: Plan, stream: bool
    ) -> Response:
        if stream:
            return StreamingResponse(self._stream(reply, plan), media_type="text/event-stream")
        collect = asyncio.ensure_future(self._collect(reply, plan))
        gone = asyncio.ensure_future(_disconnected(request))
        try:
            await asyncio.wait((collect, gone), return_when=asyncio.FIRST_COMPLETED)
            if not collect.done():
                return Response(status_code=499)  # nobody reads it
            return JSONResponse(await collect)
        finally:
            for task in (collect, gone):
                task.cancel()

    async def _collect(self, reply: Reply | anthropic.Reply, plan: Plan) -> dict[str, Any]:
        answers = Answers(self._engine, plan)
        async with aclosing(answers.pieces()) as pieces:
            async for found in pieces:
                assert found is not None
                index, piece = found
                reply.answers[index].feed(piece)
                if reply.answers[index].finish is not None:
                    answers.done(index)
        return reply.whole()

    async def _stream(self, reply: Reply | anthropic.Reply, plan: Plan) -> AsyncIterator[bytes]:
        answers = Answers(self._engine, plan)
        try:
            async with aclosing(answers.pieces(_SILENCE)) as pieces:
                yield b"".join(reply.begin())
                async for found in pieces:
                    if found is None:
                        yield b": still at work\n\n"
                        continue
                    index, piece = found
                    parts = reply.answers[index].feed(piece)
                    if reply.answers[index].finish is not None:
                        answers.done(index)
                    if sent := b"".join(reply.parts(index, parts)):
                        yield sent
            yield b"".join(reply.end())
        except RequestError as error:
            yield b"".join(reply.failed(error))


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _error_response(request: Request, error: Exception) -> Response:
    if isinstance(error, HTTPException):
        asked = f"{request.method} {request.url.path}: {error.detail}"
        error = RequestError(f"{asked}; {_PATHS}", status=error.status_code)
    if not isinstance(error, RequestError):
        log.error("a request failed", exc_info=error)
        error = RequestError(f"the server failed: {type(error).__name__}", status=500)
    return JSONResponse(_body(request.url.path, error), error.status)


def _body(path: str, error: RequestError) -> dict[str, Any]:
    """The form of an error that the clients of this path read."""
    of = anthropic.error_body if "/messages" in path else error_body
    return of(error)


def _check(model: Any, tokenizer: TokenizerWrapper, settings: Settings, draft: Any) -> None:
    """What the settings ask of the model, refused before any request.

    Raises:
        MLXFuseError: the model cannot do with compressed caches, or has no such token.
    """
    add_eos_tokens(tokenizer, settings.extra_eos_token)
    settings.logits_processors(tokenizer)  # a bias of no token is refused before any request
    if settings.kv is not None:
        for each in (model, *([] if draft is None else [draft])):
            compress_caches(each, settings.kv, settings.quantized_kv_start, force=settings.kv_force)


def _engine(
    model: Any, tokenizer: TokenizerWrapper, settings: Settings, limits: Limits | None, **more: Any
) -> Engine:
    later: dict[str, Any] = {}
    if settings.kv is not None and settings.quantized_kv_start:
        # Caches that begin plain: mlx-lm asks them to become compressed, in no batch.
        start = settings.quantized_kv_start
        later = {"kv_bits": settings.kv.v_bits, "quantized_kv_start": start}
    drafts = settings.num_draft_tokens
    return Engine(
        model, tokenizer, limits or Limits(), num_draft_tokens=drafts, later=later, **more
    )


def follow(
    model: Any, tokenizer: TokenizerWrapper, settings: Settings, limits: Limits, team: Ranks
) -> None:
    """Do the steps of rank 0's `Server` until it ends, as another rank.

    Raises:
        MLXFuseError: the model no longer computes.
    """
    _check(model, tokenizer, settings, None)
    engine = _engine(model, tokenizer, settings, limits, team=team)
    engine.wait()
    engine.expect_alive()


class Server:
    """Listens as soon as it is made; ``serve`` answers until ``stop``.

    Args:
        model, tokenizer: from ``mlxfuse.load``.
        name: what ``/v1/models`` calls the model.
        settings: what holds for requests that do not say otherwise; ``max_tokens`` -1 is the
            context that is left.
        host, port: where to listen; port 0 takes a free one, see ``address``.
        listener: a socket that `bind` made, in their place.
        api_key: what clients must send; None: nothing.
        allowed_origins: web pages that may use the server from a browser (CORS), ``*`` for all;
            none by default, since any page could otherwise.
        limits: see there.
        draft: a model for speculative decoding: requests are then answered one at a time.
        details: more that ``/v1/models`` tells.
        team: the ranks that hold the model together, of which this is the first; the others call
            `follow`.

    Raises:
        OSError: the address cannot be listened on.
        UnsupportedError: the model cannot do with compressed caches.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: TokenizerWrapper,
        name: str,
        settings: Settings,
        *,
        host: str = "127.0.0.1",
        port: int = 8080,
        listener: socket.socket | None = None,
        api_key: str | None = None,
        allowed_origins: Iterable[str] = (),
        limits: Limits | None = None,
        draft: Any = None,
        details: dict[str, Any] | None = None,
        team: Ranks | None = None,
    ) -> None:
        _check(model, tokenizer, settings, draft)
        self._socket = bind(host, port) if listener is None else listener
        self._socket.listen(128)
        self._engine = _engine(
            model, tokenizer, settings, limits, draft=draft, on_death=self.stop, team=team
        )
        planner = Planner(model, tokenizer, settings, self._engine.needs_boundaries)
        application = Application(self._engine, planner, tokenizer, name, details or {})
        origins = tuple(allowed_origins)
        cors = Middleware(
            CORSMiddleware, allow_origins=origins, allow_methods=["*"], allow_headers=["*"]
        )
        gate = Middleware(Gate, key=api_key, origins=origins, host=host, body=_body)
        kinds: tuple[Any, ...] = (RequestError, HTTPException, 500)
        self.app = Starlette(
            routes=application.routes(),
            middleware=[cors, gate] if origins else [gate],
            exception_handlers=dict.fromkeys(kinds, _error_response),
        )
        config = uvicorn.Config(
            self.app,
            log_config=None,
            access_log=log.isEnabledFor(logging.INFO),
            server_header=False,
            lifespan="off",
            timeout_keep_alive=30,
            timeout_graceful_shutdown=30,
        )
        self._uvicorn = uvicorn.Server(config)

    @property
    def address(self) -> str:
        """Where it listens, for example ``http://127.0.0.1:8080``."""
        host, port = self._socket.getsockname()[:2]
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    def serve(self) -> None:
        """Answer requests until ``stop``, Ctrl-C or SIGTERM; what has begun is answered first.

        Raises:
            MLXFuseError: the model no longer computes.
        """
        try:
            asyncio.run(self._uvicorn.serve(sockets=[self._socket]))
        finally:
            self._socket.close()
            self._engine.close()
        self._engine.expect_alive()

    def stop(self) -> None:
        """Let ``serve`` return; from any thread."""
        self._uvicorn.should_exit = True
