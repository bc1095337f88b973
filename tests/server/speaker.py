"""A model that says what it is told to, one token after the other, whatever it is asked.

It takes no time, so that tests of the server are about the server.
"""

from itertools import pairwise
from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
from gguf import TokenType
from mlx_lm.models.cache import ArraysCache, KVCache

from mlxfuse.tokenizer.load import build_tokenizer

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# What mlx-lm knows the family of <tool_call>{"name": ...}</tool_call> by.
HERMES = CHATML + "{# <tool_call>{{ tool_call.name }} #}"
_CONTROL, _TEXT = int(TokenType.CONTROL), int(TokenType.USER_DEFINED)


def _letters():
    """GPT-2's letter for each byte, and one merge."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    letters = [chr(b if b in shown else 256 + hidden.index(b)) for b in range(256)]
    return [*letters, "~~"]


def tokenizer(*words, controls=(), template=CHATML):
    """Of the 256 bytes, four control tokens, and ``words``, each one token; ``<|im_end|>`` ends."""
    marks = ["<|bos|>", "<|eos|>", "<|im_start|>", "<|im_end|>", *controls]
    tokens = [*_letters(), *marks, *words]
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * 257 + [_CONTROL] * len(marks) + [_TEXT] * len(words),
        "tokenizer.ggml.merges": ["~ ~"],
        "tokenizer.ggml.bos_token_id": 257,
        "tokenizer.ggml.eos_token_id": 260,
        "tokenizer.ggml.add_bos_token": False,
    }
    if template is not None:
        metadata["tokenizer.chat_template"] = template
    return build_tokenizer(metadata, "speaker.gguf")


class Speaker(nn.Module):
    """Says ``steps``, distinct tokens, and ends; after any other token it begins anew.

    Args:
        fails: called with the tokens of each call; what it raises ends the call.
        state: of a recurrent layer, from which nothing can be taken back, in place of keys.
    """

    def __init__(self, tokenizer, steps, *, context=256, fails=None, state=False, end="<|im_end|>"):
        super().__init__()
        size = len(tokenizer)
        ids = [tokenizer.convert_tokens_to_ids(step) for step in (*steps, end)]
        assert None not in ids
        assert len(set(ids)) == len(ids)
        follows = [ids[0]] * size
        for token, after in pairwise(ids):
            follows[token] = after
        self._follows = mx.array(follows)
        self._size, self._fails, self._state = size, fails, state
        self.args = SimpleNamespace(max_position_embeddings=context)
        self.layers = [None]
        mx.eval(self._follows)

    def make_cache(self):
        return [ArraysCache(1) if self._state else KVCache()]

    def __call__(self, inputs, cache):
        if self._fails is not None:
            self._fails(inputs)
        plain = inputs[:, None, :, None].astype(mx.float32)
        if self._state:
            total, before = plain.sum(axis=2, keepdims=True), cache[0][0]
            cache[0][0] = held = total if before is None else before + total
        else:
            held, _ = cache[0].update_and_fetch(plain, plain)
        next_ = self._follows[inputs][..., None]
        logits = mx.where(mx.arange(self._size) == next_, 10.0, 0.0)
        return logits + 0 * held[:, 0, -1:]
