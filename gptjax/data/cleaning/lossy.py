"""Steps that popular guides advise for text classification; the original text cannot be restored from the result.

A model trained on their output generates lower-case words without stop words or punctuation. All steps are
pure functions str -> str that take any str; all but `segment` are idempotent.
"""

import functools
import re
import unicodedata

from gptjax.data.scripts import HAN
from gptjax.errors import UserError


def lowercase(text: str) -> str:
    return text.lower()


class _SpaceForCategory(dict):
    """A table for str.translate: a space for each character whose Unicode category begins with `first`."""

    def __init__(self, first: str):
        self._first = first

    def __missing__(self, code: int) -> int:
        self[code] = 32 if unicodedata.category(chr(code))[0] in self._first else code
        return self[code]


_SYMBOLS = _SpaceForCategory("SC")
_PUNCTUATION = _SpaceForCategory("P")
for _white_space in "\t\n\r":
    _SYMBOLS[ord(_white_space)] = ord(_white_space)


def special_characters(text: str) -> str:
    """Replaces every symbol, emoji and control character by a space; keeps letters, digits, marks, punctuation."""
    return text.translate(_SYMBOLS)


def punctuation(text: str) -> str:
    """Replaces every punctuation mark, also the apostrophe, by a space."""
    return text.translate(_PUNCTUATION)


def segment(text: str) -> str:
    """Puts spaces between the words of Chinese text (jieba); other text stays as it is.

    Raises:
      UserError: jieba is not installed.
    """
    return _HAN.sub(lambda match: f" {' '.join(_jieba().cut(match[0]))} ", text)


_HAN = re.compile(f"[{HAN}]+")


@functools.cache
def _jieba():
    try:
        import jieba
    except ImportError:
        raise UserError(
            "the cleaning step segment needs jieba, which is not installed: pip install 'gptjax[data]'"
        ) from None
    jieba.setLogLevel(60)
    return jieba.Tokenizer()


_WORD = re.compile(r"\w+")


def stop_words(text: str) -> str:
    """Removes the words in a short list of English and Chinese function words.

    Chinese words must be separated before (`segment`), and English contractions split (`punctuation`).
    """
    return _WORD.sub(lambda match: "" if match[0].lower() in STOP_WORDS else match[0], text)


STOP_WORDS = frozenset(
    """
    a about above after again against ain all am an and any are aren as at be because been before being
    below between both but by can couldn d did didn do does doesn doing don down during each few for from
    further had hadn has hasn have haven having he her here hers herself him himself his how i if in into is
    isn it its itself just ll m ma me mightn more most mustn my myself needn no nor not now o of off on once
    only or other our ours ourselves out over own re s same shan she should shouldn so some such t than that
    the their theirs them themselves then there these they this those through to too under until up ve very
    was wasn we were weren what when where which while who whom why will with won would wouldn y you your
    yours yourself yourselves
    的 了 和 是 就 都 而 及 与 或 在 也 很 把 被 让 给 从 向 到 对 对于 关于 由 由于 为 为了 因为 所以 因此
    但 但是 不过 然而 虽然 如果 则 那么 这 那 这个 那个 这些 那些 这里 那里 这样 那样 哪 哪里 什么 怎么 怎样
    我 你 您 他 她 它 我们 你们 他们 她们 它们 咱们 自己 有 没有 不 没 还 又 再 才 只 并 并且 而且 以及 且
    等 等等 着 过 地 得 吗 呢 吧 啊 呀 啦 嘛 哦 之 其 此 以 于 个 们 一个 一些 一种 上 下 中 里 将 会 能
    可以 要 去 来 说 看 好 更 最 太 非常 已 已经 曾 曾经 正在
    """.split()  # noqa: SIM905
)
