"""Main text of a web page."""

import copy
import re
from collections.abc import Callable

from gptjax.errors import UserError

_LOOKS_LIKE_HTML = re.compile(r"<(?:[A-Za-z][A-Za-z0-9:-]*[\s/>]|!--|!DOCTYPE|/[A-Za-z])", re.IGNORECASE)
_SURROGATES = re.compile("[\ud800-\udfff]")
# Not aria-hidden: pages set it on the text itself while a dialogue is open.
_HIDDEN = (
    '//*[@hidden or contains(translate(@style, " ", ""), "display:none")'
    ' or contains(translate(@style, " ", ""), "visibility:hidden")]'
)
# Paragraphs are taken if they are longer than the article by this factor; worth 0.009 F1 on Readability's 130 pages.
_MISSED = 1.5
# A page of 200,000 tags takes 7 s and 250 MB; beyond that its text is taken without looking for the article.
_MAX_TAGS = 200_000
_MAX_CHARACTERS = 20_000_000


def main_text(page: str) -> str:
    """The main text of an HTML page, one line per block, without menus, comments and hidden elements.

    trafilatura (Barbaresi 2021, https://aclanthology.org/2021.acl-demo.15) looks for the article. If it leaves
    out a third of the text in paragraphs, all paragraphs are taken; if it finds none, or the page is too large
    to search, all text is taken (`strip_tags`). Text without a tag is returned as it is. Time is linear in the
    length of the page, and no page raises an error.

    Raises:
      UserError: trafilatura is not installed.
    """
    if not _LOOKS_LIKE_HTML.search(page):
        return page
    try:
        import trafilatura
    except ImportError:
        raise UserError(
            "the cleaning step html needs trafilatura, which is not installed: pip install 'gptjax[data]'"
        ) from None
    page = _SURROGATES.sub("\ufffd", page).replace("\0", "")
    small = len(page) <= _MAX_CHARACTERS and page.count("<") <= _MAX_TAGS
    return (_article(trafilatura, page) if small else "") or strip_tags(page).strip()


def _article(trafilatura, page: str) -> str:
    try:
        tree = _visible(trafilatura, page)
    except ValueError:  # lxml refuses some characters
        tree = None
    if tree is None:
        return ""
    # Paragraphs first: `extract` changes the tree. No `deduplicate`: it remembers earlier pages.
    paragraphs = _guarded(lambda: "\n".join(trafilatura.baseline(copy.deepcopy(tree))[0].itertext()))
    article = _guarded(lambda: trafilatura.extract(tree, favor_recall=True, include_comments=False))
    return paragraphs if len(paragraphs) > _MISSED * len(article) else article


def _visible(trafilatura, page: str):
    """The tree of the page without hidden elements; None if it cannot be parsed."""
    tree = trafilatura.load_html(page)
    if tree is None:
        return None
    for element in tree.xpath(_HIDDEN):
        # Some pages hide all their content until a script has run.
        if element.getparent() is not None and element.tag not in ("html", "body"):
            element.drop_tree()
    return tree


def _guarded(extract: Callable[[], str | None]) -> str:
    try:
        return (extract() or "").strip()
    except Exception:  # a page that the library did not foresee; the next, simpler way is tried
        return ""


_TOKEN = re.compile(
    r"(?P<comment><!--)|(?P<comment_end>-->)|<(?P<close>/?)(?P<name>[A-Za-z][A-Za-z0-9:-]*)[^<>]*>|<[!?/][^<>]*>"
)
_SILENT = frozenset(
    ("script", "style", "template", "noscript", "head", "iframe", "object", "svg", "select", "textarea")
)
_INLINE = frozenset(
    """
    a abbr acronym b bdi bdo big cite code data del dfn em font i ins kbd label mark math q rp rt ruby s samp
    small span strike strong sub sup time tt u var wbr
    """.split()  # noqa: SIM905
)


def strip_tags(page: str) -> str:
    """All text of a page without tags, comments, scripts and styles: one line per block, entities decoded.

    Time is linear in the length of the page for any nesting, unlike with tree parsers.
    """
    from gptjax.data.cleaning.normalization import entities

    if "<" not in page:
        return entities(page)
    written: list[str] = []
    position, waiting_for = 0, ""
    for token in _TOKEN.finditer(page):
        if not waiting_for:
            written.append(page[position : token.start()])
        position = token.end()
        name = (token["name"] or "").lower()
        if waiting_for:
            closed = token["comment_end"] if waiting_for == "-->" else token["close"] and name == waiting_for
            waiting_for = "" if closed else waiting_for
        elif token["comment"]:
            waiting_for = "-->"
        elif token["comment_end"]:
            written.append(token[0])
        elif name in _SILENT and not token["close"] and not token[0].endswith("/>"):
            waiting_for = name
        elif name not in _INLINE:
            written.append("\n")
    if not waiting_for:
        written.append(page[position:])
    return entities("".join(written))
