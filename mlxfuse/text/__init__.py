"""Tokens and text: generating, chatting, measuring perplexity, files of prompt caches."""
