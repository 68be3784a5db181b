import threading
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptjax.data.building.build import build_store
from gptjax.data.pipeline.batches import Batches, document_segments, iterate
from gptjax.data.sources.opening import open_source
from gptjax.errors import UserError


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    """A split whose documents are runs of different lengths of one letter each."""
    directory = tmp_path_factory.mktemp("pipeline")
    for i in range(60):
        (directory / f"{i:02}.txt").write_text(chr(97 + i % 26) * (1 + i * i % 47))
    source = open_source(f"text:{directory}/*.txt")
    store = build_store(source, directory / "store", tokenizer="byte", test_fraction=0.0, shard_tokens=300)
    return store.split("train")


def batches_of(split, **options) -> Batches:
    return Batches(split, **{"context_length": 16, "batch_size": 8, "seed": 3, **options})


def assert_same(left, right):
    assert left.keys() == right.keys()
    for name in left:
        np.testing.assert_array_equal(left[name], right[name])


def test_shapes_and_types(split):
    batch = batches_of(split)[0]
    for name, value in batch.items():
        assert value.shape == (8, 16), name
        assert value.dtype == (np.float32 if name == "weights" else np.int32), name
        assert value.flags.c_contiguous
    assert set(batch) == {"tokens", "targets", "weights", "segment_ids", "positions"}
    assert (batch["weights"] == 1).all()


def test_targets_are_the_next_tokens(split):
    batches = batches_of(split)
    everything = split.read(0, split.num_tokens)
    for step in range(5):
        batch = batches[step]
        for row, start in enumerate(batches.windows(step * 8 + np.arange(8))[1]):
            np.testing.assert_array_equal(batch["tokens"][row], everything[start : start + 16])
            np.testing.assert_array_equal(batch["targets"][row], everything[start + 1 : start + 17])


def test_an_epoch_has_every_target_once_apart_from_the_edges(split):
    batches = batches_of(split, batch_size=1)
    shifts = set()
    for epoch in range(3):
        rows = epoch * batches.rows_per_epoch + np.arange(batches.rows_per_epoch)
        epochs, starts = batches.windows(rows)
        assert (epochs == epoch).all()
        targets = (starts[:, None] + 1 + np.arange(16)).ravel()
        assert len(set(targets)) == len(targets)
        assert targets.max() < split.num_tokens
        assert split.num_tokens - len(targets) <= 2 * 16
        assert not (np.diff(starts) > 0).all(), "shuffled"
        shifts.add(int(starts.min()))
    assert len(shifts) > 1


def test_a_batch_depends_on_seed_and_step_alone(split):
    batches = batches_of(split)
    forward = [batches[step] for step in range(40)]
    for step in (39, 0, 17, 5):
        assert_same(batches_of(split)[step], forward[step])
    assert not np.array_equal(batches_of(split, seed=4)[0]["tokens"], forward[0]["tokens"])


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_the_global_batch_does_not_depend_on_the_number_of_processes(split, processes):
    size = 8 // processes
    parts = [batches_of(split, rows=slice(i * size, (i + 1) * size)) for i in range(processes)]
    for step in (0, 7, 30):
        batch = {
            name: np.concatenate([part[step][name] for part in parts])
            for name in ("tokens", "targets", "weights", "segment_ids", "positions")
        }
        assert_same(batch, batches_of(split)[step])


def test_the_rows_do_not_depend_on_the_batch_size(split):
    small, large = batches_of(split, batch_size=4), batches_of(split, batch_size=8)
    for step in range(20):
        joined = np.concatenate([small[2 * step]["tokens"], small[2 * step + 1]["tokens"]])
        np.testing.assert_array_equal(joined, large[step]["tokens"])


def test_a_far_step_costs_no_more_than_the_first(split):
    assert batches_of(split)[10**12]["tokens"].shape == (8, 16)


def slow_segments(document_starts, starts, length):
    segment_ids = np.zeros((len(starts), length), np.int32)
    positions = np.zeros((len(starts), length), np.int32)
    for row, start in enumerate(starts):
        segment, position = 1, 0
        for column in range(length):
            if column and start + column in document_starts:
                segment, position = segment + 1, 0
            segment_ids[row, column], positions[row, column] = segment, position
            position += 1
    return segment_ids, positions


@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=30),
    st.integers(1, 12),
    st.lists(st.integers(0, 10**6), max_size=5),
)
def test_segments_equal_a_loop_by_hand(lengths, length, offsets):
    document_starts = np.concatenate([[0], np.cumsum(lengths)[:-1]]).astype(np.int64)
    num_tokens = sum(lengths) + length
    starts = np.array([offset % (num_tokens - length) for offset in offsets], np.int64)
    fast = document_segments(document_starts, starts, length)
    slow = slow_segments(set(document_starts.tolist()), starts.tolist(), length)
    for found, expected in zip(fast, slow, strict=True):
        assert found.dtype == np.int32
        np.testing.assert_array_equal(found, expected)


def test_documents_are_isolated_unless_asked(split):
    isolated, joined = batches_of(split)[2], batches_of(split, isolate_documents=False)[2]
    np.testing.assert_array_equal(isolated["tokens"], joined["tokens"])
    assert isolated["segment_ids"].max() > 1
    eot = isolated["tokens"] == 256
    assert (isolated["positions"][eot] == 0).all()
    assert "segment_ids" not in joined
    np.testing.assert_array_equal(joined["positions"], np.tile(np.arange(16), (8, 1)))


def test_epochs(split):
    batches = batches_of(split)
    assert batches.rows_per_epoch == (split.num_tokens - 16) // 16
    assert batches.steps_per_epoch == batches.rows_per_epoch / 8
    assert batches.epoch(0) == 0
    assert batches.epoch(3) == 3 / batches.steps_per_epoch


def test_the_smallest_split_that_makes_a_batch(split):
    batches = batches_of(split, batch_size=1, context_length=split.num_tokens - 1)
    np.testing.assert_array_equal(batches[5]["targets"][0], split.read(1, split.num_tokens - 1))
    with pytest.raises(UserError, match=rf"too small .* {split.num_tokens} tokens make 0 windows"):
        batches_of(split, batch_size=1, context_length=split.num_tokens)
    with pytest.raises(UserError, match=r"context_length=16, fewer than batch_size=5000"):
        batches_of(split, batch_size=5000)


def prefetch_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if "prefetch" in thread.name]


@pytest.mark.parametrize("prefetch", [0, 2])
def test_iterating_starts_where_asked_and_stops_its_threads(split, prefetch):
    batches = batches_of(split)
    iterator = iterate(batches, 7, prefetch=prefetch)
    for expected in range(7, 30):
        step, batch = next(iterator)
        assert step == expected
        assert_same(batch, batches[step])
    assert bool(prefetch_threads()) == bool(prefetch)
    iterator.close()
    deadline = time.monotonic() + 60
    while prefetch_threads() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not prefetch_threads()


def test_a_batch_that_cannot_be_read_stops_the_iteration(split):
    class Broken(Batches):
        def __getitem__(self, step):
            if step == 3:
                raise OSError("disk gone")
            return super().__getitem__(step)

    iterator = iterate(Broken(split, context_length=16, batch_size=8, seed=0), 0)
    assert [next(iterator)[0] for _ in range(3)] == [0, 1, 2]
    with pytest.raises(OSError, match="disk gone"):
        next(iterator)
