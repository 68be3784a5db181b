import itertools
import json
import logging
import pickle
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptjax.data.cleaning import cleaner as cleaning_module
from gptjax.data.cleaning.cleaner import Cleaner, CleaningCounts
from gptjax.data.cleaning.steps import OPTIONS, PROFILES, STEPS, parse_profile
from gptjax.errors import UserError

anything = st.text(st.characters(exclude_categories=[]), max_size=60)
_FRAGMENTS = [
    *[
        "Ａ",
        "\u0301",
        "「",
        "哈哈哈哈",
        "@bob ",
        "http://a.b",
        "😀",
        "\u200d",
        "\r",
        "\n",
        " ",
        "\t",
        "！！！！！",
    ],
    *["&amp;", "233333", "The ", "don't", "İ", "的", "\ufeff", "\x00"],
]
fragments = st.lists(st.sampled_from(_FRAGMENTS), max_size=14).map("".join)


def document(text: str, **fields) -> dict:
    return {"text": text, "id": "d", "source": "s", **fields}


def dialogue(*contents: str) -> dict:
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]
    return {"messages": messages, "id": "d", "source": "s"}


# Profiles


@pytest.mark.parametrize("profile", ["plain", "code", "dialogue", "chinese", "chinese-urls-mentions"])
@settings(deadline=None, max_examples=60)
@given(text=anything | fragments)
def test_a_cleaned_text_is_clean(profile, text):
    cleaner = Cleaner(profile)
    once = cleaner(document(text))
    assert once is None or cleaner(once) == once


@pytest.mark.parametrize("profile", ["web", "guide", "web+emoji-language+nfkc"])
@settings(deadline=None, max_examples=40)
@given(text=anything | fragments | anything.map("<p>{}".format))
def test_no_text_raises(profile, text):
    for name in ("trafilatura", "jieba"):
        pytest.importorskip(name)
    Cleaner(profile).clean(document(text), CleaningCounts())


def test_none_changes_nothing():
    for text in ("", " \r\n\ufeff"):
        assert Cleaner("none")(document(text)) == document(text)


@pytest.mark.parametrize(
    ("profile", "text", "expected"),
    [
        ("plain", "\ufeffA\u00a0 b\r\n\r\n\r\n\r\n  c\u200b \t\n", "A b\n\n  c"),
        ("code", "\tif x:  \n\t\ty  =  1\n\n\n\n\nz\n", "\tif x:\n\t\ty  =  1\n\n\nz"),
        (
            "chinese",
            "「ＡＢＣ」　好！！！！！！哈哈哈哈哈 回复@张三:看http://t.cn/x",
            "“ABC” 好！！！哈哈 看",
        ),
        ("guide", "<p>The <b>cats</b> don't like 3 dogs &amp; ☃!</p>", "cats like 3 dogs"),
    ],
)
def test_profiles(profile, text, expected):
    if profile == "guide":
        pytest.importorskip("jieba")
    assert Cleaner(profile)(document(text))["text"] == expected


def test_guide_segments_chinese_and_warns(caplog):
    pytest.importorskip("jieba")
    with caplog.at_level(logging.WARNING):
        cleaner = Cleaner("guide")
    assert not cleaner.invertible
    assert "the original cannot be restored" in caplog.text
    assert cleaner(document("我们的猫，喜欢在花园里睡觉。"))["text"] == "猫 喜欢 花园里 睡觉"
    caplog.clear()
    assert not pickle.loads(pickle.dumps(cleaner)).invertible
    assert caplog.text == ""  # once, not in every worker


def test_other_profiles_are_invertible(caplog):
    assert all(Cleaner(name).invertible for name in PROFILES if name != "guide")
    assert caplog.text == ""


def test_web_extracts_and_filters():
    pytest.importorskip("trafilatura")
    rng = random.Random(0)
    words = [f"word{number}" for number in range(500)]
    article = " ".join(f"The {' '.join(rng.choices(words, k=9))}." for _ in range(30))
    cleaner = Cleaner("web", options={"min_characters": 100})
    page = f"<html><nav><a>Menu</a></nav><article><p>{article}</p></article></html>"
    assert cleaner(document(page))["text"] == article
    assert cleaner(document("<p>Too short</p>")) is None
    assert cleaner(document("<p>" + "spam and eggs " * 100)) is None


# Specs and options


def test_a_spec_adds_and_removes_steps_in_their_own_order():
    steps, _ = parse_profile("web-entities+emoji+strip_tags")
    assert "entities" not in steps
    assert list(steps) == [name for name in STEPS if name in steps]
    assert {"emoji", "strip_tags"} < set(steps)
    assert parse_profile("spaces, nfc")[0] == ("spaces", "nfc")


@pytest.mark.parametrize(
    ("spec", "options", "message"),
    [
        ("wbe", {}, "did you mean web"),
        ("web+emojis", {}, "did you mean emoji"),
        ("nfc,", {}, "neither a profile .* nor a step"),
        ("web", {"min_charcters": 3}, "did you mean min_characters"),
        ("web", {"min_characters": -1}, "min_characters=-1: expected 0 to"),
        ("web", {"min_characters": 0.5}, "expected a whole number"),
        ("web", {"max_symbol_ratio": 2}, "max_symbol_ratio=2: expected 0 to 1"),
        ("web", {"emoji": "drop"}, "emoji='drop': expected one of keep, remove"),
        ("web", {"languages": "english"}, "expected ISO 639-1"),
        ("web", {"languages": 3}, "expected ISO 639-1"),
    ],
)
def test_mistakes_in_a_spec_are_named(spec, options, message):
    with pytest.raises(UserError, match=message):
        Cleaner(spec, options=options)


def test_options_are_those_of_the_profile_unless_given():
    assert Cleaner("web").options["min_characters"] == PROFILES["web"].options["min_characters"]
    assert Cleaner("web", options={"min_characters": None}).options == Cleaner("web").options
    assert Cleaner("web", options={"min_characters": 7, "languages": "EN, zh"}).options["min_characters"] == 7
    assert Cleaner("web", options={"languages": ["en", "zh"]}).options["languages"] == ("en", "zh")


def test_every_option_is_used_by_a_step():
    used = set()

    class Recording(dict):
        def __getitem__(self, key):
            used.add(key)
            return super().__getitem__(key)

    options = Recording({name: option.default for name, option in OPTIONS.items()} | {"languages": ()})
    for name in STEPS:
        if name in ("html", "segment"):
            continue
        step = STEPS[name]
        step.transform("x", options) if step.transform else step.reject("x", 1, options)
    assert used == set(OPTIONS)


def test_a_missing_library_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "trafilatura", None)
    with pytest.raises(UserError, match=r"trafilatura, .*pip install 'gptjax\[data\]'"):
        Cleaner("web")(document("<p>text</p>"))


# Documents


def test_fields_that_are_not_text_stay():
    given = document("a  b ", split="test", split_key="a  b ", references=["a  b "])
    assert Cleaner("plain")(given) == {**given, "text": "a b"}
    assert given["text"] == "a  b "


def test_the_prompt_stays_the_beginning_of_its_text():
    given = document("Name:\u00a0 Bob\n\nAnswer:  yes ", prompt="Name:\u00a0 Bob\n\nAnswer: ")
    cleaned = Cleaner("plain")(given)
    assert cleaned["text"].startswith(cleaned["prompt"])


def test_each_message_is_cleaned_and_none_may_become_empty():
    cleaner = Cleaner("dialogue")
    cleaned = cleaner(dialogue("Hi\ufeff ", "  x = 1\r\n  y  =  2 \n"))
    assert [message["content"] for message in cleaned["messages"]] == ["Hi", "  x = 1\n  y  =  2"]
    assert [message["role"] for message in cleaned["messages"]] == ["user", "assistant"]
    counts = CleaningCounts()
    assert cleaner.clean(dialogue("Hi", "\u200b\ufeff"), counts) is None
    assert counts.steps["control_characters"].removed[0]["reason"] == "nothing is left"


def test_filters_judge_a_dialogue_as_a_whole():
    assert Cleaner("length", options={"min_characters": 6})(dialogue("abc", "def")) is not None
    assert Cleaner("length", options={"min_characters": 8})(dialogue("abc", "def")) is None


def test_parts_join_as_before():
    text = "one  two \u00a0\n\n\nthree\tfour  five"
    cuts = [0, 3, 8, 14, 20, len(text)]
    cleaner = Cleaner("plain", options={"min_characters": 100})
    cleaned = [cleaner(document(text[a:b], part=i))["text"] for i, (a, b) in enumerate(itertools.pairwise(cuts))]
    assert "".join(cleaned).split() == text.split()


def test_the_parts_beyond_the_most_characters_are_dropped(monkeypatch):
    monkeypatch.setattr(cleaning_module, "PART_CHARACTERS", 10)
    cleaner = Cleaner("length", options={"max_characters": 25})
    kept = [cleaner(document("x" * 10, part=i)) is not None for i in range(4)]
    assert kept == [True, True, False, False]


# Counts


def test_counts_follow_documents_and_bytes_through_the_steps():
    cleaner = Cleaner("control_characters,spaces,length", options={"min_characters": 3})
    counts = CleaningCounts()
    for i, text in enumerate(["ü\ufeffb  c", "a\ufeffb", "abc", "\ufeff"]):
        cleaner.clean({**document(text), "id": str(i)}, counts)
    first, second, third = counts.steps.values()
    assert list(counts.steps) == list(cleaner.steps)
    assert (first.documents_in, first.documents_out, first.documents_changed) == (4, 3, 2)
    assert (first.bytes_in, first.bytes_out) == (9 + 5 + 3 + 3, 6 + 2 + 3)
    assert (second.documents_in, second.documents_changed) == (3, 1)
    assert (second.bytes_in, second.bytes_out) == (11, 10)
    assert (third.documents_in, third.documents_out) == (3, 2)
    assert third.removed == [{"id": "1", "reason": "2 characters, fewer than 3", "text": "ab"}]
    assert first.removed == [{"id": "3", "reason": "nothing is left", "text": "\ufeff"}]
    assert second.changed == [{"id": "0", "before": "üb  c", "after": "üb c"}]


def test_what_leaves_a_step_enters_the_next():
    cleaner = Cleaner("chinese")
    counts = CleaningCounts()
    for text in ["哈哈哈哈！！！！！！", "Ａ\ufeff", " ", "ok", "a\n\n\n\nb"]:
        cleaner.clean(document(text), counts)
    steps = list(counts.steps.values())
    for before, after in itertools.pairwise(steps):
        assert (before.documents_out, before.bytes_out) == (after.documents_in, after.bytes_in)


@given(st.lists(anything | fragments, max_size=12), st.integers(0, 12))
@settings(deadline=None, max_examples=30)
def test_the_counts_of_pieces_merge_to_those_of_the_whole(texts, cut):
    cleaner = Cleaner("chinese", options={"min_characters": 3})

    def count(numbered) -> CleaningCounts:
        counts = CleaningCounts(cleaner.steps)
        for number, text in numbered:
            cleaner.clean({**document(text), "id": str(number)}, counts)
        return counts

    numbered = list(enumerate(texts))
    merged = CleaningCounts.from_json(json.loads(json.dumps(count(numbered[:cut]).to_json())))
    merged.merge(count(numbered[cut:]))
    assert merged.to_json() == count(numbered).to_json()
    json.dumps(merged.to_json(), ensure_ascii=False).encode()


def test_an_example_shows_where_the_text_changed():
    counts = CleaningCounts()
    Cleaner("spaces").clean(document("x" * 5000 + "  end"), counts)
    (example,) = counts.steps["spaces"].changed
    assert example["before"].endswith("x  end")
    assert example["after"].endswith("x end")
    assert len(example["before"]) < 210
    for _ in range(5):
        Cleaner("spaces").clean(document("a  b"), counts)
    assert len(counts.steps["spaces"].changed) == 3


def test_a_pickled_cleaner_cleans_the_same():
    cleaner = Cleaner("chinese", options={"laughter": "word", "languages": "zh,en"})
    copy = pickle.loads(pickle.dumps(cleaner))
    assert (copy.steps, copy.options) == (cleaner.steps, cleaner.options)
    assert copy(document("哈哈哈哈")) == cleaner(document("哈哈哈哈")) == document("笑")


@pytest.mark.parametrize("spec", ["chinese,guide", "web+chinese", "nfc,web"])
def test_a_profile_within_a_spec_is_told_from_a_step(spec):
    with pytest.raises(UserError, match=r"is a profile, which comes first and alone; steps are added and left out"):
        Cleaner(spec)
