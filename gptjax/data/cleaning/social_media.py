"""Steps for texts of social media, above all Weibo: laughter, emoji, names, addresses, "！！！！！".

Each step is a pure, idempotent function str -> str that takes any str and runs in linear time.
"""

import re

from gptjax.data.scripts import HAN

_PICTURE = (
    "[\u231a\u231b\u23e9-\u23f3\u25fd\u25fe\u2614\u2615\u2648-\u2653\u267f\u2693\u26a1\u26aa\u26ab\u26bd\u26be\u26c4"
    "\u26c5\u26ce\u26d4\u26ea\u26f2\u26f3\u26f5\u26fa\u26fd\u2705\u270a\u270b\u2728\u274c\u274e\u2753-\u2755\u2757"
    "\u2795-\u2797\u27b0\u27bf\u2b1b\u2b1c\u2b50\u2b55\U0001f000-\U0001faff]\ufe0f?"
    "|[\u00a9\u00ae\u203c\u2049\u2122\u2139\u2194-\u21aa\u2328\u23cf\u24c2\u25aa-\u27bf\u2934\u2935\u2b05-\u2b55"
    "\u3030\u303d\u3297\u3299]\ufe0f"
)
_EMOJI = re.compile(
    f"(?:{_PICTURE})(?:\u200d(?:{_PICTURE}|[\u2600-\u27bf]))*[\U000e0020-\U000e007f]*|[0-9#*]\ufe0f?\u20e3|[\ufe0f\u20e3]"
)
_EMOTICON_LETTERS = re.compile(rf"[A-Za-z{HAN}]{{1,8}}")


def emoji(text: str, handling: str = "keep") -> str:
    """Emoji, and Weibo's codes such as [doge] and [笑cry], kept ("keep") or removed ("remove")."""
    if handling == "keep":
        return text
    return _without_codes(_EMOJI.sub("", text))


def _without_codes(text: str) -> str:
    # Once an inner code is removed, the rest can be a code itself: one pass that looks back finds both.
    written: list[str] = []
    for index, character in enumerate(text):
        written.append(character)
        if character != "]" or text[index + 1 : index + 2] == "(":  # [word](address) is a link in Markdown
            continue
        tail = "".join(written[-10:])
        start = tail.rfind("[")
        if start >= 0 and _EMOTICON_LETTERS.fullmatch(tail[start + 1 : -1]):
            del written[start - len(tail) :]
    return "".join(written)


_URL = re.compile(
    r"(?P<before>[ \t]{0,8})(?:https?://|www\.)[\w\-.~:/?#\[\]@!$&'()*+,;=%]+(?<![.,;:!?)\]'])"
    r"(?P<after>[ \t]{0,8})",
    re.IGNORECASE | re.ASCII,
)
_MENTION = re.compile(
    r"(?P<before>[ \t]{0,8})(?:(?:回复|//)@[\w\-]{2,30}[:：]|(?<![A-Za-z0-9_.@])(?:@[\w\-]{2,30})+(?![\w\-]))"
    r"(?P<after>[ \t]{0,8})"
)


def urls(text: str, handling: str = "keep") -> str:
    """Web addresses kept ("keep"), removed ("remove") or written as <url> ("placeholder")."""
    return _handled(_URL, text, handling, "<url>")


_EMAIL = re.compile(
    r"(?P<before>[ \t]{0,8})(?<![\w.+\-])[\w.+\-]{1,64}@(?:[a-z0-9\-]{1,63}\.){1,8}[a-z]{2,24}(?![\w\-])"
    r"(?P<after>[ \t]{0,8})",
    re.IGNORECASE | re.ASCII,
)


def emails(text: str, handling: str = "keep") -> str:
    """Addresses of e-mail kept ("keep"), removed ("remove") or written as <email> ("placeholder")."""
    return _handled(_EMAIL, text, handling, "<email>") if "@" in text else text


def mentions(text: str, handling: str = "keep") -> str:
    """Names of users kept ("keep"), removed ("remove") or written as @user ("placeholder").

    A name is @ and 2 to 30 letters, digits, - or _ that follow no ASCII letter (name@example.org is an e-mail
    address), with Weibo's 回复@name: and //@name: around it.
    """
    return _handled(_MENTION, text, handling, "@user")


def _handled(pattern: re.Pattern[str], text: str, handling: str, placeholder: str) -> str:
    if handling == "keep":
        return text

    def replacement(match: re.Match[str]) -> str:
        if handling == "placeholder":
            return f"{match['before']}{placeholder}{match['after']}"
        # A space stays between the neighbours; joined, they could become a new name or address.
        at_line_start = match.start() == 0 or text[match.start() - 1] == "\n"
        return "" if at_line_start else " "

    return pattern.sub(replacement, text)


_LAUGHTER = re.compile(
    r"(?P<han>[哈呵嘿嘻嘎])[哈呵嘿嘻嘎]{2,}"
    # 2333 is number 233 of a forum's smileys, unless it counts something.
    r"|(?<![0-9A-Za-z_.,¥￥$#第号码])2333+(?![0-9A-Za-z_%％年月日号元万亿千百个块米人次点分只]|[.,][0-9])"
    r"|(?<![A-Za-z])(?:(?P<ha>[Hh][Aa])(?:[Hh][Aa]){2,}[Hh]?|(?P<h>[Hh])[Hh]{3,})(?![A-Za-z])"
)


# Two syllables are laughter in Chinese (好笑呵呵), except in descriptions such as 笑呵呵, and in 哈哈镜, a mirror.
_SHORT_LAUGHTER = re.compile(r"(?<![乐傻美打])(?<!(?<![好可搞])笑)(?P<two>[哈呵嘿嘻])(?P=two)(?!镜)")


def laughter(text: str, handling: str = "squeeze") -> str:
    """Written laughter of three or more syllables: 呵呵呵呵, 哈哈哈哈, 233333, hahaha, hhhh.

    Args:
      handling: "squeeze" shortens it (呵呵, 哈哈, 233, haha, hhh); "word" writes 笑, also for 呵呵, 哈哈, 嘿嘿 and
        嘻嘻 of two syllables; "keep" leaves it. Two syllables in Latin letters (haha, hehe) stay, since other
        languages have such names and words.
    """
    if handling == "keep":
        return text

    def shortened(match: re.Match[str]) -> str:
        if handling == "word":
            return "笑"
        if match["h"]:
            return match["h"] * 3
        if syllable := match["han"] or match["ha"]:
            return syllable * 2
        return "233"

    text = _LAUGHTER.sub(shortened, text)
    return _SHORT_LAUGHTER.sub("笑", text) if handling == "word" else text


_REPEATED = re.compile(r"(?P<ellipsis>…){3,}|(?P<mark>[!?.,;:~*=_#\-。！？，、；：～·—])(?P=mark){3,}")


def repeated_punctuation(text: str) -> str:
    """Keeps at most three equal marks in a row, and two ellipses, since Chinese writes the ellipsis twice."""
    return _REPEATED.sub(lambda match: "……" if match["ellipsis"] else match["mark"] * 3, text)
