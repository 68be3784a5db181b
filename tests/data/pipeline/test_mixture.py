import json
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptjax import config as config_lib
from gptjax.data import opening
from gptjax.data.building.build import build_store
from gptjax.data.pipeline.batches import Batches, BatchSource
from gptjax.data.pipeline.mixture import Mixture, parse_mixture
from gptjax.data.pipeline.packing import PackedBatches
from gptjax.data.sources.opening import open_source
from gptjax.errors import UserError


class Numbers(BatchSource):
    """Row n of source s is 1,000,000 s + n."""

    def __init__(self, source, rows_per_epoch=100):
        super().__init__(rows_per_epoch, batch_size=1)
        self.source = source

    def read_rows(self, rows):
        return {"tokens": (1_000_000 * self.source + rows)[:, None].astype(np.int32)}

    def tokens_before(self, row):
        return row


def mixture(*weights, **options) -> Mixture:
    sources = {f"s{i}": Numbers(i) for i in range(len(weights))}
    shares = {f"s{i}": Fraction(weight) for i, weight in enumerate(weights)}
    return Mixture(sources, shares, **{"batch_size": 8, "seed": 3, **options})


def test_notes_name_their_source():
    batches = mixture(1, 2)
    assert batches.notes == []
    batches.sources["s1"] = type("Noted", (Numbers,), {"notes": ["a", "b"]})(1)
    assert batches.notes == ["s1: a", "s1: b"]


def rows_of(batches, steps):
    return np.concatenate([batches[step]["tokens"][:, 0] for step in steps])


@given(st.lists(st.fractions("1/20", 3, max_denominator=20), min_size=1, max_size=5), st.integers(0, 10**9))
def test_every_block_has_the_exact_proportions(weights, block):
    batches = mixture(*weights)
    size = batches.block_size
    sources, _ = batches.assign(block * size + np.arange(min(size, 20_000)))
    if size <= 20_000:
        counts = np.bincount(sources, minlength=len(weights))
        assert [Fraction(int(c), size) for c in counts] == [w / sum(weights) for w in weights]


@given(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(1, 40))
def test_each_source_is_read_row_by_row(weights, blocks):
    batches = mixture(*weights)
    sources, numbers = batches.assign(np.arange(blocks * batches.block_size))
    for source in range(len(weights)):
        own = numbers[sources == source]
        np.testing.assert_array_equal(np.sort(own), np.arange(len(own)))


def test_the_order_within_a_block_differs_from_block_to_block_and_by_seed():
    sources = mixture(3, 2).assign(np.arange(100))[0].reshape(20, 5)
    assert len({tuple(block) for block in sources.tolist()}) > 3
    assert (sources.ravel() != mixture(3, 2, seed=4).assign(np.arange(100))[0]).any()


def test_batches_do_not_depend_on_processes_order_or_batch_size():
    whole = mixture("0.7", "0.2", "0.1")
    expected = rows_of(whole, range(20))
    quarters = [mixture("0.7", "0.2", "0.1", rows=slice(i, i + 2)) for i in (0, 2, 4, 6)]
    for step in (19, 0, 7):
        found = np.concatenate([part[step]["tokens"][:, 0] for part in quarters])
        np.testing.assert_array_equal(found, expected[step * 8 : step * 8 + 8])
    np.testing.assert_array_equal(rows_of(mixture("0.7", "0.2", "0.1", batch_size=16), range(10)), expected)


def test_a_far_step_costs_no_more_than_the_first():
    batches = mixture(1, 2)
    sources, numbers = batches.assign(8 * 10**12 + np.arange(8))
    assert (numbers // 10**12 == np.where(sources == 0, 2, 5)).all()


def test_epochs_are_counted_by_source():
    batches = mixture(3, 1)
    assert batches.epochs(100) == {"s0": 6.0, "s1": 2.0}
    assert batches.epoch(25) == 1.0  # 200 rows: as many as both have


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("python_docs", [("python_docs", "python_docs", 1)]),
        ("text:a@b/*.txt", [("a-b", "text:a@b/*.txt", 1)]),
        (
            "store:stores/poems@0.3 + jsonl:x/plays.jsonl.gz#text@0.7",
            [
                ("poems", "store:stores/poems", Fraction(3, 10)),
                ("plays", "jsonl:x/plays.jsonl.gz#text", Fraction(7, 10)),
            ],
        ),
        (
            "text:/x/a/*.txt@1 + text:/y/a/*.txt@2 + tfds:tiny@1",
            [("a", "text:/x/a/*.txt", 1), ("a-2", "text:/y/a/*.txt", 2), ("tiny", "tfds:tiny", 1)],
        ),
    ],
)
def test_mixtures_are_read(source, expected):
    assert [tuple(component) for component in parse_mixture(source)] == expected


@pytest.mark.parametrize(
    "source",
    ["a@1 + b", "a@1 + b@0", "a@1 + b@-2", "a@1 + b@x", "a@1 + @1", "a@1 + b@1/0", "a@1 + b@1e-9", "a@1 + b@1e9"],
)
def test_a_mixture_without_weights_is_refused(source):
    with pytest.raises(
        UserError, match=r"has no weight from 0.0001 to 10000; a mixture is 'SPEC@WEIGHT \+ SPEC@WEIGHT'"
    ):
        parse_mixture(source)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Upper-case texts, lower-case texts, and dialogues."""
    directory = tmp_path_factory.mktemp("mixture")
    for name in ("upper", "lower"):
        (directory / name).mkdir()
        for i in range(30):
            (directory / name / f"{i}.txt").write_text(getattr("ab cd ef gh " * (1 + i % 7), name)())
    rows = [{"prompt": f"ask {i}", "response": f"answer {i}"} for i in range(40)]
    (directory / "talk.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    build_store(open_source(f"pairs:{directory}/talk.jsonl"), directory / "talk", tokenizer="byte")
    build_store(open_source(f"text:{directory}/lower/*.txt"), directory / "other", tokenizer="char")
    return directory


def data_of(source, tokenizer="byte"):
    config = config_lib.get_default()
    config.data.source, config.tokenizer = source, tokenizer
    config.model.context_length, config.train.batch_size = 16, 8
    return opening.RunData.open(config), config


def test_stores_are_mixed_with_one_tokenizer(folder):
    spec = f"text:{folder}/upper/*.txt@3 + text:{folder}/lower/*.txt@1"
    data, config = data_of(spec, "bpe:270")
    assert [source.name for source in data.stores] == ["upper", "lower"]
    assert len({source.store.tokenizer().sha256 for source in data.stores}) == 1
    batches = data.batches(config, dialogues=data.has_dialogues)
    decode = data.stores[0].store.tokenizer().decode
    rows = [decode(row) for step in range(4) for row in batches[step]["tokens"]]
    assert sum(row.isupper() for row in rows) == 24 and sum(row.islower() for row in rows) == 8
    halves = [data.batches(config, rows=rows) for rows in (slice(0, 4), slice(4, 8))]
    for name, value in batches[3].items():
        np.testing.assert_array_equal(np.concatenate([half[3][name] for half in halves]), value)


def test_one_source_is_read_as_ever(folder):
    data, config = data_of(f"text:{folder}/upper/*.txt")
    batches = data.batches(config, dialogues=data.has_dialogues)
    alone = Batches(data.stores[0].store.split("train"), context_length=16, batch_size=8, seed=0)
    assert type(batches) is Batches
    for name, value in alone[5].items():
        np.testing.assert_array_equal(batches[5][name], value)
    assert batches.epochs(5) == {}


def test_dialogues_and_text_in_one_batch(folder):
    data, config = data_of(f"store:{folder}/talk@1 + text:{folder}/upper/*.txt@1")
    batches = data.batches(config, dialogues=data.has_dialogues)
    assert [type(source) for source in batches.sources.values()] == [PackedBatches, Batches]
    weights = np.concatenate([batches[step]["weights"] for step in range(2)])
    assert (weights == 1).all(axis=1).sum() == 8
    assert data.template.end_of_turn == "<|im_end|>"


def test_sources_that_do_not_fit_together_are_refused(folder):
    with pytest.raises(UserError, match=r"share one tokenizer, that of the first, 'talk'; 'store:.*other' has another"):
        data_of(f"store:{folder}/talk@1 + store:{folder}/other@1")


def test_the_identity_of_a_mixture_is_that_of_all_its_texts(folder):
    one, _ = data_of(f"text:{folder}/upper/*.txt")
    both, _ = data_of(f"text:{folder}/upper/*.txt@1 + text:{folder}/lower/*.txt@1")
    other, _ = data_of(f"text:{folder}/upper/*.txt@1 + text:{folder}/lower/*.txt@2")
    assert one.identity["source_fingerprint"] == one.stores[0].store.fingerprint
    assert both.identity["source_fingerprint"] not in [source.store.fingerprint for source in both.stores]
    assert both.identity["tokenizer"] == one.identity["tokenizer"]
    assert both.identity != other.identity, "weights are a part of what is trained on"


def test_tokens_are_counted_without_what_is_not_filled(folder):
    """Unfilled positions do not count, however steps are divided, and in a mixture row by row."""
    data, config = data_of(f"store:{folder}/talk@1 + text:{folder}/upper/*.txt@1")
    config.model.context_length = 96
    batches = data.batches(config, dialogues=True)
    counts = [int((batches[step]["segment_ids"] > 0).sum()) for step in range(12)]
    assert sum(counts) < 12 * 8 * 96
    assert [batches.num_tokens(step, step + 1) for step in range(12)] == counts
    assert batches.num_tokens(3, 11) == sum(counts[3:11])
