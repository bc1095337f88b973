"""mlx-lm's OpenAI-compatible HTTP server with one model of ours."""

from __future__ import annotations

import argparse
import json
from http.server import ThreadingHTTPServer
from typing import Any

from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.server import (
    APIHandler,
    LRUPromptCache,
    ModelProvider,
    ResponseGenerator,
    get_system_fingerprint,
)
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..nn.kv.options import compress_caches
from ..text.generate import Settings
from ..text.sampling import suppressed

# Bytes of a request's body that are read: a conversation, not an upload.
BODY_LIMIT = 64 << 20


class Provider(ModelProvider):
    """Gives the model it was made with, whatever a request asks for.

    mlx-lm's own downloads what a request names; llama.cpp's server ignores the name, as we do.
    """

    def __init__(self, arguments: argparse.Namespace, model: Any, tokenizer: Any) -> None:
        super().__init__(arguments)
        self.model, self.tokenizer = model, tokenizer
        self.model_key = (arguments.model, None, None)
        self.is_batchable = all(hasattr(cache, "merge") for cache in make_prompt_cache(model))

    def load(
        self, model_path: str, adapter_path: str | None = None, draft_model_path: str | None = None
    ) -> tuple[Any, TokenizerWrapper]:
        """The pair; adapters and draft models are not served."""
        return self.model, self.tokenizer


class Handler(APIHandler):
    """mlx-lm's, without what it would do for a model that is not ours."""

    logit_bias: dict[int, float] | None

    def handle_models_request(self) -> None:
        """``/v1/models``: the one model, not the folder of the user's downloads."""
        name = self.response_generator.cli_args.model
        entry = {"id": name, "object": "model", "created": self.created, "owned_by": "mlxfuse"}
        self._send(200, {"object": "list", "data": [entry]})

    def validate_model_parameters(self) -> None:
        """And suppress what the file wants suppressed, whatever bias the request gives it."""
        super().validate_model_parameters()
        never = suppressed(self.response_generator.model_provider.tokenizer)
        self.logit_bias = {**(self.logit_bias or {}), **never}

    def do_POST(self) -> None:
        """Refuse a body that is too long before it is read."""
        length = self.headers.get("Content-Length") or "0"
        if not length.isdecimal() or int(length) > BODY_LIMIT:
            self.close_connection = True
            self._send(413, {"error": f"Content-Length: expected at most {BODY_LIMIT} bytes"})
            return
        super().do_POST()

    def _send(self, status: int, answer: dict[str, Any]) -> None:
        body = json.dumps(answer).encode()
        self._set_completion_headers(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


class Server:
    """Listens as soon as it is made; ``serve`` answers until ``stop``.

    Args:
        model, tokenizer: from ``mlxfuse.load``.
        name: what ``/v1/models`` calls the model.
        settings: what holds for requests that do not say otherwise.
        host, port: where to listen; port 0 takes a free one, see ``address``.
        allowed_origins: web pages that may use the server from a browser (CORS); none by
            default, since any page could otherwise.
        prompt_caches: conversations whose prompt caches are kept.

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
        allowed_origins: tuple[str, ...] = (),
        prompt_caches: int = 10,
    ) -> None:
        if settings.kv is not None:
            start = settings.quantized_kv_start
            compress_caches(model, settings.kv, start, force=settings.kv_force)
        # What mlx_lm.server's own command line gives, under its names.
        arguments = argparse.Namespace(
            model=name,
            adapter_path=None,
            draft_model=None,
            num_draft_tokens=settings.num_draft_tokens,
            trust_remote_code=False,
            chat_template="",
            use_default_chat_template=False,
            chat_template_args=dict(settings.chat_template_config),
            allowed_origins=list(allowed_origins),
            temp=settings.temp,
            top_p=settings.top_p,
            top_k=settings.top_k,
            min_p=settings.min_p,
            max_tokens=settings.max_tokens,
            decode_concurrency=32,
            prompt_concurrency=8,
            prefill_step_size=settings.prefill_step_size,
            prompt_cache_size=prompt_caches,
            prompt_cache_bytes=None,
            # Caches that begin plain: mlx-lm asks them to become compressed, in no batch.
            kv_bits=settings.kv.v_bits if settings.kv and settings.quantized_kv_start else None,
            kv_group_size=64,
            quantized_kv_start=settings.quantized_kv_start,
            pipeline=False,
        )

        def handler(*args: Any) -> Handler:
            return Handler(self._generator, *args, system_fingerprint=get_system_fingerprint())

        self._http = ThreadingHTTPServer((host, port), handler)
        self._http.daemon_threads = True
        provider = Provider(arguments, model, tokenizer)
        self._generator = ResponseGenerator(provider, LRUPromptCache(prompt_caches))

    @property
    def address(self) -> str:
        """Where it listens, for example ``http://127.0.0.1:8080``."""
        host, port = self._http.server_address[:2]
        return f"http://{host if isinstance(host, str) else host.decode()}:{port}"

    def serve(self) -> None:
        """Answer requests until ``stop`` or Ctrl-C."""
        try:
            self._http.serve_forever()
        finally:
            self._http.server_close()
            self._generator.stop_and_join()

    def stop(self) -> None:
        """Let ``serve`` return; from another thread."""
        self._http.shutdown()
