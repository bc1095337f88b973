# ruff: noqa: RUF001
"""What ``tokenizer.ggml.pre`` means: the split patterns of byte-level BPE, by llama.cpp's names.

A pattern list is applied in order, each to the pieces that the one before it left. The patterns
are Oniguruma's, written to split as llama.cpp does, which departs in places from the models' own
tokenizer.json: it knows letters, numbers, punctuation, symbols and marks, but no letter case
outside ASCII.
"""

from __future__ import annotations

from dataclasses import dataclass

_CONTRACTION = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_SYMBOLS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_CONTRACTION}|{_WORD}|\p{{N}}{{1,3}}|{_SYMBOLS}|{_SPACES}"
_QWEN2 = rf"{_CONTRACTION}|{_WORD}|\p{{N}}|{_SYMBOLS}|{_SPACES}"
_QWEN35 = (
    rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
    rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACES}"
)
# Runs of upper case then lower case; without ASCII case a letter belongs to both.
_UPPER, _LOWER = r"[\p{L}&&[^a-z]]", r"[\p{L}&&[^A-Z]]"
_CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+"
_CAPITALS = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
_SYMBOLS_SLASH = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"
_GPT4O = (
    rf"{_CASED}{_CONTRACTION}?|{_CAPITALS}{_CONTRACTION}?|\p{{N}}{{1,3}}|{_SYMBOLS_SLASH}|{_SPACES}"
)
_TEKKEN = rf"{_CASED}|{_CAPITALS}|\p{{N}}|{_SYMBOLS_SLASH}|{_SPACES}"
_MARKED = rf"[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+{_CONTRACTION}?"
# Words with single spaces between them are one piece.
_EXAONE_MOE = (
    rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}\p{{M}}*(?: ?\p{{L}}\p{{M}}*)*|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+"
)
# A number is split in groups of three digits, counted from its end. Both forms count its digits
# only once, at its first digit: a count from each digit would take minutes on a very long number.
# In the first form, the text before a number stays in one piece with the number's first group.
_THREES = r"\G\P{N}*+(?:(?<!\p{N})\p{N}{1,2}(?=(?>(?:\p{N}{3})*)(?!\p{N}))|\p{N}{3})"
# In the second form only ASCII digits count, and other numerals stay with the group before them.
_SUPERBPE = (
    r"\p{N}+",
    r"(?<![0-9])[0-9]{0,2}\K(?=(?>(?:[0-9]{3})+)(?![0-9]))",
    r"[0-9]{3}(?=[0-9]{3})",
)

# The range takes in U+2000 and U+3000, but a space is a space before it is tried.
_CJK = r"[\x{800}-\x{9fa5}\x{ac00}-\x{d7ff}&&\S]+"
# Cased letters as code points: several look like, or normalise to, others.
_DEEPSEEK_LETTERS = (
    r"A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿ\x{386}\x{388}-\x{38a}\x{38c}\x{38e}-\x{3a1}\x{3a3}-\x{3f5}"
    r"\x{3f7}-\x{481}\x{48a}-\x{52f}\x{531}-\x{556}\x{10a0}-\x{10c5}\x{13a0}-\x{13f5}\x{13f8}-\x{13fd}"
    r"\x{1c90}-\x{1cba}\x{1cbd}-\x{1cbf}\x{1d00}-\x{1d2b}\x{1d6b}-\x{1d77}\x{1d79}-\x{1d9a}"
    r"\x{1e00}-\x{1f15}\x{1f18}-\x{1f1d}\x{1f20}-\x{1f45}\x{1f48}-\x{1f4d}\x{1f50}-\x{1f57}\x{1f59}"
    r"\x{1f5b}\x{1f5d}\x{1f5f}-\x{1f7d}\x{1f80}-\x{1fb4}\x{1fb6}-\x{1fbc}\x{1fbe}\x{1fc2}-\x{1fc4}"
    r"\x{1fc6}-\x{1fcc}\x{1fd0}-\x{1fd3}\x{1fd6}-\x{1fdb}\x{1fe0}-\x{1fec}\x{1ff2}-\x{1ff4}"
    r"\x{1ff6}-\x{1ffc}\x{2102}\x{2107}\x{210a}-\x{2113}\x{2115}\x{2119}-\x{211d}\x{2124}\x{2126}"
    r"\x{2128}\x{212a}-\x{212d}\x{212f}-\x{2134}\x{2139}\x{213c}-\x{213f}\x{2145}-\x{2149}\x{214e}"
    r"\x{2183}\x{2184}\x{2c00}-\x{2c7b}\x{2c7e}-\x{2ce4}\x{2ceb}-\x{2cee}\x{2cf2}\x{2cf3}"
    r"\x{a640}-\x{a66d}\x{a680}-\x{a69b}\x{a722}-\x{a76f}\x{a771}-\x{a787}\x{a78b}-\x{a78e}"
    r"\x{ab70}-\x{abbf}\x{fb00}-\x{fb06}\x{fb13}-\x{fb17}\x{ff21}-\x{ff3a}\x{ff41}-\x{ff5a}"
    r"\x{10400}-\x{1044f}\x{104b0}-\x{104d3}\x{104d8}-\x{104fb}\x{10c80}-\x{10cb2}\x{10cc0}-\x{10cf2}"
    r"\x{118a0}-\x{118df}\x{1e900}-\x{1e943}"
)
_ASCII_PUNCTUATION = r"!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~"
_DEEPSEEK_WORD = (
    rf"[{_ASCII_PUNCTUATION}][A-Za-z]+|[^\r\n\p{{L}}\p{{P}}\p{{S}}]?[\p{{L}}\p{{M}}]+"
    r"| ?[\p{P}\p{S}]+"
)
_DEEPSEEK3 = rf"{_DEEPSEEK_WORD}[\r\n]*|{_SPACES}"
_HAN_KANA = r"[\x{4e00}-\x{9fa5}\x{3040}-\x{30ff}]+"
_HAN = (
    r"\x{3400}-\x{4dbf}\x{4e00}-\x{9fff}\x{f900}-\x{faff}\x{20000}-\x{2a6df}\x{2a700}-\x{2ebef}"
    r"\x{2f800}-\x{2fa1f}"
)
_KIMI_K2 = (
    rf"[{_HAN}]+|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}&&[^{_HAN}]]+{_CONTRACTION}?|\p{{N}}{{1,3}}"
    rf"|{_SYMBOLS}|{_SPACES}"
)
# Han, kana, Thai, Lao, Khmer, Myanmar and Hangul.
_AFMOE_SCRIPTS = (
    r"[\x{3400}-\x{4dbf}\x{4e00}-\x{9fff}\x{f900}-\x{faff}\x{2f00}-\x{2fdf}\x{3040}-\x{30ff}"
    r"\x{ff65}-\x{ff9f}\x{e40}-\x{eff}\x{1780}-\x{17ff}\x{1000}-\x{109f}\x{aa60}-\x{aa7f}"
    r"\x{a9e0}-\x{a9ff}\x{ac00}-\x{d7af}\x{1100}-\x{11ff}]+"
)
# Hangul, CJK punctuation, Bopomofo, and Han with kana: a run of one of these is a piece.
_YOUTU_SCRIPTS = (
    r"[\x{ac00}-\x{d7a3}\x{3131}-\x{318e}]+|[！…“”‘’—：；，\x{3001}-\x{303f}\x{fe30}-\x{fe4f}]+"
    rf"|[\x{{3105}}-\x{{312f}}]+|{_HAN_KANA}"
)
_LINES = r"[^\n]+|\n+"
_BLOOM = r" ?[^(\s|.,!?…。，、।۔،)]+"


@dataclass(frozen=True)
class Pre:
    """How a byte-level BPE vocabulary splits text before merging.

    Args:
        patterns: applied in order; text that a pattern does not match stays a piece of its own.
        add_bos: whether BOS is put in front when ``tokenizer.ggml.add_bos_token`` is absent.
        ignore_merges: a piece that is a token as it stands is not merged.
        byte_level: pieces go through GPT-2's byte alphabet; else spaces become U+2581 and unknown
            characters fall back to ``<0xXX>`` tokens.
    """

    patterns: tuple[str, ...]
    add_bos: bool = False
    ignore_merges: bool = False
    byte_level: bool = True


_LLAMA_BPE = Pre((_LLAMA3,), add_bos=True, ignore_merges=True)
_PLAIN_GPT2 = Pre((_GPT2,))
_DIGITS_GPT2 = Pre((r"\p{N}", _GPT2))

PRE: dict[str, Pre] = {
    "default": Pre((r"[\p{P}$+<=>\^~|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
    **dict.fromkeys(
        ("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"),
        _LLAMA_BPE,
    ),
    **dict.fromkeys(("dbrx", "smaug-bpe", "chatglm-bpe"), Pre((_LLAMA3,))),
    **dict.fromkeys(("glm4", "glm5"), Pre((_LLAMA3,), ignore_merges=True)),
    # Numbers apart first: all spaces before one stay together.
    "minicpm5": Pre((r"\p{N}{1,3}", _LLAMA3), ignore_merges=True),
    **dict.fromkeys(
        (
            *("gpt-2", "phi-2", "gigachat", "a.x-4.0", "mellum", "exaone4", "mpt", "olmo", "jais"),
            *("trillion", "granite-docling"),
        ),
        _PLAIN_GPT2,
    ),
    **dict.fromkeys(
        (
            *("starcoder", "refact", "command-r", "smollm", "codeshell", "exaone", "minerva-7b"),
            "mellum2",
        ),
        _DIGITS_GPT2,
    ),
    **dict.fromkeys(
        (
            *("qwen2", "deepseek-r1-qwen", "kormo", "megrez", "stablelm2", "hunyuan", "grok-2"),
            *("solar-open", "bailingmoe", "bailingmoe2", "llada-moe"),
        ),
        Pre((_QWEN2,)),
    ),
    "qwen35": Pre((_QWEN35,)),
    **dict.fromkeys(("gpt-4o", "llama4", "kanana2", "minimax-m2"), Pre((_GPT4O,))),
    "tekken": Pre((_TEKKEN,), add_bos=True, ignore_merges=True),
    "deepseek-llm": Pre(
        (
            r"[\r\n]",
            rf"\s?[{_DEEPSEEK_LETTERS}]+",
            r"\s?[!-/:-~！-／：-～‘-‟、。]+",
            r"\s+\z",
            _CJK,
            r"\p{N}+",
        )
    ),
    "deepseek-coder": Pre((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK, r"\p{N}")),
    **dict.fromkeys(
        ("deepseek-v3", "hunyuan-dense", "joyai-llm", "hy_v4"),
        Pre((r"\p{N}{1,3}", _HAN_KANA, _DEEPSEEK3)),
    ),
    "spark2_5": Pre((r"\p{N}", _HAN_KANA, rf"{_DEEPSEEK_WORD}|[\r\n]|\s+(?!\S)|\s+")),
    "afmoe": Pre((_THREES, _AFMOE_SCRIPTS, _DEEPSEEK3)),
    "kimi-k2": Pre((_KIMI_K2,)),
    "youtu": Pre(
        (_YOUTU_SCRIPTS, rf"{_MARKED}|\p{{N}}|{_SYMBOLS_SLASH}|{_SPACES}"), ignore_merges=True
    ),
    **dict.fromkeys(
        ("tiny_aya", "cohere2moe"),
        Pre((_THREES, rf"{_MARKED}|\p{{N}}{{1,3}}|{_SYMBOLS_SLASH}|{_SPACES}")),
    ),
    "exaone-moe": Pre((_EXAONE_MOE,)),
    "laguna": Pre((_LINES, _QWEN2)),
    "superbpe": Pre(_SUPERBPE),
    "falcon": Pre((r"[\p{P}$+<=>\^~|`]+", _GPT2, "[0-9][0-9][0-9]")),
    **dict.fromkeys(("bloom", "gpt3-finnish", "poro-chat"), Pre((_BLOOM,))),
    "viking": Pre((_BLOOM, r"\p{N}")),
    "seed-coder": Pre(
        (rf"{_CONTRACTION}|{_WORD}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_SPACES}",),
    ),
    # The escaped space is a letter to nobody: lines are merged whole.
    "gemma4": Pre((_LINES,), add_bos=True, ignore_merges=True, byte_level=False),
}
