"""Rows of a token store as people read them."""

import itertools
from collections.abc import Iterator

import numpy as np
from rich.text import Text

from gptjax.data.store.store import Store
from gptjax.data.tokenization.tokenizer import Tokenizer

_TRAINED, _NOT_TRAINED, _BORDER = "green", "dim", "bold magenta"


def rows_as_text(store: Store, split_name: str, rows: int, row_tokens: int) -> Iterator[Text]:
    """The first `rows` rows of `row_tokens` tokens of a split.

    A rule marks each document start. In dialogues, tokens that count in the loss are green, others are dim. Special
    tokens are written out.
    """
    split, tokenizer = store.split(split_name), store.tokenizer()
    starts = split.document_starts
    rows = min(rows, -(-split.num_tokens // row_tokens))
    for row in range(rows):
        begin = row * row_tokens
        end = min(begin + row_tokens, split.num_tokens)
        tokens, mask = split.read(begin, end - begin), split.read_mask(begin, end - begin)
        text = Text().append(f"{split_name} row {row}, tokens {begin:,} to {end:,}\n", "bold")
        first = int(np.searchsorted(starts, begin, side="right")) - 1
        borders = [begin, *starts[(starts > begin) & (starts < end)].tolist(), end]
        for document, (left, right) in enumerate(itertools.pairwise(borders), start=first):
            continued = ", continued" if left > starts[document] else ""
            text.append(f"── document {document}{continued} ──\n", _BORDER)
            inside = np.s_[left - begin : right - begin]
            for piece, style in _styled(tokenizer, tokens[inside], mask[inside], has_mask=split.has_mask):
                text.append(piece, style)
            text.append("\n")
        yield text


def _styled(tokenizer: Tokenizer, tokens: np.ndarray, mask: np.ndarray, *, has_mask: bool) -> Iterator[tuple[str, str]]:
    """(text, style) of each run of tokens of one style; a special token is a run of its own."""
    special = {i: token for token, i in tokenizer.special_tokens.items()}
    kinds = [(special.get(token), bool(trained)) for token, trained in zip(tokens.tolist(), mask, strict=True)]
    position = 0
    for (name, trained), run in itertools.groupby(kinds):
        length = len(list(run))
        ids = tokens[position : position + length]
        position += length
        style = "" if not has_mask else _TRAINED if trained else _NOT_TRAINED
        yield (name * length, f"{style} bold".strip()) if name else (tokenizer.decode(ids), style)
