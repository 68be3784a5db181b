import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptjax.data.pipeline.packing import PackedBatches
from gptjax.data.pipeline.row_plans import plan_rows, plan_split
from gptjax.errors import UserError


class Dialogues:
    """The part of a token split that PackedBatches reads, in memory. Token i of document d is 1000 d + i + 1."""

    name, has_mask, has_preferences = "train", True, False

    def __init__(self, lengths, trained, directory=None):
        self.directory, self.fingerprint = directory, "of the tokens"
        self.num_documents = len(lengths)
        self.num_tokens = sum(lengths)
        self.document_starts = np.cumsum([0, *lengths])[:-1].astype(np.int64)
        self.tokens = np.concatenate([1000 * d + np.arange(1, n + 1) for d, n in enumerate(lengths)]).astype(np.int32)
        self.mask = trained(np.random.default_rng(0), self.num_tokens)
        self.mask[self.document_starts] = False
        self.document_is_worse = np.zeros(len(lengths), np.bool_)

    def read_mask(self, start, length):
        return self.mask[start : start + length]

    def read_ranges(self, starts, lengths):
        return np.concatenate([self.tokens[a : a + n] for a, n in zip(starts, lengths, strict=True)])

    def read_mask_ranges(self, starts, lengths):
        return np.concatenate([self.mask[a : a + n] for a, n in zip(starts, lengths, strict=True)])


def half(random, count):
    return random.random(count) < 0.5


LENGTHS = [2 + (i * i) % 41 for i in range(97)]


def batches_of(split=None, **options) -> PackedBatches:
    split = split or Dialogues(LENGTHS, half)
    return PackedBatches(split, **{"context_length": 16, "batch_size": 8, "seed": 3, **options})


def epoch_of(batches):
    """The rows of one epoch in order, by name."""
    rows = [batches[step] for step in range(-(-batches.plan.num_rows // batches.batch_size))]
    return {name: np.concatenate([b[name] for b in rows])[: batches.plan.num_rows] for name in rows[0]}


def naive_best_fit_decreasing(lengths, row_length):
    rows = []
    for length in sorted(lengths, reverse=True):
        fitting = [i for i, room in enumerate(rows) if room >= length]
        if fitting:
            rows[min(fitting, key=rows.__getitem__)] -= length
        else:
            rows.append(row_length - length)
    return sorted(rows)


@given(st.lists(st.integers(0, 60), max_size=60), st.integers(1, 25))
def test_every_cell_of_every_document_is_in_one_place(lengths, row_length):
    plan = plan_rows(np.array(lengths, np.int64), row_length)
    cells = np.zeros((plan.num_rows, row_length), int)
    seen = [np.zeros(length, int) for length in lengths]
    for document, offset, length, row, column in zip(
        plan.document, plan.offset, plan.length, plan.row, plan.column, strict=True
    ):
        assert length >= 1 and column + length <= row_length
        cells[row, column : column + length] += 1
        seen[document][offset : offset + length] += 1
        assert length == min(lengths[document] - offset, row_length), "cut though it fits"
    assert cells.max(initial=0) <= 1
    assert all((counts == 1).all() for counts in seen)
    assert (cells.sum(axis=1) > 0).all()
    assert (np.diff(cells, axis=1) <= 0).all(), "a row is filled from column 0 without gaps"


@given(st.lists(st.integers(1, 25), max_size=80))
def test_the_rows_are_those_of_best_fit_decreasing_one_by_one(lengths):
    plan = plan_rows(np.array(lengths, np.int64), 25)
    filled = np.bincount(plan.row, weights=plan.length, minlength=plan.num_rows)
    assert sorted((25 - filled).astype(int).tolist()) == naive_best_fit_decreasing(lengths, 25)


def test_a_perfect_packing_is_found():
    plan = plan_rows(np.array([10, 3, 7, 5, 5, 23], np.int64), 10)
    assert (plan.num_rows, plan.efficiency) == (6, pytest.approx(53 / 60))
    assert plan_rows(np.array([6, 4] * 50, np.int64), 10).efficiency == 1.0


def test_ten_times_more_documents_take_ten_times_longer(assert_linear):
    lengths = np.random.default_rng(0).lognormal(5, 1.2, 200_000).astype(np.int64)
    assert_linear(lambda lengths: plan_rows(lengths, 1024), lengths[:20_000], lengths)
    plan = plan_rows(lengths, 1024)
    assert plan.length.sum() == lengths.sum()
    assert plan.efficiency > 0.999


def test_an_epoch_has_every_loss_bearing_token_once_as_a_target():
    split = Dialogues(LENGTHS, half)
    epoch = epoch_of(batches_of(split))
    targets = epoch["targets"][epoch["weights"] == 1]
    np.testing.assert_array_equal(np.sort(targets), np.sort(split.tokens[split.mask]))


def test_inputs_targets_and_positions_belong_together():
    epoch = epoch_of(batches_of())
    filled = epoch["segment_ids"] > 0
    assert (epoch["targets"][filled] == epoch["tokens"][filled] + 1).all()
    for row in range(len(filled)):
        for segment in range(1, epoch["segment_ids"][row].max() + 1):
            cells = epoch["segment_ids"][row] == segment
            tokens = epoch["tokens"][row][cells]
            assert len(np.unique(tokens // 1000)) == 1
            np.testing.assert_array_equal(np.diff(tokens), 1)
            np.testing.assert_array_equal(epoch["positions"][row][cells], np.arange(cells.sum()))
    for name in ("tokens", "targets", "weights", "positions"):
        assert (epoch[name][~filled] == 0).all(), name


def test_shapes_and_types():
    for name, value in batches_of()[0].items():
        assert value.shape == (8, 16) and value.flags.c_contiguous, name
        assert value.dtype == (np.float32 if name == "weights" else np.int32), name


def test_rows_without_loss_are_left_out_and_counted():
    def only_the_end(_, count):
        return np.arange(count) >= count - 3

    split = Dialogues([40, 5, 5, 5, 20], only_the_end)
    batches = batches_of(split, batch_size=1)
    assert batches.plan.num_rows == 1
    assert batches.rows_left_out == plan_rows(np.array([39, 4, 4, 4, 19]), 16).num_rows - 1
    assert batches[0]["weights"].sum() == batches[1]["weights"].sum() == 3
    left_out = batches.rows_left_out
    assert f"{left_out} of {left_out + 1} rows of the train split have no token to train on and are left out" in (
        batches.notes
    )
    for batch in (batches_of(), batches_of(isolate_documents=False)):
        assert (epoch_of(batch)["weights"].sum(axis=1) > 0).all()


def test_notes_say_how_full_the_rows_are():
    split = Dialogues([17, 9], lambda _, count: np.ones(count, bool))
    assert batches_of(split, batch_size=1).notes == ["the rows of the train split are filled to 75.0%"]


class Unread(Dialogues):
    def read_mask(self, start, length):
        raise AssertionError("the flags are read though the plan is kept")


def same_plans(first, second) -> bool:
    (plan, trained), (other, other_trained) = first, second
    arrays = ("document", "offset", "length", "row", "column")
    assert all(np.array_equal(getattr(plan, name), getattr(other, name)) for name in arrays)
    return (plan.row_length, plan.num_rows) == (other.row_length, other.num_rows) and np.array_equal(
        trained, other_trained
    )


def test_the_plan_is_kept_beside_the_tokens(tmp_path):
    first = plan_split(Dialogues(LENGTHS, half, tmp_path), 16)
    assert same_plans(plan_split(Unread(LENGTHS, half, tmp_path), 16), first)
    assert same_plans(plan_split(Dialogues(LENGTHS, half), 16), first)
    with pytest.raises(AssertionError, match="flags are read"):
        plan_split(Unread(LENGTHS, half, tmp_path), 17)
    assert [path.name for path in tmp_path.iterdir()] == ["rows-of-16.npz"]


def test_the_plan_of_other_tokens_is_replaced(tmp_path):
    plan_split(Dialogues(LENGTHS, half, tmp_path), 16)
    other = Dialogues(LENGTHS[:9], half, tmp_path)
    other.fingerprint = "of others"
    expected = plan_split(Dialogues(LENGTHS[:9], half), 16)
    assert same_plans(plan_split(other, 16), expected)
    unread = Unread(LENGTHS[:9], half, tmp_path)
    unread.fingerprint = "of others"
    assert same_plans(plan_split(unread, 16), expected)


@pytest.mark.parametrize("damage", ["empty", "cut", "flipped", "text", "array"])
def test_a_damaged_plan_is_replaced(tmp_path, damage):
    expected = plan_split(Dialogues(LENGTHS, half, tmp_path), 16)
    (file,) = tmp_path.iterdir()
    data = file.read_bytes()
    middle = len(data) // 2
    flipped = data[:middle] + bytes([data[middle] ^ 255]) + data[middle + 1 :]
    file.write_bytes({"empty": b"", "cut": data[:middle], "flipped": flipped, "text": b"text", "array": b""}[damage])
    if damage == "array":
        np.save(tmp_path / "array.npy", np.arange(3))
        (tmp_path / "array.npy").replace(file)
    assert same_plans(plan_split(Dialogues(LENGTHS, half, tmp_path), 16), expected)
    assert same_plans(plan_split(Unread(LENGTHS, half, tmp_path), 16), expected)


def test_without_a_place_to_write_the_plan_is_made_again(tmp_path):
    (tmp_path / "file").write_text("in the way")
    split = Dialogues(LENGTHS, half, tmp_path / "file" / "train")
    assert same_plans(plan_split(split, 16), plan_split(Dialogues(LENGTHS, half), 16))


def test_batches_do_not_depend_on_processes_or_the_order_of_asking():
    whole, again = batches_of(), batches_of()
    steps = [7, 0, 30, 7, 2]
    expected = {step: whole[step] for step in sorted(steps)}
    halves = [batches_of(rows=slice(0, 4)), batches_of(rows=slice(4, 8))]
    for step in steps:
        for name, value in again[step].items():
            np.testing.assert_array_equal(value, expected[step][name])
            parts = np.concatenate([part[step][name] for part in halves])
            np.testing.assert_array_equal(parts, expected[step][name])


def test_epochs_have_the_same_rows_in_another_order():
    batches = batches_of(batch_size=1)
    rows = batches.plan.num_rows
    first, second = ([batches[e * rows + i]["tokens"].tobytes() for i in range(rows)] for e in (0, 1))
    assert sorted(first) == sorted(second) and len(set(first)) == rows
    assert first != second
    assert batches.epoch(rows) == 1
    other_seed = batches_of(batch_size=1, seed=4)
    assert first != [other_seed[i]["tokens"].tobytes() for i in range(rows)]


def test_without_isolation_a_row_is_one_segment():
    isolated, joined = batches_of()[0], batches_of(isolate_documents=False)[0]
    filled = isolated["segment_ids"] > 0
    assert "segment_ids" not in joined
    np.testing.assert_array_equal(joined["positions"], np.where(filled, np.arange(16), 0))
    for name in ("tokens", "targets", "weights"):
        np.testing.assert_array_equal(joined[name], isolated[name])


@settings(max_examples=20)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=30), st.integers(1, 20))
def test_any_documents_in_any_context(lengths, context_length):
    split = Dialogues(lengths, half)
    try:
        epoch = epoch_of(batches_of(split, context_length=context_length, batch_size=1))
    except UserError:
        assert not split.mask.any()
        return
    assert np.sort(epoch["targets"][epoch["weights"] == 1]).tolist() == split.tokens[split.mask].tolist()


def test_what_cannot_be_packed_is_refused():
    with pytest.raises(UserError, match=r"too small for one batch: its 3 dialogues fill 1 rows.*batch_size=8"):
        batches_of(Dialogues([4, 4, 4], lambda _, count: np.ones(count, bool)))
    split = Dialogues(LENGTHS, half)
    split.has_mask = False
    with pytest.raises(UserError, match="no loss mask"):
        batches_of(split)
