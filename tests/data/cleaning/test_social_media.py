import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptjax.data.cleaning.social_media import emoji, laughter, mentions, repeated_punctuation, urls

_FRAGMENTS = [
    *[
        "@bob",
        "@张三",
        "@",
        "//",
        "回复",
        ":",
        " ",
        "\n",
        "http://",
        "https://a.b/c",
        "www.",
        ".",
        "哈",
        "呵呵呵",
    ],
    *["233", "3", "ha", "h", "!", "…", "[doge]", "[", "]", "笑cry", "(", "👍", "👨\u200d👩", "❤\ufe0f"],
    *["1\ufe0f\u20e3", "\ufe0f", "\u20e3", "#", "🇨🇳", "a", "x"],
]
texts = st.text(st.characters(exclude_categories=[])) | st.lists(st.sampled_from(_FRAGMENTS), max_size=12).map("".join)


@pytest.mark.parametrize(
    ("step", "handling"),
    [(step, handling) for step in (urls, mentions) for handling in ("keep", "remove", "placeholder")]
    + [(emoji, "keep"), (emoji, "remove"), (laughter, "keep"), (laughter, "squeeze"), (laughter, "word")],
)
@given(text=texts)
def test_a_step_takes_any_text_and_a_second_application_changes_nothing(step, handling, text):
    once = step(text, handling)
    assert step(once, handling) == once
    assert handling != "keep" or once == text


@given(texts)
def test_punctuation_is_not_squeezed_twice(text):
    assert repeated_punctuation(repeated_punctuation(text)) == repeated_punctuation(text)


@pytest.mark.parametrize(
    ("text", "squeezed", "word"),
    [
        ("呵呵呵呵", "呵呵", "笑"),
        ("他哈哈哈哈哈地笑", "他哈哈地笑", "他笑地笑"),
        ("哈哈镜和笑呵呵", "哈哈镜和笑呵呵", "哈哈镜和笑呵呵"),
        ("233333", "233", "笑"),
        ("真的233333太好笑", "真的233太好笑", "真的笑太好笑"),
        ("hahahaha ok, HHHHHH", "haha ok, HHH", "笑 ok, 笑"),
        ("aha, hhgttg, Rahahaham", "aha, hhgttg, Rahahaham", "aha, hhgttg, Rahahaham"),
    ],
)
def test_laughter(text, squeezed, word):
    assert laughter(text) == squeezed
    assert laughter(text, "word") == word


@pytest.mark.parametrize(
    "number", ["23333元", "¥23333", "0.23333", "123333", "23333.5", "id23333", "233", "编号23333", "号码23333"]
)
def test_a_number_is_no_laughter(number):
    assert laughter(number) == number


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("好👍🏽棒👨\u200d👩\u200d👧", "好棒"),
        ("❤\ufe0f 1\ufe0f\u20e3 🇨🇳", "  "),
        ("笑死[笑cry][doge]", "笑死"),
        ("see [doge](http://a.b) and [1]", "see [doge](http://a.b) and [1]"),
        ("© 2024 → ★ 3 × 4 # *", "© 2024 → ★ 3 × 4 # *"),
    ],
)
def test_emoji_removed(text, expected):
    assert emoji(text, "remove") == expected


@pytest.mark.parametrize(
    ("text", "removed", "placeholder"),
    [
        ("你好@张三 再见", "你好 再见", "你好@user 再见"),
        ("转发//@李四_1:好的", "转发 好的", "转发@user好的"),
        ("回复@王五:谢谢", "谢谢", "@user谢谢"),
        ("mail me@example.org", "mail me@example.org", "mail me@example.org"),
        ("a @ b", "a @ b", "a @ b"),
    ],
)
def test_mentions(text, removed, placeholder):
    assert mentions(text, "remove") == removed
    assert mentions(text, "placeholder") == placeholder


@pytest.mark.parametrize(
    ("text", "removed", "placeholder"),
    [
        ("看http://t.cn/Abc?x=1。好", "看 。好", "看<url>。好"),
        ("[a](https://a.org/b?c#d), ok", "[a]( ), ok", "[a](<url>), ok"),
        ("www.example.com", "", "<url>"),
        ("http is a protocol: http://", "http is a protocol: http://", "http is a protocol: http://"),
    ],
)
def test_urls(text, removed, placeholder):
    assert urls(text, "remove") == removed
    assert urls(text, "placeholder") == placeholder


def test_repeated_punctuation():
    assert repeated_punctuation("什么！！！！！！……………… no!!!!! -----") == "什么！！！…… no!!! ---"
    assert repeated_punctuation("a... b?!?! «««««") == "a... b?!?! «««««"


@pytest.mark.parametrize(
    "text",
    [
        "@" * 1_000_000,
        "@张三" * 300_000 + "@",
        "http://" * 150_000,
        "哈" * 1_000_000,
        "ha" * 500_000 + "x",
        "[doge" * 200_000,
        " " * 1_000_000,
        "👨\u200d" * 300_000,
    ],
)
def test_a_million_characters_on_one_line_take_a_moment(text):
    start = time.process_time()
    for step in (urls, mentions, emoji):
        step(text, "remove")
    laughter(text)
    repeated_punctuation(text)
    assert time.process_time() - start < 8  # what is quadratic takes hours


def test_two_syllables_are_laughter_in_chinese_only():
    from gptjax.data.cleaning.cleaner import Cleaner
    from gptjax.data.cleaning.normalization import full_width
    from gptjax.data.cleaning.social_media import emails, laughter

    texts = ["呵呵", "呵呵呵", "好笑呵呵", "笑呵呵的老人", "哈哈镜", "haha"]
    expected = ["笑", "笑", "好笑笑", "笑呵呵的老人", "哈哈镜", "haha"]
    assert [laughter(text, "word") for text in texts] == expected
    guide = Cleaner("guide")
    assert "笑" in guide.text("呵呵") and "http" not in guide.text("@小明 http://t.cn/abc 天气")
    assert emails("写给 a.b@example.org 吧", "remove").split() == ["写给", "吧"]
    assert full_width("３．１４ 和 １，０００，好") == "3.14 和 1,000，好"
    assert full_width("１２，３４５，６７８人") == "12,345,678人"
    for text in ("4=12，50%", "2024，2025年", "12，34，56", "20240，100人"):  # a comma of prose parts two numbers
        assert full_width(text) == text
