import time
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptjax.data.cleaning import normalization as n

# Any str, half surrogate pairs included, and often the characters that the steps look at.
texts = st.text(
    st.characters(exclude_categories=[])
    | st.sampled_from(list("\u200d\u200c\u200b\ufe0f❤👨👩نमी \t\r\n…\x1b[m\u0301Ａ「"))
)


@pytest.mark.parametrize(
    "step",
    [
        n.control_characters,
        n.full_width,
        lambda text: n.full_width(text, "all"),
        n.quotes,
        lambda text: n.quotes(text, "corner"),
        lambda text: n.quotes(text, "ascii"),
        n.nfc,
        n.nfkc,
        n.spaces,
        n.indentation,
        n.trailing_whitespace,
        n.blank_lines,
        lambda text: n.blank_lines(text, 0),
    ],
)
@given(text=texts)
def test_a_step_takes_any_text_and_a_second_application_changes_nothing(step, text):
    once = step(text)
    assert step(once) == once


@given(texts)
def test_entities_takes_any_text(text):
    assert isinstance(n.entities(text + "&#" + text + ";&" + text + ";"), str)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("&lt;b&gt; &amp;&#20320;&#x597D;&nbsp;", "<b> &你好\xa0"),
        ("&amp;lt;", "&lt;"),  # once
        ("?a=1&copy=2&lt", "?a=1&copy=2&lt"),  # no semicolon, no entity
        ("&nosuchentity; &#xD800; &#0;", "&nosuchentity; \ufffd \ufffd"),
        ("&#" + "9" * 5000 + ";", "&#" + "9" * 5000 + ";"),
    ],
)
def test_entities(text, expected):
    assert n.entities(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("\ufeffa\u200bb\u00adc\u2060d\x00\x07", "abcd"),
        ("a\r\nb\rc\x0cd\u2028e\x85f", "a\nb\nc\nd\ne\nf"),
        ("tab\tstays", "tab\tstays"),
        ("\x1b[31mred\x1b[0m", "red"),
        ("half \ud83d pair", "half \ufffd pair"),
        ("👨\u200d👩\u200d👧 ❤\ufe0f\u200d🔥", "👨\u200d👩\u200d👧 ❤\ufe0f\u200d🔥"),
        ("a\u200db \u200d👩", "ab 👩"),
        ("می\u200cخواهم", "می\u200cخواهم"),  # Persian: another word without the non-joiner
        ("क्\u200dष", "क्\u200dष"),
        ("ශ්\u200dරී", "ශ්\u200dරී"),
        ("ไทย\u200bไทย a\u200bb", "ไทย\u200bไทย ab"),
        (
            "🏴\U000e0067\U000e0062\U000e0073\U000e0063\U000e0074\U000e007f",
            "🏴\U000e0067\U000e0062\U000e0073\U000e0063\U000e0074\U000e007f",
        ),
        ("hidden\U000e0068\U000e0069", "hidden"),
        ("\u202eevil\u202c", "evil"),
    ],
)
def test_control_characters(text, expected):
    assert n.control_characters(text) == expected


def test_full_width():
    assert n.full_width("ＡＢＣ１２３，　好！") == "ABC123， 好！"
    assert n.full_width("ＡＢＣ，好！", "all") == "ABC,好!"


def test_quotes():
    assert n.quotes("「他說『好』」") == "“他說‘好’”"
    assert n.quotes("“他说‘好’”", "corner") == "「他说『好』」"
    assert n.quotes("“他说‘好’”", "ascii") == "\"他说'好'\""


@given(st.text(st.sampled_from("e\u0301\u0323あ\u3099가ᄀ\u1161a ²"), max_size=40))
def test_nfc_is_that_of_unicode_where_no_letter_has_more_than_30_marks(text):
    if "\u0301" * 20 not in text:
        assert n.nfc(text) == unicodedata.normalize("NFC", text)


def test_a_letter_keeps_30_marks():
    assert n.nfc("x" + "\u0301" * 1000 + "y") == "x" + "\u0301" * 30 + "y"


def test_white_space():
    text = "  a  b\u00a0\tc \n \n\n\nd\u3000 \n"
    assert n.spaces(text) == "  a b c \n \n\n\nd \n"
    assert n.trailing_whitespace("  a \t\n\u3000\nb") == "  a\n\nb"
    assert n.blank_lines("\n \n  a\n\n \n\nb\n\n") == "  a\n\nb"
    assert n.blank_lines("a\n\n\n\nb", 2) == "a\n\n\nb"
    assert n.indentation(" a\n\t b") == "a\nb"


@pytest.mark.parametrize(
    "text",
    [
        " " * 1_000_000 + "x",
        "a" + "\u0301\u0316" * 500_000,
        "\n \n" * 300_000,
        "\u200d" * 1_000_000,
        "\x1b[0" * 300_000,
        "&#" * 500_000,
        "👨\u200d" * 300_000,
    ],
)
def test_a_million_characters_on_one_line_take_a_moment(text):
    start = time.process_time()
    for step in (n.entities, n.control_characters, n.nfc, n.spaces, n.trailing_whitespace, n.blank_lines):
        step(text)
    assert time.process_time() - start < 8  # what is quadratic takes hours
