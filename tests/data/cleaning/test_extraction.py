import importlib.util
import random
import resource
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptjax.data.cleaning.extraction import main_text, strip_tags

pytest.importorskip("trafilatura")

_spec = importlib.util.spec_from_file_location(
    "check_extraction", Path(__file__).parents[3] / "tools" / "check_extraction.py"
)
check_extraction = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(check_extraction)

SENTENCE = "The ship left the harbour before dawn and nobody on the pier knew where it was bound. "
PAGE = f"""<!DOCTYPE html><html><head><title>Title</title><style>p {{color: red}}</style></head><body>
<nav><ul><li><a href="/">Home</a></li>
<li><a href="/about">About us</a></li></ul></nav>
<article><h1>The ship</h1><p>{SENTENCE * 3}</p>
<p style="display: none">secret {SENTENCE}</p><p hidden>unseen</p>
<p>Caf&eacute; &amp; bar. {SENTENCE * 2}</p><script>alert("x")</script></article>
<footer>Copyright, imprint, cookies</footer></body></html>"""


def test_the_article_without_menu_script_and_hidden_text():
    text = main_text(PAGE)
    assert text.count("The ship left the harbour") == 5
    assert "Café & bar." in text
    for other in ("About us", "alert", "color", "secret", "unseen", "cookies", "<"):
        assert other not in text


def test_the_result_does_not_depend_on_the_pages_before():
    pages = [PAGE, PAGE.replace("ship", "boat"), "<p>" + SENTENCE * 4]
    first = [main_text(page) for page in pages]
    assert [main_text(page) for page in reversed(pages)] == first[::-1]
    assert main_text(PAGE) == first[0]


@pytest.mark.parametrize("text", ["", "plain text", "a < b and c > d", "\ud800", "x <3 y"])
def test_text_without_tags_is_returned_as_it_is(text):
    assert main_text(text) == text


@pytest.mark.parametrize(
    "page",
    [
        "<html></html>",
        "<html><body></body></html>",
        "<script>x</script>",
        "<!-- x -->",
        "<p>",
        "<p>&nbsp;</p>",
    ],
)
def test_an_empty_page_is_an_empty_text(page):
    assert main_text(page) == ""


@pytest.mark.parametrize(
    "page",
    [
        "<p>Hi</p>",
        "<td>Hi",
        "<b>Hi",
        "<body>Hi",
        "<div>" * 5000 + "Hi",
        "<p>Hi\0</p>",
        "<a href='",
        "<li>Hi<",
    ],
)
def test_a_page_with_text_is_not_empty(page):
    assert ("Hi" in main_text(page)) == ("Hi" in page)


@settings(max_examples=60, deadline=None)
@given(
    st.text(st.characters(exclude_categories=[])),
    st.sampled_from(["<p>", "<p a='", "<!--", "<svg><", "&#x0;<td>", ""]),
)
def test_no_page_raises(text, tag):
    assert isinstance(main_text(tag + text), str)
    assert isinstance(main_text("<html><body>" + text + tag), str)
    assert isinstance(strip_tags(tag + text + tag), str)


@pytest.mark.parametrize(
    "page",
    [
        "<html><body>" + "<div>" * 100_000 + "<p>deep</p>" + "</div>" * 100_000,
        "<span>" * 100_000 + "deep",
        "<table><tr><td>deep " * 20_000,
        "<ul>" + "<li><a href=x>deep</a> item" * 8_000,
        "<p>" + "deep " * 1_000_000,
        "deep<script>" * 100_000,
        "<p>deep" + "<!--" * 300_000,
        "<p>deep " + "<a " * 300_000,
        "<p>deep " + "<" * 1_000_000,
        "<p>deep " + "&amp;" * 300_000,
        "<p>deep" + "<br>x" * 250_000,
    ],
)
def test_a_bomb_takes_bounded_time_and_memory(page):
    start, memory = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert "deep" in main_text(page)
    assert time.process_time() - start < 15  # what is quadratic takes many minutes
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 600_000  # kilobytes


def test_strip_tags():
    page = "<head><title>t</title></head><h1>A</h1><p>b<b>c</b> &lt;d&gt;<!-- e --> f"
    page += "<br/>g<script>h</script> --> 1 < 2"
    assert strip_tags(page).split("\n") == ["", "A", "", "bc <d> f", "g --> 1 < 2"]


def write_pages(directory: Path, source: str, expected: str):
    for name in ("one", "two"):
        (directory / name).mkdir()
        (directory / name / "source.html").write_text(source, "utf-8")
        (directory / name / "expected.html").write_text(expected, "utf-8")


def test_check_extraction_compares_words(tmp_path, capsys):
    write_pages(tmp_path, "<p>one two two three 你好</p>", "<div>One two <i>four</i>你们</div><script>x</script>")
    assert check_extraction.main([str(tmp_path), "--minimum=0.5"]) == 0
    # Found: one two two three 你 好; expected: one two four 你 们; in common: one two 你.
    last = capsys.readouterr().out.splitlines()[-1].split()
    assert last == ["average", "of", "2", "pages", "0.5000", "0.6000", "0.5455"]
    assert check_extraction.main([str(tmp_path), "--minimum=0.6"]) == 1
    assert check_extraction.main([str(tmp_path / "one")]) == 2


def test_scores_are_symmetric_in_precision_and_recall():
    words = list("abcdef")
    rng = random.Random(0)
    for _ in range(20):
        found, expected = (" ".join(rng.choices(words, k=rng.randint(0, 8))) for _ in range(2))
        precision, recall, f1 = check_extraction.scores(found, expected)
        assert check_extraction.scores(expected, found) == (recall, precision, f1)


def test_real_pages(shared_data, capsys):
    assert check_extraction.main([str(shared_data / "html"), "--minimum=0.95"]) == 0
    print(capsys.readouterr().out.splitlines()[-1])
