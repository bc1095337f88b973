"""Control, escape and bidi characters never reach a terminal."""

import unicodedata

import pytest

from mlxfuse.terminal import neutralize, one_line


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain ünïcode 日本語 \U0001f600", "plain ünïcode 日本語 \U0001f600"),
        ("\x1b[31mred", "\\x1b[31mred"),
        ("\x1b]0;title\x07", "\\x1b]0;title\\x07"),
        ("back\x08\rover", "back\\x08\\x0dover"),
        ("\x9b2J", "\\x9b2J"),
        ("\x7f", "\\x7f"),
        ("a\u202eb\u2066c\u200f", "a\\u202eb\\u2066c\\u200f"),
        ("\u2028\u2029", "\\u2028\\u2029"),
        ("\ud800", "\\ud800"),
        ("line\n\ttab", "line\n\ttab"),
        # The joiner inside one emoji and the non-joiner of a Persian word stay.
        ("\U0001f468\u200d\U0001f4bb", "\U0001f468\u200d\U0001f4bb"),
        ("\u0645\u06cc\u200c\u062e", "\u0645\u06cc\u200c\u062e"),
    ],
)
def test_neutralize(text, shown):
    assert neutralize(text) == shown


def test_no_control_or_bidi_character_is_left_of_the_whole_of_unicode():
    text = neutralize("".join(map(chr, range(0x110000))))
    left = {c for c in text if unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp")}
    assert left == {"\n", "\t"}
    bidi = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}
    assert not [c for c in text if unicodedata.bidirectional(c) in bidi]


def test_pieces_give_what_the_whole_gives():
    text = "a\x1b[1mb\u202e\r\nc"
    assert "".join(map(neutralize, text)) == neutralize(text)


def test_one_line_escapes_newlines_and_is_bounded():
    assert one_line("a\nb\tc\x1b") == "a\\x0ab\\x09c\\x1b"
    assert one_line("x" * 200) == "x" * 200
    assert one_line("x" * 201) == "x" * 199 + "…"
    assert len(one_line("\x1b" * 10**6, 50)) == 50
