import json

import numpy as np
import pytest

from gptjax import config as config_lib
from gptjax.data.building.build import build_store
from gptjax.data.pipeline.augmentation import INPUT_NOISE, ORDER_NOISE, Augmentation, Misspellings, token_texts
from gptjax.data.pipeline.batches import Batches
from gptjax.data.pipeline.packing import PackedBatches
from gptjax.data.sources.opening import open_source
from gptjax.data.tokenization.tokenizer import build_tokenizer

SENTENCES = [f"The {who} saw {n} birds near a river." for n, who in enumerate(["old cat", "red dog"] * 20, 10)]
TEXT = " ".join(SENTENCES)
BYTES = build_tokenizer("byte")
KINDS = INPUT_NOISE + ORDER_NOISE


def noisy(text=TEXT, tokenizer=BYTES, *, seed=1, epoch=0, place=0, trained=None, **rates):
    """(inputs, targets) of noised text, as tokens."""
    tokens = np.concatenate([[tokenizer.eot_id], tokenizer.encode(text)]).astype(np.int32)
    augment = Augmentation(tokenizer, seed=seed, **rates)
    places = place + np.arange(len(tokens))
    return tokens, *augment(tokens, places, np.full(len(tokens), epoch), trained)


@pytest.fixture(scope="module")
def text_split(tmp_path_factory):
    directory = tmp_path_factory.mktemp("augmentation")
    for i in range(30):
        (directory / f"{i:02}.txt").write_text(" ".join(SENTENCES[i % 7 : i % 7 + 4]))
    source = open_source(f"text:{directory}/*.txt")
    return build_store(source, directory / "store", tokenizer="byte", test_fraction=0.0).split("train")


@pytest.fixture(scope="module")
def dialogue_store(tmp_path_factory):
    directory = tmp_path_factory.mktemp("dialogues")
    answer = "It is {}, I am sure. Go there now."
    rows = [{"prompt": f"Who? {s} Where is it?", "response": answer.format(i)} for i, s in enumerate(SENTENCES)]
    (directory / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = open_source(f"pairs:{directory}/pairs.jsonl")
    return build_store(source, directory / "store", tokenizer="byte", test_fraction=0.0)


@pytest.mark.parametrize("name", INPUT_NOISE)
def test_noise_on_inputs_leaves_the_targets_and_has_the_rate(name):
    tokens, inputs, text = noisy(**{name: 0.3})
    np.testing.assert_array_equal(text, tokens)
    changed = inputs != tokens
    assert not changed[0], "the end-of-text token is never touched"
    touchable = np.array([chr(t).isalnum() for t in tokens[1:]]) if name == "character_noise" else np.ones(len(tokens))
    assert changed.sum() / touchable.sum() == pytest.approx(0.3, abs=0.06)


def test_dropped_tokens_are_blank_and_replaced_ones_never_special():
    tokens, inputs, _ = noisy(token_dropout=0.5)
    assert (inputs[inputs != tokens] == BYTES.eot_id).all()
    _, inputs, _ = noisy(token_replacement=1.0)
    assert inputs[1:].max() < 256
    assert len(np.unique(inputs)) > 200


def test_misspellings_change_one_character_of_its_kind():
    tokenizer = build_tokenizer("bpe:400", [TEXT * 3])
    texts = token_texts(tokenizer)
    tokens, inputs, _ = noisy("The cat sat near 15 birds and 16 dogs." * 20, tokenizer, character_noise=1.0)
    changed = np.flatnonzero(inputs != tokens)
    assert len(changed) > 100
    for before, after in zip(tokens[changed], inputs[changed], strict=True):
        old, new = texts[before], texts[after]
        (pair,) = [(a, b) for a, b in zip(old, new, strict=True) if a != b]
        assert [c.isdigit() for c in pair] in ([True] * 2, [False] * 2)
        assert [c.islower() for c in pair] in ([True] * 2, [False] * 2)


def test_a_token_without_neighbours_stays_and_every_neighbour_is_reached():
    neighbours = Misspellings.of(["cat", "cut", "cot", "dog", "Cat", " ", "ca1", "cup"])
    draws = np.linspace(0, 1, 100, endpoint=False)

    def reached(token):
        return set(neighbours.choose(np.full(100, token, np.int32), draws).tolist())

    assert reached(0) == {1, 2}
    assert reached(1) == {0, 2, 7}  # cat and cot in one letter, cup in another
    assert [reached(i) for i in (3, 4, 5, 6)] == [{3}, {4}, {5}, {6}]


def test_words_swap_with_their_neighbours():
    words = " ".join(f"w{i}" for i in range(200))
    _, inputs, text = noisy(words, word_swap=1.0)
    np.testing.assert_array_equal(inputs, text)
    order = [int(word[1:]) for word in BYTES.decode(text).split()]
    assert sorted(order) == list(range(200))
    moved = np.abs(np.array(order) - np.arange(200))
    assert moved.max() == 1 and moved.mean() > 0.95
    order = [int(word[1:]) for word in BYTES.decode(noisy(words, word_swap=0.2)[2]).split()]
    assert np.mean(np.array(order) != np.arange(200)) == pytest.approx(0.2, abs=0.1)


def test_spans_are_shuffled_within_themselves():
    words = " ".join(f"w{i}" for i in range(161))
    order = np.array([int(w[1:]) for w in BYTES.decode(noisy(words, span_shuffle=1.0)[2]).split()])
    assert order[0] == 0  # it has no white space before it
    np.testing.assert_array_equal(np.sort(order[1:].reshape(20, 8), axis=1).ravel(), np.arange(1, 161))
    assert (order[1:].reshape(20, 8) != np.arange(1, 161).reshape(20, 8)).any(axis=1).mean() > 0.9


def test_sentences_come_in_another_order():
    _, inputs, text = noisy(TEXT + " And an unfinished", sentence_reorder=1.0)
    np.testing.assert_array_equal(inputs, text)
    found = BYTES.decode(text).split(". ")
    expected = (TEXT + " And an unfinished").split(". ")
    assert sorted(found) == sorted(expected) and found != expected
    assert (found[0], found[-1]) == (expected[0], expected[-1])
    chinese = "春天来了。花开了！你好吗？很好。" * 5
    _, _, text = noisy(chinese, build_tokenizer("char", [chinese]), sentence_reorder=1.0)
    assert sorted(build_tokenizer("char", [chinese]).decode(text)) == sorted(chinese)


@pytest.mark.parametrize("name", ORDER_NOISE)
def test_order_noise_keeps_every_token_and_never_crosses_documents(name):
    one = np.concatenate([[256], BYTES.encode(TEXT)])
    other = np.concatenate([[256], BYTES.encode(TEXT.upper())])
    tokens = np.concatenate([one, other]).astype(np.int32)
    augment = Augmentation(BYTES, seed=0, **{name: 1.0})
    _, text = augment(tokens, np.arange(len(tokens)), np.zeros(len(tokens), np.int64))
    assert (text != tokens).any()
    for part in (slice(0, len(one)), slice(len(one), None)):
        np.testing.assert_array_equal(np.sort(text[part]), np.sort(tokens[part]))
    assert text[0] == text[len(one)] == 256


def test_noise_is_a_function_of_seed_epoch_and_place():
    rates = dict.fromkeys(KINDS, 0.2)
    _, first, _ = noisy(**rates)
    np.testing.assert_array_equal(noisy(**rates)[1], first)
    for other in ({"seed": 2}, {"epoch": 1}, {"place": 10_000}):
        assert (noisy(**rates, **other)[1] != first).any()
    tokens, whole, _ = noisy(token_dropout=0.3)
    augment = Augmentation(BYTES, seed=1, token_dropout=0.3)
    part, _ = augment(tokens[50:90], np.arange(50, 90), np.zeros(40, np.int64))
    np.testing.assert_array_equal(part, whole[50:90])


def make(split, **options):
    kind = PackedBatches if split.has_mask else Batches
    return kind(split, **{"context_length": 160 if split.has_mask else 64, "batch_size": 8, "seed": 3, **options})


@pytest.mark.parametrize("which", ["text", "dialogues"])
def test_off_means_the_same_bytes(which, text_split, dialogue_store):
    split = text_split if which == "text" else dialogue_store.split("train")
    tokenizer = BYTES if which == "text" else dialogue_store.tokenizer()
    assert Augmentation.from_config(config_lib.get_default(), tokenizer, seed=0) is None
    plain = make(split)
    for options in ({}, dict.fromkeys(KINDS, 0.0)):
        augmented = make(split, augmentation=Augmentation(tokenizer, seed=0, **options))
        for step in range(4):
            for name, value in plain[step].items():
                assert augmented[step][name].tobytes() == value.tobytes(), name


@pytest.mark.parametrize("which", ["text", "dialogues"])
def test_augmented_batches_do_not_depend_on_processes_or_the_order_of_asking(which, text_split, dialogue_store):
    split = text_split if which == "text" else dialogue_store.split("train")
    tokenizer = BYTES if which == "text" else dialogue_store.tokenizer()
    augmentation = Augmentation(tokenizer, seed=0, **dict.fromkeys(KINDS, 0.3))
    whole = make(split, augmentation=augmentation)
    quarters = [make(split, augmentation=augmentation, rows=slice(i, i + 2)) for i in (0, 2, 4, 6)]
    expected = [whole[step] for step in range(6)]
    assert (expected[2]["tokens"] != make(split)[2]["tokens"]).any()
    for step in (5, 0, 3):
        for name, value in expected[step].items():
            np.testing.assert_array_equal(np.concatenate([part[step][name] for part in quarters]), value)


def test_targets_follow_the_order_that_is_read(text_split):
    batch = make(text_split, augmentation=Augmentation(BYTES, seed=0, **dict.fromkeys(ORDER_NOISE, 0.5)))[0]
    np.testing.assert_array_equal(batch["tokens"][:, 1:], batch["targets"][:, :-1])
    assert (batch["tokens"] != make(text_split)[0]["tokens"]).any()


def test_of_dialogues_only_what_the_user_says_is_touched(dialogue_store):
    split, tokenizer = dialogue_store.split("train"), dialogue_store.tokenizer()
    tokens, mask = split.read(0, split.num_tokens), split.read_mask(0, split.num_tokens)
    places, epochs = np.arange(len(tokens)), np.zeros(len(tokens), np.int64)
    inputs, text = Augmentation(tokenizer, seed=0, token_replacement=1.0)(tokens, places, epochs, mask)
    np.testing.assert_array_equal(text, tokens)
    touched = tokenizer.decode(tokens[inputs != tokens])
    assert "river" in touched and "sure" not in touched
    assert "user" not in touched and "assistant" not in touched and "\n" not in touched
    special = np.isin(tokens, list(tokenizer.special_tokens.values()))
    for name in KINDS:
        inputs, text = Augmentation(tokenizer, seed=0, **{name: 1.0})(tokens, places, epochs, mask)
        for changed in (inputs, text):
            np.testing.assert_array_equal(changed[mask | special], tokens[mask | special])


def test_dialogue_batches_keep_targets_that_bear_loss(dialogue_store):
    split, tokenizer = dialogue_store.split("train"), dialogue_store.tokenizer()
    noise = Augmentation(tokenizer, seed=0, **dict.fromkeys(KINDS, 1.0))
    clean, noised = make(split)[1], make(split, augmentation=noise)[1]
    assert (clean["tokens"] != noised["tokens"]).any()
    for name in ("weights", "segment_ids", "positions"):
        np.testing.assert_array_equal(clean[name], noised[name])
    trained = clean["weights"] == 1
    np.testing.assert_array_equal(clean["targets"][trained], noised["targets"][trained])
