"""Which questions on the embedded corpus are held out from a model."""

import pytest

from gptjax import config as config_lib
from gptjax.data.building.held_out import held_out_questions
from gptjax.data.building.splits import Census, Extent, Fractions, Splitter, hashed_share
from gptjax.data.sources.opening import open_source
from gptjax.errors import UserError
from gptjax.evaluation import tasks


def dealt(split_by: str) -> tuple[str, dict[str, str]]:
    """The splits of the corpus as a build makes them, and the split of each document by id."""
    census, extents = Census(), []
    for document in open_source("python_docs").documents():
        text = document["text"]
        share = hashed_share(document.get("split_key", text))
        extents.append(Extent(document["id"], not document.get("part"), len(text), share))
        census.add(extents[-1])
    splitter = Splitter(split_by, Fractions(0.1, 0.05), census)
    return splitter.method, {extent.id: splitter.deal(extent)[0].split for extent in extents}


def about(split_by: str):
    return {"split_by": split_by, "validation_fraction": 0.1, "test_fraction": 0.05}


@pytest.mark.parametrize(
    "split", [*(pytest.param(name, marks=pytest.mark.slow) for name in ("train", "validation")), "test"]
)
def test_the_questions_are_those_that_the_build_put_there(split):
    method, splits = dealt("auto")
    expected = [name for name, found in splits.items() if found == split and name.startswith("questions/")]
    assert method == "document" and expected
    for split_by in ("auto", "document"):
        assert [question["id"] for question in held_out_questions(about(split_by), split)] == expected


def test_a_corpus_split_by_position_is_refused():
    with pytest.raises(UserError, match=r"data\.split_by=position: which documents were held out depends on"):
        held_out_questions(about("position"), "validation")
    config = config_lib.get_default()
    config.data.split_by = "position"
    (request,) = tasks.parse("bleu")
    with pytest.raises(UserError, match=r"use data\.split_by=document"):
        tasks.TASKS["bleu"].read(request, config, tasks.Options())


def test_a_split_without_questions_is_refused():
    with pytest.raises(UserError, match=r"the test split has no questions; raise data\.test_fraction"):
        held_out_questions({**about("document"), "test_fraction": 0.0}, "test")
