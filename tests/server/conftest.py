"""Servers on 127.0.0.1, and clients for them."""

import threading
from contextlib import contextmanager

import anthropic
import openai

from mlxfuse.generate.run import Settings
from mlxfuse.server import Server


@contextmanager
def serving(model, tokenizer, settings=None, **more):
    """A server that answers, in a thread of its own."""
    settings = settings or Settings(max_tokens=-1)
    server = Server(model, tokenizer, "tiny", settings, port=0, **more)
    thread = threading.Thread(target=server.serve)
    thread.start()
    try:
        yield server
    finally:
        server.stop()
        thread.join(timeout=60)
        assert not thread.is_alive()


def openai_client(server, **more):
    given = {"api_key": "none", "max_retries": 0, "timeout": 60, **more}
    return openai.OpenAI(base_url=f"{server.address}/v1", **given)


def anthropic_client(server, **more):
    given = {"api_key": "none", "max_retries": 0, "timeout": 60, **more}
    return anthropic.Anthropic(base_url=server.address, **given)
