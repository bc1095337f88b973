"""Text from files, models and servers made safe to print on a terminal."""

from __future__ import annotations

# Unicode's Bidi_Control characters: they reorder what a reader sees.
_BIDI = (0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A))
# C0, DEL and C1 hold every escape sequence; U+2028/9 break lines; U+FFF9..B hide text.
_CONTROL = (*range(0x20), *range(0x7F, 0xA0), 0x2028, 0x2029, *range(0xFFF9, 0xFFFC))
_SURROGATES = range(0xD800, 0xE000)


def _escape(code: int) -> str:
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


_LINE = {code: _escape(code) for code in (*_CONTROL, *_BIDI, *_SURROGATES)}
_TEXT = {code: shown for code, shown in _LINE.items() if code not in (0x09, 0x0A)}


def neutralize(text: str) -> str:
    """``text`` with every control, escape and bidi character shown as its escape.

    Newlines and tabs stay. The joiners that emoji and several scripts need stay too.
    """
    return text.translate(_TEXT)


def one_line(text: str, limit: int = 200) -> str:
    """As ``neutralize``, newlines and tabs included, cut to ``limit`` characters."""
    shown = text[: limit + 1].translate(_LINE)
    return shown if len(shown) <= limit else shown[: limit - 1] + "…"
