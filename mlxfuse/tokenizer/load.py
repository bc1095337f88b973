"""A GGUF file's own tokenizer, as MLX-LM takes it: nothing but the file's metadata is needed.

The vocabulary becomes a ``tokenizers`` BPE, whose tokens are llama.cpp's (``llama_tokenize`` with
special tokens parsed); a transformers tokenizer holds it and MLX-LM's wrapper goes around that.
"""

from __future__ import annotations

import codecs
import math
import os
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any, Protocol

import numpy as np
from mlx_lm.tokenizer_utils import StreamingDetokenizer, TokenizerWrapper
from tokenizers import (
    AddedToken,
    NormalizedString,
    PreTokenizedString,
    Regex,
    Tokenizer,
    decoders,
    normalizers,
    pre_tokenizers,
)
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast
from transformers.utils import get_json_schema

from . import chat_template as chat
from .answer_format import answer_format
from .merging import Score, beyond_tokens, by_pair, by_token, merges_by_score, needs_scores, segment
from .vocab import BYTE, CONTROL, UNKNOWN, UNUSED, USER_DEFINED, Vocab, read_vocab

_SPACE = "\u2581"
_BYTE_TOKEN = re.compile("<0x[0-9A-Fa-f]{2}>")
_CHUNK = 512
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
    return wrapper


def with_template(tokenizer: TokenizerWrapper, template: str) -> TokenizerWrapper:
    """The same tokenizer with another chat template, which also tells how tools are called."""
    inner = tokenizer._tokenizer
    inner.chat_template = template
    if not isinstance(inner, GGUFTokenizer):
        return TokenizerWrapper(inner, type(tokenizer.detokenizer), tokenizer.eos_token_ids)
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
        self.pieces = _pieces(vocab)
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


def build_backend(vocab: Vocab, rstrip: Collection[int] = ()) -> Tokenizer:
    """The ``tokenizers`` pipeline of ``vocab``: special tokens, normaliser, split, merges, BOS.

    Args:
        rstrip: ids of special tokens that swallow all white space after them.
    """
    if vocab.pre is None:
        backend = _spm(vocab)
    elif vocab.pre.byte_level:
        backend = _byte_level(vocab)
    else:
        backend = _escaped(vocab)
    backend.add_tokens(
        [
            AddedToken(
                vocab.tokens[i],
                normalized=False,
                special=bool(vocab.types[i] != USER_DEFINED),
                rstrip=i in rstrip,
            )
            for i in vocab.parsed
        ]
    )
    bos = ["BOS"] if vocab.add_bos else []
    eos = ["EOS"] if vocab.add_eos else []
    backend.post_processor = TemplateProcessing(
        single=[*bos, "$A", *eos],
        pair=[*bos, "$A", *eos, *bos, "$B:1", *eos],
        special_tokens=[
            {"id": name.upper(), "ids": [i], "tokens": [vocab.tokens[i]]}
            for name, i in vocab.special.items()
            if name in ("bos", "eos")
        ],
    )
    return backend


def _byte_level(vocab: Vocab) -> Tokenizer:
    assert vocab.pre is not None
    backend, merging = _by_merges(vocab)
    steps = [_split(pattern) for pattern in vocab.pre.patterns]
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    missing = [char for char in _BYTES if char not in vocab.ids]
    if missing:
        # Such a byte is dropped, and what is on either side of it does not merge.
        chars = "".join(f"\\x{{{ord(char):x}}}" for char in missing)
        steps.append(pre_tokenizers.Split(Regex(f"[{chars}]"), "removed"))
    backend.pre_tokenizer = pre_tokenizers.Sequence([*steps, *merging])
    backend.decoder = decoders.ByteLevel()
    return backend


def _escaped(vocab: Vocab) -> Tokenizer:
    assert vocab.pre is not None
    backend, merging = _by_merges(vocab, byte_fallback=True)
    backend.normalizer = normalizers.Replace(" ", _SPACE)
    steps = [_split(p) for p in vocab.pre.patterns]
    backend.pre_tokenizer = pre_tokenizers.Sequence([*steps, *merging])
    backend.decoder = _spm_decoder(trim=False)
    return backend


def _by_merges(vocab: Vocab, **options: Any) -> tuple[Tokenizer, list[pre_tokenizers.PreTokenizer]]:
    """A BPE by ``vocab.merges``, and what comes before it where it cannot say them all."""
    assert vocab.pre is not None
    whole = vocab.pre.ignore_merges
    if not beyond_tokens(vocab):
        model = BPE(vocab=vocab.ids, merges=vocab.merges, ignore_merges=whole, **options)
        return Tokenizer(model), []
    pieces = _Pieces(vocab, by_pair(vocab.merges), whole)
    model = BPE(vocab=vocab.ids, merges=[], ignore_merges=True, **options)
    return Tokenizer(model), [pre_tokenizers.PreTokenizer.custom(pieces)]


def _spm(vocab: Vocab) -> Tokenizer:
    unknown = vocab.special.get("unk")
    scored = needs_scores(vocab)
    backend = Tokenizer(
        BPE(
            vocab=vocab.ids,
            merges=[] if scored else list(merges_by_score(vocab)),
            byte_fallback=True,
            unk_token=None if unknown is None else vocab.tokens[unknown],
            ignore_merges=scored,
        )
    )
    if scored:
        scores = [0.0] * len(vocab.tokens) if vocab.scores is None else vocab.scores.tolist()
        backend.pre_tokenizer = pre_tokenizers.PreTokenizer.custom(
            _Pieces(vocab, by_token(vocab.ids, scores))
        )
    prefix = [normalizers.Prepend(_SPACE)] if vocab.add_space_prefix else []
    backend.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", _SPACE)])
    backend.decoder = _spm_decoder(trim=vocab.add_space_prefix)
    return backend


class _Pieces:
    """A ``tokenizers`` pre-tokenizer that cuts text into the pieces `segment` finds.

    whole  a text that is a token stays whole, whatever the merges make of it.

    As in llama.cpp, what merges make and is no token falls back to the tokens of its bytes, which
    in a byte-level vocabulary are those of its ASCII characters.
    """

    def __init__(self, vocab: Vocab, score: Score, whole: bool = False) -> None:
        self._ids, self._score, self._whole = vocab.ids, score, whole
        self._byte_level = vocab.pre is not None and vocab.pre.byte_level

    def pre_tokenize(self, text: PreTokenizedString) -> None:
        text.split(self._split)

    def _split(self, _: int, text: NormalizedString) -> list[NormalizedString]:
        given = str(text.normalized)
        if self._whole and given in self._ids:
            return [text]
        # A slice costs as much as the string it is cut from: cut large, then small.
        lengths = segment(given, self._score)
        pieces: list[NormalizedString] = []
        start = 0
        for first in range(0, len(lengths), _CHUNK):
            part = lengths[first : first + _CHUNK]
            chunk = _cut(text, start, sum(part))
            at = 0
            for length in part:
                pieces += self._tokens(_cut(chunk, at, length))
                at += length
            start += at
        return pieces

    def _tokens(self, piece: NormalizedString) -> list[NormalizedString]:
        text = str(piece.normalized)
        if len(text) == 1 or text in self._ids:
            return [piece]
        if self._byte_level:
            return [NormalizedString(char) for char in text if char.isascii()]
        return [NormalizedString(f"<0x{byte:02X}>") for byte in text.encode()]


def _cut(text: NormalizedString, start: int, length: int) -> NormalizedString:
    piece = text[start : start + length]
    assert piece is not None  # None stands for a range outside the text
    return piece


def _split(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Split(Regex(pattern), "isolated")


def _spm_decoder(trim: bool) -> decoders.Decoder:
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    return decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if trim else steps)


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte: itself where it prints, else from U+0100 on."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in set(plain)]
    return {
        **{chr(byte): byte for byte in plain},
        **{chr(256 + n): byte for n, byte in enumerate(rest)},
    }


_BYTES = _byte_alphabet()
_TO_LATIN1 = {ord(char): chr(byte) for char, byte in _BYTES.items()}


def _pieces(vocab: Vocab) -> list[bytes]:
    """The bytes that each id stands for, as in llama.cpp's ``llama_token_to_piece``."""
    byte_level = vocab.pre is not None and vocab.pre.byte_level
    pieces = []
    for token, kind in zip(vocab.tokens, vocab.types.tolist(), strict=True):
        if kind in (UNUSED, 0):
            piece = b""
        elif kind in (CONTROL, USER_DEFINED, UNKNOWN):
            piece = token.encode()
        elif kind == BYTE and _BYTE_TOKEN.fullmatch(token):
            piece = bytes.fromhex(token[3:5])
        elif byte_level:
            piece = _from_byte_alphabet(token)
        else:
            piece = token.replace(_SPACE, " ").encode()
        pieces.append(piece)
    return pieces


def _from_byte_alphabet(token: str) -> bytes:
    try:
        return token.translate(_TO_LATIN1).encode("latin-1")
    except UnicodeEncodeError:  # a token that was never byte-encoded
        return token.encode()
