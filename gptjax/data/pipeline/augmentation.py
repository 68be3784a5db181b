"""Noise on the fly: a model reads each document differently in each epoch.

There are two kinds of noise. Each has a probability; 0 turns it off.

* Noise on the inputs. The targets stay the text as it was written, so that the model learns to go on from a
  faulty beginning and never to write one, as with the word dropout of Bowman et al. 2016.
    token_dropout: a token is replaced by the end-of-text token, since vocabularies have no blank.
    token_replacement: a token becomes any other token of the vocabulary, all equally probable.
    character_noise: a token becomes one whose text differs in one letter or digit of the same kind; one without
      such a neighbour stays. With tokens of bytes or characters any misspelling is possible; with others, only
      one that keeps the division into tokens, so that every target keeps its place.
* Another order, in inputs and targets alike: targets in the old order would teach the model to depart from
  the text that it reads.
    word_swap: a word changes places with its neighbour.
    span_shuffle: the words of a span of eight are shuffled.
    sentence_reorder: the sentences of a document are shuffled.

A word begins at a token that begins with white space or a Han character. A sentence ends at a token that ends
with its punctuation, or has a line break. The first word and the first and an unfinished last sentence of a
document stay in place, because the words have no white space before them and the last sentence has no end. Where a row
cuts a document, each side is shuffled by itself.

Special tokens are never changed. In a dialogue only the prompts are changed: no token that counts in the loss, and
nothing up to the first line break after a special token, which is where templates write the role.

A draw is a hash of the seed, the epoch and the token's place in the split, so the noise on a token is the same in
every row, batch and process.
"""

import unicodedata
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float64, Int, Int32, Int64

from gptjax.config import Config
from gptjax.data.pipeline.randomness import uniform
from gptjax.data.scripts import count_han
from gptjax.data.tokenization.tokenizer import Tokenizer

INPUT_NOISE = ("token_dropout", "token_replacement", "character_noise")
ORDER_NOISE = ("word_swap", "span_shuffle", "sentence_reorder")
SPAN_WORDS = 8
HALF_CHARACTER = "\ufffd"  # what decoders put in the place of bytes that are not UTF-8

_SENTENCE_ENDS = tuple(".!?…。！？")
_CLOSING = "\"'”’）)」』] "


class Augmentation:
    """The noise of one run.

    Attributes:
      rates: the probability of each kind of noise that is on.
    """

    def __init__(self, tokenizer: Tokenizer, *, seed: int, **rates: float):
        """`rates` are probabilities by the names of `INPUT_NOISE` and `ORDER_NOISE`."""
        self.rates = {name: rate for name, rate in rates.items() if rate}
        self._keys = {
            name: np.random.SeedSequence(seed, spawn_key=(number,)).generate_state(2, np.uint64)
            for number, name in enumerate(INPUT_NOISE + ORDER_NOISE)
        }
        self._blank = tokenizer.eot_id
        self._is_special = np.zeros(tokenizer.vocab_size, np.bool_)
        self._is_special[list(tokenizer.special_tokens.values())] = True
        self._regular = np.flatnonzero(~self._is_special).astype(np.int32)
        texts = token_texts(tokenizer)
        self._breaks_line = np.array(["\n" in text for text in texts])
        self._begins_word = np.array([text[:1].isspace() or count_han(text[:1]) > 0 for text in texts])
        self._ends_sentence = self._breaks_line | [text.rstrip(_CLOSING).endswith(_SENTENCE_ENDS) for text in texts]
        self._misspellings = Misspellings.of(texts) if "character_noise" in self.rates else None

    @classmethod
    def from_config(cls, config: Config, tokenizer: Tokenizer, *, seed: int) -> "Augmentation | None":
        """The noise of the data section; None if all its rates are 0."""
        rates = {name: config.data[name] for name in INPUT_NOISE + ORDER_NOISE}
        return cls(tokenizer, seed=seed, **rates) if any(rates.values()) else None

    def __call__(
        self,
        tokens: Int32[np.ndarray, "*shape"],
        places: Int64[np.ndarray, "*shape"],
        epochs: Int64[np.ndarray, "*shape"],
        trained: Bool[np.ndarray, "*shape"] | None = None,
    ) -> tuple[Int32[np.ndarray, "*shape"], Int32[np.ndarray, "*shape"]]:
        """(inputs, text): the tokens with noise, and the tokens from which targets are taken.

        Args:
          tokens: pieces of documents, one after another.
          places: the offset of each token in its split; a piece begins where they jump.
          epochs: the epoch of each token.
          trained: which tokens count in the loss, for dialogues.
        """
        shape, trained = tokens.shape, None if trained is None else trained.ravel()
        tokens, places, epochs = tokens.ravel(), places.ravel(), epochs.ravel()
        runs = self._runs(tokens, places, trained)

        def draws(name: str, at: np.ndarray, *, second: bool = False) -> Float64[np.ndarray, " n"]:
            return uniform(int(self._keys[name][int(second)]), epochs[at], places[at])

        # 1. Order: changes the targets, too, so it comes before inputs and targets differ. From the largest unit to the
        # smallest: each shuffle finds its units in the text that the one before has made.
        text = tokens
        if rate := self.rates.get("sentence_reorder"):
            units = sentences(text, runs, self._ends_sentence)
            first = borders(runs[units.starts])
            chosen = draws("sentence_reorder", units.starts[first]) < rate
            keys = draws("sentence_reorder", units.starts, second=True)
            text = text[shuffle(units, first, chosen, keys, len(text))]
        if rate := self.rates.get("span_shuffle"):
            units = words(text, runs, self._begins_word)
            first = every(SPAN_WORDS, runs[units.starts])
            chosen = draws("span_shuffle", units.starts[first]) < rate
            keys = draws("span_shuffle", units.starts, second=True)
            text = text[shuffle(units, first, chosen, keys, len(text))]
        if rate := self.rates.get("word_swap"):
            units = words(text, runs, self._begins_word)
            first_of_run = borders(runs[units.starts])
            # Which neighbours make a pair differs from epoch to epoch.
            odd = draws("word_swap", units.starts[first_of_run], second=True) < 0.5
            first = every(2, runs[units.starts], skip=odd[np.cumsum(first_of_run) - 1])
            chosen = draws("word_swap", units.starts[first]) < rate
            text = text[shuffle(units, first, chosen, -np.arange(len(units.starts)), len(text))]

        # 2. Noise: changes only inputs. Dropout comes last, so that a blank is never changed again.
        inputs = text.copy()
        free = np.flatnonzero(runs)
        for name in ("character_noise", "token_replacement", "token_dropout"):
            if rate := self.rates.get(name):
                at = free[draws(name, free) < rate]
                inputs[at] = self._changed(name, inputs[at], draws(name, at, second=True))
        return inputs.reshape(shape), text.reshape(shape)

    def _changed(
        self, name: str, tokens: Int32[np.ndarray, " n"], draws: Float64[np.ndarray, " n"]
    ) -> Int32[np.ndarray, " n"]:
        if name == "character_noise":
            return self._misspellings.choose(tokens, draws)
        if name == "token_replacement":
            return self._regular[(draws * len(self._regular)).astype(np.int64)]
        return np.full_like(tokens, self._blank)

    def _runs(
        self, tokens: Int32[np.ndarray, " n"], places: Int64[np.ndarray, " n"], trained: Bool[np.ndarray, " n"] | None
    ) -> Int64[np.ndarray, " n"]:
        """For each token the number, from 1, of its run of tokens that noise may change; 0 where it may not."""
        begins = np.diff(places, prepend=places[:1] - 2) != 1
        special = self._is_special[tokens]
        free = ~special
        if trained is not None:
            index = np.arange(len(tokens))
            header = np.maximum.accumulate(np.where(special | begins, index, -1))
            line = np.maximum.accumulate(np.where(self._breaks_line[tokens], index, -1))
            line_before = np.concatenate([[-1], line[:-1]])[: len(tokens)]
            free &= ~trained & (line_before >= header) & ~begins
        begins = free & (begins | ~np.concatenate([[False], free[:-1]])[: len(free)])
        return np.where(free, np.cumsum(begins), 0)


class Units(NamedTuple):
    """Words or sentences: where each starts and stops, from left to right; those of one run are adjacent."""

    starts: Int64[np.ndarray, " units"]
    stops: Int64[np.ndarray, " units"]


def words(
    tokens: Int32[np.ndarray, " n"], runs: Int64[np.ndarray, " n"], begins_word: Bool[np.ndarray, " vocab"]
) -> Units:
    """The words of each run; tokens before its first word belong to none."""
    starts = np.flatnonzero(begins_word[tokens] & (runs > 0))
    run_stops = np.flatnonzero(borders(np.append(runs, -1)))
    run_stop = run_stops[np.searchsorted(run_stops, starts, side="right")]
    return Units(starts, np.minimum(np.append(starts[1:], len(tokens))[: len(starts)], run_stop))


def sentences(
    tokens: Int32[np.ndarray, " n"], runs: Int64[np.ndarray, " n"], ends_sentence: Bool[np.ndarray, " vocab"]
) -> Units:
    """The complete sentences of each run, except its first."""
    is_end = ends_sentence[tokens] & (runs > 0)
    goes_on = np.append(is_end[1:] & (runs[1:] == runs[:-1]), False)[: len(tokens)]
    ends = np.flatnonzero(is_end & ~goes_on)
    same = runs[ends[1:]] == runs[ends[:-1]]
    return Units(ends[:-1][same] + 1, ends[1:][same] + 1)


def borders(values: Int[np.ndarray, " n"]) -> Bool[np.ndarray, " n"]:
    """True at the first value, and where a value differs from the one before it."""
    return np.concatenate([[True], values[1:] != values[:-1]])[: len(values)]


def every(
    size: int, runs: Int64[np.ndarray, " units"], skip: Int[np.ndarray, " units"] | Bool[np.ndarray, " units"] | int = 0
) -> Bool[np.ndarray, " units"]:
    """True at the first unit of each group of `size` units of a run; the first group of a run is `skip` shorter."""
    index = np.arange(len(runs))
    in_run = index - np.maximum.accumulate(np.where(borders(runs), index, 0))
    return borders(runs) | ((in_run + skip) % size == 0)


def shuffle(
    units: Units, first: Bool[np.ndarray, " units"], chosen: Bool[np.ndarray, " groups"], keys: np.ndarray, size: int
) -> Int64[np.ndarray, " size"]:
    """The old place of the token at each new place, once the units of the chosen groups are sorted by their keys.

    Args:
      first: where a group of units begins.
      size: tokens in all.
    """
    group = np.cumsum(first) - 1
    ordinal = np.arange(len(group))
    order = np.lexsort((np.where(chosen[group], keys, ordinal), group))
    lengths = units.stops - units.starts
    come_from = np.arange(size)
    come_from[_inside(units.starts, lengths)] = _inside(units.starts[order], lengths[order])
    return come_from


def _inside(starts: Int64[np.ndarray, " n"], lengths: Int64[np.ndarray, " n"]) -> Int64[np.ndarray, " total"]:
    """start, start + 1, ... of each range, one after another."""
    return np.repeat(starts - np.cumsum(lengths) + lengths, lengths) + np.arange(lengths.sum())


class Misspellings(NamedTuple):
    """Tokens that differ in one letter or digit. A ring is a set of tokens that differ only in that character.

    Attributes:
      first_slot: [vocab + 1] where the slots of each token begin, one for each character that may differ.
      slot: [slots] place in `members`.
      ring_start, ring_size: [slots] of the ring it is in.
      members: [memberships] the tokens of each ring, one ring after another.
    """

    first_slot: np.ndarray
    slot: np.ndarray
    ring_start: np.ndarray
    ring_size: np.ndarray
    members: np.ndarray

    @classmethod
    def of(cls, texts: Sequence[str]) -> "Misspellings":
        rings: dict[tuple[str, str, str], list[int]] = defaultdict(list)
        for token, text in enumerate(texts):
            for i, character in enumerate(text if HALF_CHARACTER not in text else ""):
                kind = unicodedata.category(character)
                if kind in ("Ll", "Lu", "Lo", "Nd"):
                    rings[text[:i], kind, text[i + 1 :]].append(token)
        kept = [np.array(ring, np.int32) for ring in rings.values() if len(ring) > 1]
        sizes = np.array([len(ring) for ring in kept], np.int64)
        members = np.concatenate([np.empty(0, np.int32), *kept])
        slot = np.argsort(members, kind="stable")
        first_slot = np.searchsorted(members[slot], np.arange(len(texts) + 1))
        starts = np.repeat(np.cumsum(sizes) - sizes, sizes)
        return cls(first_slot, slot, starts[slot], np.repeat(sizes, sizes)[slot], members)

    def choose(self, tokens: Int32[np.ndarray, " n"], draws: Float64[np.ndarray, " n"]) -> Int32[np.ndarray, " n"]:
        """A neighbour of each token, or the token itself if it has none."""
        count = self.first_slot[tokens + 1] - self.first_slot[tokens]
        changed = tokens.copy()
        some = np.flatnonzero(count)
        scaled = draws[some] * count[some]
        which = self.first_slot[tokens[some]] + scaled.astype(np.int64)
        size, start = self.ring_size[which], self.ring_start[which]
        step = 1 + (scaled % 1 * (size - 1)).astype(np.int64)
        changed[some] = self.members[start + (self.slot[which] - start + step) % size]
        return changed


def token_texts(tokenizer: Tokenizer) -> list[str]:
    """What each token adds to a text, the white space before it included; "" for special tokens."""
    special = set(tokenizer.special_tokens.values())
    regular = [token for token in range(tokenizer.vocab_size) if token not in special]
    # Decoded after an alphanumeric token, since some decoders drop white space at the beginning of a text.
    anchor = next((token for token in regular if tokenizer.decode([token]).isalnum()), regular[0])
    begin = len(tokenizer.decode([anchor]))
    texts = [""] * tokenizer.vocab_size
    for token in regular:
        texts[token] = tokenizer.decode([anchor, token])[begin:]
    return texts
