"""Steps that unify spellings of the same text: characters, Unicode forms, white space.

Each step is a pure function str -> str that takes any str and runs in linear time. All but `entities` are
idempotent: a second application changes nothing.
"""

import html
import re
import unicodedata

# Entities with their semicolon only: "?a=1&copy=2" is an address, not a copyright sign.
_ENTITY = re.compile(r"&(?:#[0-9]{1,7}|#[xX][0-9a-fA-F]{1,6}|[A-Za-z][A-Za-z0-9]{1,31});")


def entities(text: str) -> str:
    """Replaces HTML entities by their characters, once: "&amp;lt;" becomes "&lt;"."""
    return _ENTITY.sub(lambda match: html.unescape(match[0]), text) if "&" in text else text


# Scripts whose letters join or stack, so that a joiner or non-joiner is spelling: Arabic to Sinhala, Myanmar,
# Khmer, Mongolian, and the supplementary Brahmic blocks.
_JOINING = "\u0600-\u0dff\u1000-\u109f\u1780-\u18af\ua980-\ua9df\U00011000-\U00011fff"
_EMOJI_PARTS = (
    "\u00a9\u00ae\u2194-\u21aa\u231a-\u231b\u23e9-\u23f3\u2600-\u27bf\u2b00-\u2bff\ufe0f\U0001f000-\U0001faff"
)
# Thai, Lao, Myanmar and Khmer mark the borders of words with a zero-width space.
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"
_KEPT = (
    r"\U0001f3f4[\U000e0030-\U000e007a]{1,8}\U000e007f"  # flags of regions, such as Scotland's
    rf"|(?<=[{_JOINING}])[\u200c\u200d]"
    rf"|(?<=[{_EMOJI_PARTS}])\u200d(?=[{_EMOJI_PARTS}])"
    rf"|(?<=[{_UNSPACED}])\u200b(?=[{_UNSPACED}])"
    r"|(?<=[\u1820-\u18aa])\u180e"
)
_BREAKS = r"\r\n|[\r\x0b\x0c\x1c-\x1e\x85\u2028\u2029]"
_INVISIBLE = (
    r"\x1b\[[0-9;?]{0,32}[@-~]"  # colours of a terminal
    r"|[\x00-\x08\x0e-\x1f\x7f-\x9f\xad\u180e\u200b-\u200f\u202a-\u202e\u2060-\u206f\ufeff\ufff9-\ufffc"
    r"\ufdd0-\ufdef\ufffe\uffff\U000e0000-\U000e007f]"
)
_SURROGATES = r"[\ud800-\udfff]"
_CONTROLS = re.compile(f"(?P<kept>{_KEPT})|(?P<breaks>{_BREAKS})|(?P<surrogate>{_SURROGATES})|{_INVISIBLE}")
_SUSPECT = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufdd0-\ufdef\ufeff"
    "\ufff9-\ufffc\ufffe\uffff\ud800-\udfff\U000e0000-\U000e007f]"
)
_WRITTEN = {"breaks": "\n", "surrogate": "\ufffd"}


def control_characters(text: str) -> str:
    """Removes invisible characters: control and zero-width characters, byte order marks, directional marks.

    Line and page ends of every kind become "\\n"; tabs stay; half a surrogate pair becomes U+FFFD. Zero-width
    characters that are spelling stay: a joiner inside an emoji sequence (U+1F468 U+200D U+1F469), joiner and
    non-joiner after a letter of a script that joins (Persian, Hindi, Sinhala), the zero-width space between
    Thai, Lao, Myanmar or Khmer letters, the tags of a flag. Other tag characters can hide text (Unicode TR 36)
    and are removed.
    """
    if not _SUSPECT.search(text):  # a single character class is five times as fast as _CONTROLS
        return text
    return _CONTROLS.sub(
        lambda match: match[0] if match.lastgroup == "kept" else _WRITTEN.get(match.lastgroup or "", ""), text
    )


_FULL_WIDTH_LETTERS = {
    code: code - 0xFEE0
    for code in range(0xFF01, 0xFF5F)
    if chr(code - 0xFEE0).isalnum() or chr(code - 0xFEE0) in "#$%&*+-/<=>@\\^_`{|}"
}
# A stop between two digits; a comma only before a group of three, since others part numbers: 12，50％ or 2024，2025年.
_MARK_IN_NUMBER = re.compile("(?<=[0-9])(?:\uff0e(?=[0-9])|(?<![0-9]{4})\uff0c(?=[0-9]{3}(?![0-9])))")
_FULL_WIDTH_ALL = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)}


def full_width(text: str, scope: str = "letters") -> str:
    """Full-width forms (U+FF01 to U+FF5E) to ASCII, and the ideographic space to a space.

    Args:
      scope: "letters" maps letters, digits and signs, and keeps the punctuation of Chinese prose, such as U+FF0C,
        except a full stop between two digits or a comma before a group of three, which are part of a number; "all"
        maps punctuation too.
    """
    text = text.translate(_FULL_WIDTH_ALL if scope == "all" else _FULL_WIDTH_LETTERS).replace("\u3000", " ")
    return _MARK_IN_NUMBER.sub(lambda match: "." if match[0] == "\uff0e" else ",", text)


_QUOTES = {
    "curly": str.maketrans("「」『』〝〞〟＂﹁﹂﹃﹄", '“”‘’“””"“”‘’'),
    "corner": str.maketrans("“”‘’〝〞〟＂﹁﹂﹃﹄", '「」『』「」」"「」『』'),
    "ascii": str.maketrans("“”‘’„‟‚‛「」『』〝〞〟＂﹁﹂﹃﹄", '""\'\'""\'\'""\'\'""""""\'\''),
}


def quotes(text: str, style: str = "curly") -> str:
    """Quotation marks of Chinese in one style: "curly" (“ ” ‘ ’), "corner" (「 」 『 』) or "ascii" (" ')."""
    return text.translate(_QUOTES[style])


_MARKS = re.compile(r"[^\w\s\x00-\x7f]{31,}")
_MAX_MARKS = 30


def nfc(text: str) -> str:
    """Unicode normalisation form C; see `_limit_marks`."""
    return text if text.isascii() else unicodedata.normalize("NFC", _limit_marks(text))


def nfkc(text: str) -> str:
    """Unicode normalisation form KC, which also loses differences of meaning: x² becomes x2."""
    return text if text.isascii() else unicodedata.normalize("NFKC", _limit_marks(text))


def _limit_marks(text: str) -> str:
    """At most 30 combining marks in a row, the limit of Unicode's stream-safe text (UAX 15, section 13).

    Normalisation sorts the marks of a letter in quadratic time: 64,000 of them take 5 s.
    """

    def shortened(match: re.Match[str]) -> str:
        kept, run = [], 0
        for character in match[0]:
            run = run + 1 if unicodedata.combining(character) else 0
            if run <= _MAX_MARKS:
                kept.append(character)
        return "".join(kept)

    return _MARKS.sub(shortened, text)


_UNICODE_SPACES = re.compile("[\xa0\u1680\u2000-\u200a\u202f\u205f\u3000]")
_INNER_SPACES = re.compile(r"(?<=\S)(?:[ \t]{2,}|\t)")


def spaces(text: str) -> str:
    """One ASCII space for every run of spaces and tabs within a line; the indentation of a line stays."""
    if not text.isascii():
        text = _UNICODE_SPACES.sub(" ", text)
    return _INNER_SPACES.sub(" ", text)


def indentation(text: str) -> str:
    """Removes white space at the beginnings of lines."""
    return "\n".join(line.lstrip() for line in text.split("\n"))


def trailing_whitespace(text: str) -> str:
    """Removes white space at the ends of lines."""
    return "\n".join(line.rstrip() for line in text.split("\n"))


_FIRST_BLANK = re.compile(r"\A(?:[^\S\n]*\n)+")


def blank_lines(text: str, most: int = 1) -> str:
    """At most `most` blank lines in a row, and none at the beginning and the end."""
    text = re.sub(rf"\n(?:[^\S\n]*\n){{{most + 1},}}", "\n" * (most + 1), text)
    return _FIRST_BLANK.sub("", text).rstrip()
