"""How the vocabulary of each kind of tokenizer is made. Everything returned is a `tokenizers.Tokenizer`."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from gptjax.data.scripts import HAN_SCRIPT_RUN
from gptjax.errors import UserError

MAX_TRAINING_CHARACTERS = 64_000_000
MAX_WORD_CHARACTERS = 1000
_LONG_SPACE = re.compile(rf"\s{{{MAX_WORD_CHARACTERS + 1}}}")
ANY_CHARACTER = r"[\s\S]"  # Oniguruma, which reads this, has no (?s:.)
UNKNOWN = "<|unknown|>"
WORD_BORDER = "\x1f"  # ASCII's unit separator, between the words that jieba found


def _byte_symbols() -> list[str]:
    """The character that stands for each byte in a byte-level vocabulary: GPT-2's `bytes_to_unicode`."""
    shown = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    hidden = [byte for byte in range(256) if byte not in shown]
    return [chr(byte) if byte in shown else chr(256 + hidden.index(byte)) for byte in range(256)]


BYTE_SYMBOLS = _byte_symbols()


def characters(texts: Iterable[str], end_of_text: str) -> Any:
    """One id for each character seen, in code point order. Raises UserError if there is no text."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    seen: set[str] = set()
    for text in texts:
        seen.update(text)
    if not seen:
        raise UserError("the tokenizer char takes its vocabulary from the corpus, and the corpus has no text")
    vocabulary = {character: i for i, character in enumerate(sorted(seen))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(ANY_CHARACTER), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([end_of_text])
    return tokenizer


def all_bytes(end_of_text: str) -> Any:
    """The 256 bytes, whose ids are their values."""
    from tokenizers import Tokenizer, models

    vocabulary = {symbol: byte for byte, symbol in enumerate(BYTE_SYMBOLS)}
    return _byte_level(Tokenizer(models.BPE(vocab=vocabulary, merges=[])), end_of_text, use_regex=False)


def train_bpe(texts: Iterable[str], vocab_size: int, end_of_text: str, *, digits: int = 0) -> Any:
    """A byte-level BPE of `vocab_size` ids, or of fewer if the texts have no more pairs to merge.

    A run of Han characters is a word of its own, so no token has both Han and other characters. With `digits` > 0, a
    number without the space before it is cut from the left into groups of that many digits, and no token crosses the
    border of a group; 0: a number is a word.

    Texts of more than `MAX_TRAINING_CHARACTERS` in all are sampled evenly. For training, a word of more than
    `MAX_WORD_CHARACTERS` (a line of letters without a space) is cut into pieces of that length, since the time grows
    with the square of the length; encoding takes words whole.
    """
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    sample = _even_sample(texts, MAX_TRAINING_CHARACTERS)
    if not sample:
        raise UserError(f"the tokenizer bpe:{vocab_size} is trained on the corpus, and the corpus has no text")
    tokenizer = _byte_level(Tokenizer(models.BPE()), None)
    han = pre_tokenizers.Split(Regex(HAN_SCRIPT_RUN), "isolated")
    groups = [pre_tokenizers.Split(Regex(rf"\p{{N}}{{1,{digits}}}"), "isolated")] if digits else []
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*groups, han, tokenizer.pre_tokenizer])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # A list: the splitter cannot be used while the tokenizer is trained.
    pieces = [piece for text in sample for piece in _without_long_words(text, tokenizer.pre_tokenizer)]
    tokenizer.train_from_iterator(pieces, trainer, length=len(pieces))
    tokenizer.add_special_tokens([end_of_text])
    return tokenizer


def _without_long_words(text: str, splitter: Any) -> Iterator[str]:
    """The text, cut only within words that are too long."""
    longest = max(map(len, text.split()), default=0)
    if longest <= MAX_WORD_CHARACTERS and not _LONG_SPACE.search(text):
        yield text
        return
    start = 0
    for _, (begin, end) in splitter.pre_tokenize_str(text):
        if end - begin > MAX_WORD_CHARACTERS:
            yield text[start:begin]
            yield from (text[i : min(i + MAX_WORD_CHARACTERS, end)] for i in range(begin, end, MAX_WORD_CHARACTERS))
            start = end
    yield text[start:]


def words(kind: str, texts: Iterable[str], vocab_size: int, end_of_text: str) -> Any:
    """The most frequent words, of kind "word" or "jieba", the more frequent first; then <|unknown|> and eot.

    Texts of more than `MAX_TRAINING_CHARACTERS` in all are sampled evenly.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    border = pre_tokenizers.Split(WORD_BORDER, "removed")
    han = pre_tokenizers.Split(Regex(HAN_SCRIPT_RUN), "isolated")
    by_space = pre_tokenizers.Sequence([han, pre_tokenizers.Whitespace()])
    splitter = border if kind == "jieba" else by_space
    counts: Counter[str] = Counter()
    for text in _even_sample(texts, MAX_TRAINING_CHARACTERS):
        pieces = splitter.pre_tokenize_str(segmented(text) if kind == "jieba" else text)
        counts.update(piece for piece, _ in pieces)
    if not counts:
        raise UserError(f"the tokenizer {kind}:{vocab_size} is trained on the corpus, and the corpus has no text")
    ordered = sorted(counts, key=lambda word: (-counts[word], word))[: vocab_size - 2]
    vocabulary = {word: i for i, word in enumerate([*ordered, UNKNOWN])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = splitter
    if kind == "jieba":
        tokenizer.decoder = decoders.Fuse()  # jieba keeps white space as words; "word" is joined with spaces
    tokenizer.add_special_tokens([end_of_text])
    return tokenizer


def segmented(text: str) -> str:
    """`text` with `WORD_BORDER` between the words that jieba finds. Raises UserError if jieba is missing."""
    try:
        import jieba
    except ImportError:
        raise UserError("the tokenizer jieba:N needs the library jieba: pip install 'gptjax[data]'") from None
    jieba.setLogLevel("WARNING")
    return WORD_BORDER.join(jieba.cut(text))


def _even_sample(texts: Iterable[str], max_characters: int) -> list[str]:
    """All texts if they fit; else every second, or every fourth, and so on, spread over the whole corpus."""
    sample: list[str] = []
    characters = 0
    stride = 1
    for index, text in enumerate(text for text in texts if text):
        if index % stride:
            continue
        sample.append(text)
        characters += len(text)
        while characters > max_characters and len(sample) > 1:
            sample = sample[::2]
            stride *= 2
            characters = sum(map(len, sample))
    return sample


def _byte_level(tokenizer: Any, end_of_text: str | None, *, use_regex: bool = True) -> Any:
    from tokenizers import decoders, pre_tokenizers

    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    tokenizer.decoder = decoders.ByteLevel()
    if end_of_text is not None:
        tokenizer.add_special_tokens([end_of_text])
    return tokenizer
