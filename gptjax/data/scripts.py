"""Which characters are Chinese: ranges for a character class, as in re.compile(f"[{HAN}]")."""

import re

# The ideographs: CJK unified ideographs with all extensions and compatibility forms.
HAN = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"

# All that Unicode gives the script Han: also radicals, the iteration mark, zero and the numerals of Suzhou.
HAN_SCRIPT = rf"\u2e80-\u2fdf\u3005\u3007\u3021-\u3029\u3038-\u303b{HAN}"
HAN_SCRIPT_RUN = r"\p{Han}+"  # a run of them in the syntax of Oniguruma, which `tokenizers` uses

# Letters of languages that put no space between words, so that each counts as a word: ideographs with the iteration
# mark and zero, kana, Bopomofo.
UNSPACED = rf"\u3005-\u3007\u3040-\u30ff\u3105-\u312f\u31f0-\u31ff{HAN}"

_HAN = re.compile(f"[{HAN}]")


def count_han(text: str) -> int:
    """How many ideographs are in a text."""
    return len(_HAN.findall(text))
