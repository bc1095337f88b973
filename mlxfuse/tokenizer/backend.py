"""A vocabulary as a pipeline of ``tokenizers``: normaliser, split and merges, as in llama.cpp."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

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

from .merging import Score, beyond_tokens, by_pair, by_token, merges_by_score, needs_scores, segment
from .vocab import BYTE, CONTROL, UNKNOWN, UNUSED, USER_DEFINED, Vocab

_SPACE = "\u2581"
_BYTE_TOKEN = re.compile("<0x[0-9A-Fa-f]{2}>")
_CHUNK = 512


def build_backend(vocab: Vocab, rstrip: Collection[int] = ()) -> Tokenizer:
    """The ``tokenizers`` pipeline of ``vocab``: special tokens, normaliser, split, merges, BOS.

    Args:
        rstrip: ids of special tokens that swallow the ASCII white space after them.
    """
    if vocab.pre is None:
        backend = _spm(vocab)
    elif vocab.pre.byte_level:
        backend = _byte_level(vocab)
    else:
        backend = _escaped(vocab)
    if rstrip:
        backend.normalizer = _swallowing(vocab, rstrip)
    backend.add_tokens(
        [
            AddedToken(
                vocab.tokens[i],
                normalized=i in rstrip,
                special=bool(vocab.types[i] != USER_DEFINED),
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


def _swallowing(vocab: Vocab, rstrip: Collection[int]) -> normalizers.Normalizer:
    """The normaliser of ``vocab``, over a text that still has the tokens ``rstrip`` in it.

    ``AddedToken``'s own ``rstrip`` takes all of Unicode's white space; llama.cpp takes C's.
    """
    token = "|".join(re.escape(vocab.tokens[i]) for i in sorted(rstrip))
    steps = [normalizers.Replace(Regex(f"(?<={token})[ \\t-\\r]+"), "")]
    if vocab.is_spm and vocab.add_space_prefix:
        text = f"(?!{token}|\\z)"  # begins here
        steps.append(normalizers.Replace(Regex(f"\\A{text}|(?<={token}){text}"), _SPACE))
    if vocab.pre is None or not vocab.pre.byte_level:
        steps.append(normalizers.Replace(" ", _SPACE))
    return normalizers.Sequence(steps)


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


def pieces_of(vocab: Vocab) -> list[bytes]:
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
