"""The HTTP server: OpenAI's and Anthropic's protocols in front of one model."""

from .app import Server

__all__ = ["Server"]
