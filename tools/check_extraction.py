"""Compares the main text that gptjax extracts from web pages with the expected text.

    python tools/check_extraction.py DIR [--minimum=0.90]

DIR has one directory for each page, with source.html and expected.html: the layout of the test pages of
Mozilla's Readability. Prints precision, recall and F1 of the words, per page and as the average over the pages.
Exit status: 0 if the average F1 reaches the minimum; 1 if not; 2 without pages.
"""

import argparse
import re
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

# Each Han or kana character counts as a word.
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff]|[^\W_\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff]+")


class _Text(HTMLParser):
    def __init__(self):
        super().__init__()
        self.pieces: list[str] = []
        self._silent = 0

    def handle_starttag(self, tag, attrs):
        self._silent += tag in ("script", "style")
        self.pieces.append(" ")

    def handle_endtag(self, tag):
        self._silent -= tag in ("script", "style")
        self.pieces.append(" ")

    def handle_data(self, data):
        if not self._silent:
            self.pieces.append(data)


def plain_text(page: str) -> str:
    """All text of a page, with a space in place of each tag."""
    parser = _Text()
    parser.feed(page)
    parser.close()
    return "".join(parser.pieces)


def scores(found: str, expected: str) -> tuple[float, float, float]:
    """Precision, recall and F1 of the words, counted with repetition; 1 if both have none."""
    a, b = (Counter(_WORD.findall(text.lower())) for text in (found, expected))
    if not a and not b:
        return 1.0, 1.0, 1.0
    common = (a & b).total()
    return common / max(a.total(), 1), common / max(b.total(), 1), 2 * common / (a.total() + b.total())


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--minimum", type=float, default=0.90, help="least average F1 for exit status 0 (0.90)")
    arguments = parser.parse_args(argv)

    from gptjax.data.cleaning.extraction import main_text
    from gptjax.errors import UserError

    pages = sorted(path.parent for path in arguments.directory.glob("*/expected.html"))
    pages = [page for page in pages if (page / "source.html").is_file()]
    if not pages:
        print(f"no */source.html with expected.html in {arguments.directory}", file=sys.stderr)
        return 2
    print(f"{'page':40} {'words':>8} {'precision':>9} {'recall':>7} {'F1':>7}")
    rows = []
    for page in pages:
        source = (page / "source.html").read_text(encoding="utf-8", errors="replace")
        expected = plain_text((page / "expected.html").read_text(encoding="utf-8", errors="replace"))
        try:
            found = main_text(source)
        except UserError as error:
            print(error, file=sys.stderr)
            return 2
        rows.append(scores(found, expected))
        words = len(_WORD.findall(expected))
        print(f"{page.name:40} {words:8} {rows[-1][0]:9.4f} {rows[-1][1]:7.4f} {rows[-1][2]:7.4f}")
    averages = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
    print(f"{f'average of {len(rows)} pages':49} {averages[0]:9.4f} {averages[1]:7.4f} {averages[2]:7.4f}")
    if averages[2] < arguments.minimum:
        print(f"average F1 {averages[2]:.4f} is below {arguments.minimum}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
