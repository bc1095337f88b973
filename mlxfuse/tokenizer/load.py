"""A GGUF file's own tokenizer, as MLX-LM takes it: nothing but the file's metadata is needed.

The vocabulary becomes a ``tokenizers`` BPE, whose tokens are llama.cpp's (``llama_tokenize`` with
special tokens parsed); a transformers tokenizer holds it and MLX-LM's wrapper goes around that.
"""

from __future__ import annotations

import codecs
import math
import os
import re
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import numpy as np
from mlx_lm.tokenizer_utils import StreamingDetokenizer, TokenizerWrapper
from transformers import PreTrainedTokenizerFast
from transformers.utils import get_json_schema

from . import chat_template as chat
from .answer_format import answer_format, complete
from .backend import build_backend, pieces_of
from .vocab import CONTROL, UNKNOWN, Vocab, read_vocab

_SURROGATE = re.compile("[\ud800-\udfff]")


class _File(Protocol):
    """What is used of an open GGUF file."""

    @property
    def path(self) -> os.PathLike[str]: ...
    @property
    def metadata(self) -> Mapping[str, object]: ...


def load_tokenizer(file: _File) -> TokenizerWrapper:
    """The tokenizer of an open GGUF file; see `build_tokenizer`."""
    return build_tokenizer(file.metadata, file.path)


def build_tokenizer(
    metadata: Mapping[str, object], path: str | os.PathLike[str]
) -> TokenizerWrapper:
    """The tokenizer that ``metadata`` (``tokenizer.*``, ``general.name``) describes.

    Special tokens in a text are parsed, as for llama.cpp's prompts; ``eos_token_ids`` holds every
    token that ends a generation. Chat templates go through `mlxfuse.tokenizer.chat_template`.

    Raises:
        GGUFError, UnsupportedError: see `read_vocab`; ``path`` is only for their messages.
    """
    vocab = read_vocab(metadata, path)
    return wrapped(GGUFTokenizer(vocab), vocab.eog)


def wrapped(tokenizer: GGUFTokenizer, eos_token_ids: Iterable[int]) -> TokenizerWrapper:
    """MLX-LM's wrapper, which knows how the model marks tool calls and reasoning."""
    wrapper = TokenizerWrapper(
        tokenizer, Detokenizer, eos_token_ids=eos_token_ids, **answer_format(tokenizer)
    )
    # mlx-lm takes an apply_chat_template of one's own for a template.
    wrapper.has_chat_template = tokenizer.chat_template is not None
    return complete(wrapper)


def with_template(tokenizer: TokenizerWrapper, template: str) -> TokenizerWrapper:
    """The same tokenizer with another chat template, which also tells how tools are called."""
    inner = tokenizer._tokenizer
    inner.chat_template = template
    if not isinstance(inner, GGUFTokenizer):
        wrapper = TokenizerWrapper(
            inner,
            lambda _: tokenizer.detokenizer,
            tokenizer.eos_token_ids,
            **answer_format(inner),
        )
        return complete(wrapper)
    return wrapped(inner, tokenizer.eos_token_ids)


class GGUFTokenizer(PreTrainedTokenizerFast):
    """A transformers tokenizer over a `Vocab`, which repairs ill-formed text before encoding,
    decodes as it streams, and renders chat templates under `chat_template`'s limits."""

    def __init__(self, vocab: Vocab) -> None:
        # Set beforehand: transformers would deep-copy what it is given, by way of JSON.
        self._tokenizer = build_backend(vocab)
        self._ids = vocab.ids
        # As mlx-lm's logits processors take it. llama.cpp's samplers add the same.
        self.suppressed = dict.fromkeys(vocab.suppressed, -math.inf)
        templates: dict[str, str] | str | None = vocab.chat_templates or None
        if list(vocab.chat_templates) == ["default"]:
            templates = vocab.chat_templates["default"]
        names = {f"{name}_token": i for name, i in vocab.special.items()}
        known = {k: i for k, i in names.items() if k in self.SPECIAL_TOKENS_ATTRIBUTES}
        parsed = frozenset(vocab.parsed)
        super().__init__(
            **{name: vocab.tokens[i] for name, i in known.items() if i in parsed},
            clean_up_tokenization_spaces=False,
            chat_template=templates,
        )
        # transformers would cut these out of every text, which llama.cpp does not.
        self._special_tokens_map |= {
            k: vocab.tokens[i] for k, i in known.items() if i not in parsed
        }
        self.pieces = pieces_of(vocab)
        self.trim_space = vocab.is_spm and vocab.add_space_prefix
        self.hidden = frozenset(np.flatnonzero(np.isin(vocab.types, (CONTROL, UNKNOWN))).tolist())
        swallowing = [re.escape(vocab.tokens[i]) for i in sorted(vocab.rstrip)]
        # C's isspace, where an AddedToken's rstrip would take Unicode spaces as well.
        self._rstrip = re.compile(f"({'|'.join(swallowing)})[ \\t-\\r]+") if swallowing else None

    def get_vocab(self) -> dict[str, int]:
        return dict(self._ids)

    def _encode_plus(self, text: Any, text_pair: Any = None, **kwargs: Any) -> Any:
        return super()._encode_plus(self._prepare(text), self._prepare(text_pair), **kwargs)

    def _prepare(self, text: Any) -> Any:
        """``text`` (or the strings in a list) as the backend takes it: surrogate pairs joined,
        lone ones as U+FFFD, and no space after a token that swallows it."""
        if isinstance(text, list | tuple):
            return type(text)(map(self._prepare, text))
        if not isinstance(text, str):
            return text
        if _SURROGATE.search(text):
            text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
        return self._rstrip.sub(r"\1", text) if self._rstrip else text

    def _decode(
        self, token_ids: int | list[int], skip_special_tokens: bool = False, **kwargs: Any
    ) -> str:
        detokenizer = Detokenizer(self)
        for i in [token_ids] if isinstance(token_ids, int) else token_ids:
            if not (skip_special_tokens and i in self.hidden):
                detokenizer.add_token(i)
        detokenizer.finalize()
        return detokenizer.text

    def apply_chat_template(
        self,
        conversation: Any,
        tools: list[Any] | None = None,
        documents: list[dict[str, str]] | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        tokenize: bool = True,
        return_dict: bool = True,
        **kwargs: Any,
    ) -> Any:
        """As transformers' method, for one conversation or a list of them, but rendered by
        `mlxfuse.tokenizer.chat_template.render`; what is left of ``kwargs`` goes to the template.

        Raises:
            UnsupportedError: no template, or one that is refused or fails.
        """
        batched = bool(conversation) and isinstance(conversation[0], list | tuple)
        texts = [
            chat.render(
                self.get_chat_template(chat_template, tools),
                messages,
                tools=tools and [get_json_schema(t) if callable(t) else t for t in tools],
                documents=documents,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                **{**self.special_tokens_map, **kwargs},
            )
            for messages in (conversation if batched else [conversation])
        ]
        if not tokenize:
            return texts if batched else texts[0]
        out = self(texts if batched else texts[0], add_special_tokens=False)
        return out if return_dict else out["input_ids"]


class Detokenizer(StreamingDetokenizer):
    """Text from tokens as they come, exact on characters that span tokens, linear in their number.

    MLX-LM's own drops a leading space of a byte-level vocabulary and NUL characters.
    """

    def __init__(self, tokenizer: GGUFTokenizer) -> None:
        self._pieces, self._trim = tokenizer.pieces, tokenizer.trim_space
        self.reset()

    def reset(self) -> None:
        self.offset, self.text = 0, ""
        self.tokens: list[int] = []
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add_token(self, token: int) -> None:
        self.tokens.append(token)
        # A model's output may be padded beyond the vocabulary.
        self._append(self._pieces[token] if 0 <= token < len(self._pieces) else b"")

    def finalize(self) -> None:
        self._append(b"", final=True)
        self._decoder.reset()

    def _append(self, piece: bytes, final: bool = False) -> None:
        text = self._decoder.decode(piece, final)
        if not self.text and self._trim and text.startswith(" "):
            text = text[1:]
        self.text += text
