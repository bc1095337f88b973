# ruff: noqa: RUF001
"""Small vocabularies of every tokenizer family, and the texts they are compared on.

They are trained here, by plain byte-pair counting on `CORPUS`, as whole texts: merges then run
across words, digits and punctuation, so that a wrong split pattern changes the tokens.
"""

from __future__ import annotations

import functools
import itertools
import random
import unicodedata
from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np

CORPUS = [
    "Hello, world! It's 2024; we'll see, they're I'M DON'T you'VE.",
    "naïve café ÀÉÎ straße",
    "Привет, мир! Как дела?",
    "你好，世界。今天天气很好！",
    "こんにちは世界、カタカナ。",
    "안녕하세요 세계 여러분",
    "नमस्ते दुनिया क्षत्रिय",
    "สวัสดีชาวโลก",
    "مرحبا بالعالم، كيف الحال؟",
    "שלום עולם",
    "Γειά σου Κόσμε",
    "😀👍🏽👨‍👩‍👧‍👦🇫🇷❤️",
    "def f(x):\n\treturn  x**2  # comment\n\n\nclass A:\r\n    pass\r\n",
    "for(int i=0;i<10;++i){ a[i]+=i; }",
    "   leading and trailing   ",
    "\n\n\n  \n\t\t x\n",
    "\r\n\r\n\r",
    "12345678901 3.14159 1,000,000 ½ ² Ⅷ ١٢٣ १२३",
    "https://example.com/a?b=c&d=%20#frag ~/.bashrc ~~~ `code` $HOME ^_^ |x| <tag/>",
    "\u3000全角\u3000スペース\u00a0nbsp\u2003em",
    "a\u0301e\u0308 combining",
    "\x00\x01\x7f\x85\u200b\u200d\ufeff",
    "ǅ Ǆ ﬁ ſ İ ı \u212a",
    "！＂＃ＡＢＣａｂｃ１２３",
    "\ufffd \U0001f9ff \U000e0001 \U0010ffff",
    "'s 'S ''ll 'Ll x's’s",
    "snake_case camelCase SCREAMING_CASE kebab-case HTMLParser",
    "x  y   z    w",
    "。。。 ,,, ... !!!??",
    "<|im_start|>user\nhi<|im_end|>\n",
    " <|im_end|>  <|endoftext|>x",
    "<|im_end|>  \n x <s> a</s> \u3000b",
    "\\n\\t\\\\ \"q\" 'q'",
    "a\tb\t\tc \t d",
    "1a2b3c 10x ABCdef123GHI",
    "∑∫√∞≠≤ ←→ €£¥₿ ™©®",
    "the cat sat on the mat and the dog ran to the end of the road",
    "aaaa aaaaaaa ababab baba",
    "One.\nTwo.\nThree!\n\n(a)\n(b)\n\nWhat?!\n\n",
    "x  23   45    678",
    "aBaB abAB BabB camelCase a\u0301Ba\u0301B \u200ca\u200db",
    "1½123 123½ ½12345²678 1234567 ab1234ab1234 782378",
    "it'sb 'sb we'LLx 'LLx a'tb a b a b",
    "가ㄱ！ㄅ一 가ㄱ！ㄅ一 、一、一",
    "a一b一 a一b一 กកကกកက +é ~cd ~cd",
    "a！a！a！ aㄅaㄅaㄅ aｱaｱaｱ !\u2f00!\u2f00!\u2f00 a\u1100a\u1100a\u1100 a\uf900a\uf900a\uf900",
    "!\n/!\n/!\n/",
    "unmerged is a token that no merge makes, also as  unmerged",
]
CONTROL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
USER_TOKENS = ["<think>", "</think>"]

_POOLS = [(0x20, 0x7F), (0xA0, 0x250), (0x370, 0x400), (0x400, 0x500), (0x590, 0x700)]
_POOLS += [(0x900, 0x980), (0xE00, 0xE80), (0x1100, 0x1200), (0x2000, 0x2100), (0x2100, 0x2300)]
_POOLS += [(0x3000, 0x3100), (0x4E00, 0x5000), (0xAC00, 0xAD00), (0x1F300, 0x1F650)]
_POOLS += [(0xFF00, 0xFF60)]
_BITS = [" ", "  ", "\n", "\r\n", "\t", "'s", "'LL", "a", "B", "é", "É", "1", "23", "!", "~", "。"]
_BITS += ["\u3000", "你", "<|im_end|>", "<think>", " x", "ab", "😀", "\u0301", "the ", "\x85", "aa"]


def texts(count: int, seed: int) -> list[str]:
    """`CORPUS` and ``count`` random texts: mixed scripts, whitespace, cut-up and joined samples."""
    rng = random.Random(seed)
    alphabet = sorted(set("".join(CORPUS)))
    found = list(CORPUS)
    for _ in range(count):
        kind, length = rng.random(), rng.randint(1, 40)
        if kind < 0.3:
            text = "".join(rng.choice(alphabet) for _ in range(length))
        elif kind < 0.5:
            text = "".join(chr(rng.randint(*rng.choice(_POOLS))) for _ in range(length))
        elif kind < 0.8:
            text = "".join(rng.choice(_BITS) for _ in range(length))
        else:
            samples = [rng.choice(CORPUS) for _ in range(rng.randint(2, 4))]
            cuts = [(s, rng.randint(0, len(s)), rng.randint(1, 15)) for s in samples]
            text = "".join(s[start : start + size] for s, start, size in cuts)
        # Unicode versions differ in what is assigned.
        found.append("".join(c for c in text if unicodedata.category(c) not in ("Cn", "Cs")))
    return found


def _train(words: list[list[str]], count: int) -> list[tuple[str, str]]:
    """The ``count`` most frequent merges, ties in the order of the texts."""
    merges = []
    for _ in range(count):
        pairs: Counter[tuple[str, str]] = Counter()
        for word in words:
            pairs.update(itertools.pairwise(word))
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        words = [_join(word, best) for word in words]
    return merges


def _join(word: list[str], pair: tuple[str, str]) -> list[str]:
    joined, i = [], 0
    while i < len(word):
        if tuple(word[i : i + 2]) == pair:
            joined.append(word[i] + word[i + 1])
            i += 2
        else:
            joined.append(word[i])
            i += 1
    return joined


def byte_alphabet() -> dict[int, str]:
    """GPT-2's character for each byte."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in plain]
    return {**{b: chr(b) for b in plain}, **{b: chr(256 + n) for n, b in enumerate(rest)}}


# No merge may make the text of a special token.
_TRAINING = [text.replace("<|", "<").replace("|>", ">") for text in CORPUS[:-1]]


@functools.cache
def _bpe_merges() -> list[tuple[str, str]]:
    table = byte_alphabet()
    return _train([[table[b] for b in text.encode()] for text in _TRAINING], 1000)


@functools.cache
def _char_merges() -> list[tuple[str, str]]:
    return _train([list("▁" + text.replace(" ", "▁").replace("\n", "")) for text in _TRAINING], 500)


def _metadata(model: str, tokens: list[str], types: list[int], **more: Any) -> dict[str, Any]:
    return {
        "general.architecture": "llama",
        "tokenizer.ggml.model": model,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": np.array(types, np.int32),
        **{f"tokenizer.ggml.{key}": value for key, value in more.items()},
    }


def bpe(pre: str, missing: str = "", control: tuple[str, ...] = (), **more: Any) -> dict[str, Any]:
    """Byte-level BPE with ``pre``; the alphabet lacks the characters of ``missing``, and the
    tokens ``control`` come last."""
    letters = [c for c in byte_alphabet().values() if c not in missing]
    merges = [pair for pair in _bpe_merges() if not set(missing) & set("".join(pair))]
    special = [*CONTROL_TOKENS, *USER_TOKENS, *control]
    normal = list(dict.fromkeys([*letters, *("".join(pair) for pair in merges)]))
    normal += ["unmerged", "Ġunmerged"]
    types = [1] * len(normal) + [3] * len(CONTROL_TOKENS) + [4] * len(USER_TOKENS)
    types += [3] * len(control)
    tokens = [*normal, *special]
    return _metadata(
        "gpt2",
        tokens,
        types,
        pre=pre,
        merges=[" ".join(pair) for pair in merges],
        bos_token_id=tokens.index("<|im_start|>"),
        eos_token_id=tokens.index("<|im_end|>"),
        **more,
    )


def _sentencepiece_tokens() -> tuple[list[str], list[int]]:
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
    types = [2, 3, 3] + [6] * 256
    pieces = list(dict.fromkeys("".join(pair) for pair in _char_merges()))
    # Rare characters are left out: they fall back to bytes.
    letters = sorted({c for text in CORPUS[:11] for c in text if c != " "} | set("".join(pieces)))
    tokens += [*pieces, *letters, *CONTROL_TOKENS, *USER_TOKENS]
    types += [1] * (len(pieces) + len(letters)) + [3] * len(CONTROL_TOKENS) + [4] * len(USER_TOKENS)
    return tokens, types


SPM_SIZE = len(_sentencepiece_tokens()[0])


def spm(**more: Any) -> dict[str, Any]:
    """SentencePiece BPE: scores fall with the order of the merges, bytes as a fallback."""
    tokens, types = _sentencepiece_tokens()
    scores = np.array([0.0 if t != 1 else -float(i) for i, t in enumerate(types)], np.float32)
    ids = {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0}
    return _metadata("llama", tokens, types, scores=scores, **{**ids, **more})


def gemma4(**more: Any) -> dict[str, Any]:
    """BPE over escaped text with byte fallback."""
    tokens, types = _sentencepiece_tokens()
    runs = ["\n" * n for n in range(1, 4)]
    merges = [" ".join(pair) for pair in _char_merges()]
    ids = {"bos_token_id": 1, "eos_token_id": 2}
    return _metadata("gemma4", tokens + runs, types + [1] * 3, merges=merges, **ids, **more)


def cut_down(metadata: dict[str, Any], every: int = 4) -> dict[str, Any]:
    """The vocabulary without some tokens that its merges make and need, and with lines among its
    merges that are none."""
    tokens = metadata["tokenizer.ggml.tokens"]
    longer = [i for i, t in enumerate(tokens) if len(t) > 1 and t[0] != "<"]
    gone = set(longer[::every])
    special = {key: tokens[i] for key, i in metadata.items() if key.endswith("token_id")}
    kept = [i for i in range(len(tokens)) if i not in gone]
    left = [tokens[i] for i in kept]
    merges = metadata["tokenizer.ggml.merges"]
    return {
        **metadata,
        "tokenizer.ggml.tokens": left,
        "tokenizer.ggml.token_type": metadata["tokenizer.ggml.token_type"][kept],
        "tokenizer.ggml.merges": ["", "ab", "a ", " a", "zz q", *merges, merges[0]],
        **{key: left.index(token) for key, token in special.items()},
    }


def named(metadata: dict[str, Any], token: str, *keys: str) -> dict[str, Any]:
    """The vocabulary whose special ids ``keys`` are an ordinary token's."""
    at = metadata["tokenizer.ggml.tokens"].index(token)
    return {**metadata, **{f"tokenizer.ggml.{key}_token_id": at for key in keys}}


_ENDS = ("<|eot_id|>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>")
_ENDS += ("<eos>", "<turn|>", "[e~[")
_HARMONY = ("<|return|>", "<|call|>", "<|end|>", "<|channel|>", "<|message|>", "<|start|>")


def families(pres: Iterable[str]) -> dict[str, dict[str, Any]]:
    """The metadata of every vocabulary that is compared with llama.cpp, by name."""
    return {
        **{f"bpe {pre}": bpe(pre) for pre in pres if pre != "gemma4"},
        "bpe without pre": {k: v for k, v in bpe("").items() if not k.endswith(".pre")},
        "bpe with bos and eos": bpe("qwen2", add_bos_token=True, add_eos_token=True),
        "bpe without some bytes": bpe("qwen2", missing="eĠ\u00c3"),
        "bpe, all ends": bpe("qwen2", control=(*_ENDS, "<|fim_pad|>", "<|repo_name|>")),
        "bpe, harmony": bpe("gpt-4o", control=_HARMONY),
        "bpe, solar": bpe("solar-open", control=("<|flush|>", "<|calls|>", "<|end|>")),
        "bpe, tool response": bpe("qwen2", control=("<|tool_response>", "</s>")),
        "bpe, cut down": cut_down(bpe("qwen2")),
        "bpe, cut down, whole words": cut_down(bpe("llama-bpe"), every=7),
        "gemma4, cut down": cut_down(gemma4()),
        **{
            f"{kind}, {key} is a letter": named(made, "e", key)
            for kind, made in (("bpe", bpe("qwen2")), ("spm", spm()))
            for key in ("bos", "eos", "eot", "eom", "unknown", "padding", "fim_pad")
        },
        "spm": spm(),
        "spm without prefix": spm(add_space_prefix=False),
        "spm with eos": spm(add_bos_token=False, add_eos_token=True),
        "spm of equal scores": {**spm(), "tokenizer.ggml.scores": np.full(SPM_SIZE, -1e3, "f4")},
        "spm phi-3": {**spm(), "general.name": "Phi-3 mini"},
        "gemma4": gemma4(),
    }
