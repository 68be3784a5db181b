"""From a file of preferences through the store to batches: pairs stay together, and only answers have loss."""

import json
import re

import numpy as np
import pytest

from gptjax.config import get_default
from gptjax.data.building.build import build_store
from gptjax.data.documents import Kind
from gptjax.data.opening import RunData
from gptjax.data.pipeline.preferences import Examples, InOrder, PreferenceBatches
from gptjax.data.sources.opening import open_source
from gptjax.data.store.store import open_store
from gptjax.errors import UserError

T = 64
PAIRS = [
    {"prompt": f"Question {i} {'x' * (i % 7)}?", "chosen": f"Good {i}" + "!" * (i % 3), "rejected": f"Bad {i}"}
    for i in range(120)
]
JUDGED = [{"prompt": f"Q{i // 2}", "completion": f"A{i}", "label": i % 3 > 0} for i in range(120)]


def store_of(directory, records, **options):
    directory.mkdir(exist_ok=True)
    (directory / "p.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    options = {"tokenizer": "byte", "workers": 1, "validation_fraction": 0.1, "test_fraction": 0.0} | options
    return build_store(open_source(f"preference:{directory}/p.jsonl"), directory / "store", **options)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return store_of(tmp_path_factory.mktemp("pairs"), PAIRS)


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    return store_of(tmp_path_factory.mktemp("judged"), JUDGED)


def spelled(tokenizer, ids):
    """The text of ids up to the end of the filled part, with special tokens written out."""
    names = {i: name for name, i in tokenizer.special_tokens.items()}
    ids = np.trim_zeros(ids, "b").tolist()
    return "".join(names.get(i) or tokenizer.decode(np.array([i], np.int32)) for i in ids)


def sides(store, batch, row):
    """(all text, text with loss) of both sides of a row."""
    tokenizer = store.tokenizer()
    for side in range(2):
        tokens, targets, weights = (batch[name][row, side] for name in ("tokens", "targets", "weights"))
        length = int(np.flatnonzero(tokens).max()) + 1
        np.testing.assert_array_equal(targets[: length - 1], tokens[1:length])
        assert not weights[length - 1 :].any()
        yield spelled(tokenizer, tokens), spelled(tokenizer, targets[weights > 0])


def test_each_row_is_a_pair_with_one_prompt_and_loss_on_the_answers_alone(store):
    assert store.splits == ("train", "validation")
    seen = set()
    for split in store.splits:
        examples = Examples.of(store.split(split), T, judged=False)
        batch = examples.read(np.arange(len(examples)))
        for row in range(len(examples)):
            (text, chosen), (other, rejected) = sides(store, batch, row)
            record = PAIRS[int(re.search(r"\d+", chosen)[0])]
            assert (chosen, rejected) == (f"{record['chosen']}<|im_end|>", f"{record['rejected']}<|im_end|>")
            prompt = f"<|im_start|>user\n{record['prompt']}<|im_end|>\n<|im_start|>assistant\n"
            assert text.endswith(prompt + chosen) and other.endswith(prompt + rejected)
            seen.add(record["prompt"])
    assert len(seen) == len(PAIRS), "every pair once"


def test_the_store_says_what_each_document_is_and_checks_it(store, tmp_path_factory):
    kinds = store.split("train").document_kinds
    assert kinds.tolist() == [Kind.CHOSEN, Kind.REJECTED] * (len(kinds) // 2)
    store.verify()
    other = store_of(tmp_path_factory.mktemp("other"), PAIRS)
    assert other.split("train").fingerprint == store.split("train").fingerprint
    swapped = [{**p, "chosen": p["rejected"], "rejected": p["chosen"]} for p in PAIRS]
    assert store_of(tmp_path_factory.mktemp("swapped"), swapped).fingerprint != store.fingerprint
    path = other.directory / "train" / "kinds.npy"
    np.save(path, kinds[::-1])
    with pytest.raises(UserError, match=r"kinds\.npy: its sha256"):
        other.verify()
    np.save(path, kinds[:3])
    with pytest.raises(UserError, match=r"kinds\.npy: it has 3 rows"):
        open_store(other.directory)
    path.unlink()
    with pytest.raises(UserError, match=r"kinds\.npy: it is missing"):
        open_store(other.directory)


def test_deduplication_removes_pairs_whole_and_a_label_tells_answers_apart(tmp_path):
    again = [*PAIRS, PAIRS[0], {**PAIRS[1], "rejected": "Something else"}]
    store = store_of(tmp_path / "pairs", again, deduplicate="exact")
    assert store.manifest["duplicates"] == 1
    assert sum(store.split(s).num_documents for s in store.splits) == 2 * (len(PAIRS) + 1)


def test_the_pairs_of_a_ranking_and_of_one_question_fall_into_one_split(tmp_path):
    rankings = [{"instruction": f"Q{i}", "output": ["a", "b", "c"]} for i in range(60)]
    store = store_of(tmp_path, rankings)
    tokenizer, split_of = store.tokenizer(), {}
    for name in store.splits:
        examples = Examples.of(store.split(name), T, judged=False)
        for tokens in examples.read(np.arange(len(examples)))["tokens"][:, 0]:
            split_of.setdefault(spelled(tokenizer, tokens).partition("<|im_end|>")[0], set()).add(name)
    assert len(split_of) == 60 and all(len(splits) == 1 for splits in split_of.values())


def test_a_long_prompt_loses_its_beginning_and_a_long_answer_is_left_out(tmp_path):
    long = [
        {"prompt": "P" * 100, "chosen": "good", "rejected": "a bit worse"},
        {"prompt": "p", "chosen": "c" * 200, "rejected": "r"},
        *PAIRS[:30],
    ]
    store = store_of(tmp_path, long, split_by="position", validation_fraction=0.2)
    examples = Examples.of(store.split("train"), T, judged=False)
    assert (examples.left_out, examples.shortened) == (1, 1)
    assert any("1 more are left out" in note for note in examples.notes)
    assert any("1 lose the beginning of a prompt" in note for note in examples.notes)
    batch = examples.read(np.array([0]))
    (text, chosen), (other, rejected) = sides(store, batch, 0)
    assert (chosen, rejected) == ("good<|im_end|>", "a bit worse<|im_end|>"), "answers are whole"
    kept = text.removesuffix(chosen)
    assert other.removesuffix(rejected) == kept and kept.startswith("PPP"), "the same prompt on both sides"
    assert (batch["tokens"][0, 1] != 0).all(), "the longer side fills the context"


def test_batches_are_a_function_of_seed_and_step(store):
    examples = Examples.of(store.split("train"), T, judged=False)
    batches = PreferenceBatches(examples, batch_size=8, seed=3)
    part = PreferenceBatches(examples, batch_size=8, seed=3, rows=slice(2, 5))
    later = batches[17]
    for name, values in part[17].items():
        np.testing.assert_array_equal(values, later[name][2:5])
    epoch = np.concatenate([batches.read_rows(np.arange(len(examples)))["tokens"]])
    assert len(np.unique(epoch[:, 0], axis=0)) == len(examples), "each pair once in an epoch"
    tokens = sum(int((batches[step]["tokens"] != 0).sum()) for step in range(3, 20))
    assert batches.num_tokens(3, 20) == tokens


def test_in_order_every_example_is_there_once_and_the_rest_counts_nothing(store):
    parts = [Examples.of(store.split(name), T, judged=False) for name in store.splits]
    total = sum(map(len, parts))
    batches = InOrder(parts, batch_size=16)
    rows = [batches[i] for i in range(int(batches.steps_per_epoch))]
    counted = np.concatenate([row["weights"].any((1, 2)) for row in rows])
    assert counted.sum() == total and not counted[total:].any()


def test_a_judged_answer_is_followed_by_the_next_answer_to_another_prompt(judged):
    examples = Examples.of(judged.split("train"), T, judged=True)
    batch = examples.read(np.arange(len(examples)))
    texts = [[text for text, _ in sides(judged, batch, row)] for row in range(len(examples))]
    prompts = [own.partition("assistant\n")[0] for own, _ in texts]
    for row, (own, foreign) in enumerate(texts):
        following = next(r % len(texts) for r in range(row + 1, row + 9) if prompts[r % len(texts)] != prompts[row])
        assert foreign == prompts[row] + "assistant\n" + texts[following][0].partition("assistant\n")[2]
        number = int(own.partition("assistant\nA")[2].removesuffix("<|im_end|>"))
        assert batch["desirable"][row] == JUDGED[number]["label"]


def test_pairs_can_be_read_as_judged_answers_but_not_the_other_way_round(store, judged):
    examples = Examples.of(store.split("train"), T, judged=True)
    assert examples.desirable.tolist() == [True, False] * (len(examples) // 2)
    with pytest.raises(UserError, match=r"no pairs of answers: it has single judgements.*preference_loss=kto"):
        Examples.of(judged.split("train"), T, judged=False)


def test_text_has_no_preferences_and_too_few_pairs_make_no_batch(store, tiny_corpus, tmp_path):
    config = get_default()
    config.tokenizer = "byte"
    config.data.update(source=f"text:{tiny_corpus}/*.txt", cache_dir=str(tmp_path))
    with pytest.raises(UserError, match="no preferences; use preference:GLOB"):
        RunData.open(config).preference_batches(config, judged=False)
    config.data.source = f"store:{store.directory}"
    config.model.context_length = T
    config.train.batch_size = 500
    with pytest.raises(
        UserError, match=r"too small for one batch: \d+ pairs in the train split, fewer than batch_size"
    ):
        RunData.open(config).preference_batches(config, judged=False)
    config.train.batch_size = 8
    config.data.word_swap = 0.1
    with pytest.raises(UserError, match="preferences are not augmented"):
        RunData.open(config).preference_batches(config, judged=False)


def test_a_mixture_has_pairs_of_all_sources(store, tmp_path):
    other = store_of(tmp_path, [{"prompt": f"other {i}", "chosen": "a", "rejected": "b"} for i in range(110)])
    config = get_default()
    config.data.source = f"store:{store.directory}@1 + store:{other.directory}@1"
    config.model.context_length = T
    config.train.batch_size = 8
    data = RunData.open(config)
    batches = data.preference_batches(config, judged=False)
    texts = [store.tokenizer().decode(tokens) for tokens in batches[3]["tokens"][:, 0]]
    assert sum("other" in text for text in texts) == 4
    validation = data.validation_preferences(config, judged=False)
    assert len(validation.parts) == 2


def test_instruction_tuning_on_preferences_learns_the_better_answers_alone(store):
    config = get_default()
    config.data.source = f"store:{store.directory}"
    config.model.context_length = T
    config.train.batch_size = 4
    data = RunData.open(config)
    assert data.has_preferences
    batches = data.batches(config, dialogues=True)
    rows = batches.read_rows(np.arange(batches.rows_per_epoch))
    text = store.tokenizer().decode(rows["targets"][rows["weights"] > 0])
    assert "Good" in text and "Bad" not in text
    assert text.count("Good") == store.split("train").num_documents // 2
