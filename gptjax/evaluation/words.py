"""What counts as a word for ROUGE and F1, and which of sacrebleu's tokenizers fits a text."""

from collections.abc import Callable, Iterable

import regex

from gptjax.data.scripts import count_han

Words = Callable[[str], list[str]]

# Scripts that put no space between words: each letter, with its marks, counts as a word.
UNSPACED = r"[\p{Han}\p{Hiragana}\p{Katakana}\u30fc\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]"

_UNSPACED = regex.compile(rf"(?=\p{{L}}){UNSPACED}")
_UNICODE_WORD = regex.compile(rf"(?=[\p{{L}}\p{{N}}]){UNSPACED}\p{{M}}*|(?:(?!{UNSPACED})[\p{{L}}\p{{N}}]\p{{M}}*)+")
_ASCII_WORD = regex.compile("[a-z0-9]+")
_LETTER = regex.compile(r"\p{L}")
_ASCII_LETTER = regex.compile("[a-zA-Z]")
_MOST = 0.9  # least share of ASCII letters for rouge_score's own words


def choose_tokenizer(texts: Iterable[str]) -> str:
    """sacrebleu's tokenizer for texts: "zh" where most letters are Han, "char" where most are of scripts without
    spaces (Japanese, Thai), else "13a" (words). With 13a a whole Japanese sentence would be one word."""
    letters = han = unspaced = 0
    for text in texts:
        letters += sum(map(str.isalpha, text))
        if not text.isascii():
            han += count_han(text)
            unspaced += len(_UNSPACED.findall(text))
    if 2 * han > letters:
        return "zh"
    return "char" if 2 * unspaced > letters else "13a"


def rouge_words(texts: Iterable[str]) -> str:
    """The name of the words of ROUGE for references: "default", rouge_score's own (a-z and 0-9), where nine of ten
    letters are those and no text would lose all of its letters; else "unicode"."""
    letters = ascii_letters = 0
    for text in texts:
        own = len(_ASCII_LETTER.findall(text))
        if not text.isascii():
            found = len(_LETTER.findall(text))
            if found and not default_words(text):
                return "unicode"
            letters += found
        else:
            letters += own
        ascii_letters += own
    return "default" if ascii_letters >= _MOST * letters else "unicode"


def default_words(text: str) -> list[str]:
    """rouge_score's own words: a-z and 0-9 of the lower-cased text."""
    return _ASCII_WORD.findall(text.lower())


def unicode_words(text: str) -> list[str]:
    """Letters and digits of any script with their marks, in lower case; a letter of `UNSPACED` is a word."""
    return _UNICODE_WORD.findall(text.lower())


def split_unspaced(text: str) -> str:
    """The text with spaces around each letter of scripts without spaces."""
    return regex.sub(rf"(?=\p{{L}})({UNSPACED}\p{{M}}*)", r" \1 ", text)


ROUGE_WORDS: dict[str, Words] = {"default": default_words, "unicode": unicode_words}
