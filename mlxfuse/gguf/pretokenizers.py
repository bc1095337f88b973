"""What ``tokenizer.ggml.pre`` means: the split patterns of byte-level BPE, by llama.cpp's names.

A pattern list is applied in order, each to the pieces that the one before it left. The patterns
are Oniguruma's, written to split as llama.cpp does, which departs in places from the models' own
tokenizer.json: it knows letters, numbers, punctuation, symbols and marks but not letter case
outside ASCII, and it does not count ``~`` as a symbol.
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

_CJK = "[一-龥ࠀ-一가-\ud7ff]+"
_DEEPSEEK_LETTERS = (
    "A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕ"
    "Ἐ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-ώᾀ-ᾴᾶ-ᾼ\u1fbeῂ-ῄῆ-ῌῐ-ΐῖ-Ίῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤ\u2126ℨ\u212a-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄ"
    "Ⰰ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃"
)
_ASCII_PUNCTUATION = r"!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~"
_DEEPSEEK3 = (
    rf"[{_ASCII_PUNCTUATION}][A-Za-z]+|[^\r\n\p{{L}}\p{{P}}[\p{{S}}&&[^~]]]?[\p{{L}}\p{{M}}]+"
    rf"| ?[\p{{P}}[\p{{S}}&&[^~]]]+[\r\n]*|{_SPACES}"
)
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
    **dict.fromkeys(("dbrx", "smaug-bpe", "glm4", "chatglm-bpe"), Pre((_LLAMA3,))),
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
        ("qwen2", "deepseek-r1-qwen", "kormo", "megrez", "stablelm2", "hunyuan", "solar-open"),
        Pre((_QWEN2,)),
    ),
    "grok-2": Pre((_QWEN2,)),
    "qwen35": Pre((_QWEN35,)),
    **dict.fromkeys(("gpt-4o", "llama4", "kanana2", "minimax-m2"), Pre((_GPT4O,))),
    "tekken": Pre((_TEKKEN,), add_bos=True, ignore_merges=True),
    "deepseek-llm": Pre(
        (
            r"[\r\n]",
            rf"\s?[{_DEEPSEEK_LETTERS}]+",
            # U+3000 is a space by the time this pattern is tried.
            r"\s?[!-/:-~！-／：-～‘-‟\u3001\u3002]+",
            r"\s+\z",
            _CJK,
            r"\p{N}+",
        )
    ),
    "deepseek-coder": Pre((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK, r"\p{N}")),
    **dict.fromkeys(
        ("deepseek-v3", "hunyuan-dense", "joyai-llm", "hy_v4"),
        Pre((r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+", _DEEPSEEK3)),
    ),
    "falcon": Pre((r"[\p{P}$+<=>\^~|`]+", _GPT2, "[0-9][0-9][0-9]")),
    **dict.fromkeys(("bloom", "gpt3-finnish", "poro-chat"), Pre((_BLOOM,))),
    "viking": Pre((_BLOOM, r"\p{N}")),
    **dict.fromkeys(
        ("bailingmoe", "bailingmoe2", "llada-moe"),
        Pre((rf"{_CONTRACTION}|{_WORD}|\p{{N}}|{_SYMBOLS}|\s*[\r\n]|\s+(?!\S)|\s+",)),
    ),
    "seed-coder": Pre(
        (rf"{_CONTRACTION}|{_WORD}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_SPACES}",),
    ),
    "minicpm5": Pre(
        (r"\p{N}{1,3}", rf"{_CONTRACTION}|{_WORD}|\p{{N}}+|{_SYMBOLS}|{_SPACES}"),
        ignore_merges=True,
    ),
    # The escaped space is a letter to nobody: lines are merged whole.
    "gemma4": Pre((r"[^\n]+|\n+",), add_bos=True, ignore_merges=True, byte_level=False),
}
