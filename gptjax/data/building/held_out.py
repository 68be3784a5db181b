"""Questions on the embedded corpus that a model was not trained on."""

from collections.abc import Mapping
from typing import Any

from gptjax.data.building.splits import split_of_key
from gptjax.data.documents import Document
from gptjax.data.sources.python_docs import as_dialogue, question_answer_pairs
from gptjax.errors import UserError


def held_out_questions(about: Mapping[str, Any], split: str) -> list[Document]:
    """The questions of `python_docs` on the docstrings of one split, in the order of the library.

    Args:
      about: how the corpus was split, as for `split_of_key`; with the source `python_docs:dialogues`, questions are
        dialogues.
      split: train, validation or test.

    Raises:
      UserError: the split has no questions, or the corpus was split by position.
    """
    questions = [pair for pair in question_answer_pairs() if split_of_key(about, pair["split_key"]) == split]
    if not questions:
        raise UserError(f"the {split} split has no questions; raise data.{split}_fraction")
    return [*map(as_dialogue, questions)] if about.get("source") == "python_docs:dialogues" else questions
