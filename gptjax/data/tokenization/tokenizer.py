"""Text to token ids and back. Every tokenizer is stored as a Hugging Face `tokenizer.json`."""

import collections
import difflib
import functools
import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int32
from numpy.typing import ArrayLike

from gptjax.data.tokenization import published, published_files, vocabularies
from gptjax.errors import UserError
from gptjax.files import write_whole

END_OF_TEXT = "<|endoftext|>"
SPECS = ("char", "byte", "bpe:VOCAB_SIZE[:digits=N]", "word:VOCAB_SIZE", "jieba:VOCAB_SIZE", "hf:DIR_OR_NAME")

MAX_VOCAB_SIZE = 1_000_000
_SHOWN_PIECES, _SHOWN_CHARACTERS = 10, 20  # of text that a vocabulary lacks, in a message
# {kind that is trained: (its smallest vocabulary, the content of that)}
_SMALLEST = {
    "bpe": (257, "the 256 bytes and eot"),
    "word": (3, "a word, <|unknown|> and eot"),
    "jieba": (3, "a word, <|unknown|> and eot"),
}
# End-of-text tokens of well-known models, in the order in which they are tried if no file names one.
_END_OF_TEXT_NAMES = (
    END_OF_TEXT,
    "</s>",
    "<|end_of_text|>",
    "<eos>",
    "<|im_end|>",
    "<|eot_id|>",
    "<｜end▁of▁sentence｜>",
    "[SEP]",
)


class Tokenizer:
    """A vocabulary with its end-of-text token.

    Text never becomes a special token: "<|endoftext|>" in a text is encoded as the characters it consists of.

    Attributes:
      kind: "char", "byte", "bpe", "word", "jieba", or the model type of another Hugging Face tokenizer
        ("unigram", "wordpiece").
      vocab_size: number of ids, the end-of-text token and other special tokens included.
      eot_id: id of the end-of-text token, which begins every document in a token store.
      eot_token: its text.
    """

    def __init__(self, tokenizer: Any, eot_token: str | None = None):
        """Wraps a `tokenizers.Tokenizer`. Raises UserError if it has no end-of-text token."""
        from tokenizers import AddedToken

        description = json.loads(tokenizer.to_str())
        self.eot_token = eot_token or _find_end_of_text(tokenizer, description)
        if tokenizer.token_to_id(self.eot_token) is None:
            raise UserError(f"the tokenizer has no token {self.eot_token!r}, which should end a text")
        tokenizer.add_special_tokens([AddedToken(self.eot_token, special=True, normalized=False)])
        tokenizer.encode_special_tokens = True
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self.kind = _kind(description)
        self.eot_id: int = tokenizer.token_to_id(self.eot_token)
        self.vocab_size: int = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        self._id_of_codepoint = _codepoint_table(description) if self.kind == "char" else None

    @classmethod
    def from_str(cls, text: str, *, eot_token: str | None = None) -> "Tokenizer":
        """Reads the text of a `tokenizer.json`. Raises UserError if it is not one."""
        from tokenizers import Tokenizer as HuggingFaceTokenizer

        return cls(published.guarded(lambda: HuggingFaceTokenizer.from_str(text), "tokenizer.json"), eot_token)

    @classmethod
    def from_file(cls, path: str | Path) -> "Tokenizer":
        """Reads a `tokenizer.json`, and `eos_token` from the `tokenizer_config.json` beside it, if any."""
        path = Path(path)
        return cls.from_str(published_files.read_text(path), eot_token=_configured_end_of_text(path.parent))

    def with_special_tokens(self, names: Iterable[str]) -> "Tokenizer":
        """This vocabulary, with missing special tokens such as <|im_start|> added at its end."""
        from tokenizers import AddedToken, Tokenizer

        tokenizer = Tokenizer.from_str(self.to_str())
        tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
        return type(self)(tokenizer, self.eot_token)

    @functools.cached_property
    def prefix(self) -> tuple[int, ...]:
        """The ids that other programs put before a text, as tokenizer.json says, such as <s>; `encode` adds none."""
        return published.beginning(self._tokenizer)

    @property
    def begin_ids(self) -> tuple[int, ...]:
        """The ids before a text that a model continues: `prefix`, or the end-of-text token if that is empty."""
        return self.prefix or (self.eot_id,)

    def extends(self, other: "Tokenizer") -> bool:
        """Whether this encodes every text to the same ids as `other`; it may have more special tokens."""
        if self.sha256 == other.sha256:
            return True
        ours, theirs = (json.loads(tokenizer.to_str()) for tokenizer in (self, other))
        if any(ours[part] != theirs[part] for part in ("model", "normalizer", "pre_tokenizer")):
            return False
        return self.eot_id == other.eot_id and other.special_tokens.items() <= self.special_tokens.items()

    @functools.cached_property
    def special_tokens(self) -> dict[str, int]:
        """Text and id of every special token, the end-of-text token among them."""
        added = self._tokenizer.get_added_tokens_decoder()
        return {token.content: i for i, token in sorted(added.items()) if token.special}

    def to_str(self) -> str:
        """The text of the `tokenizer.json`."""
        return self._tokenizer.to_str(pretty=False)

    def save(self, path: str | Path) -> None:
        """Writes the `tokenizer.json`, and a `tokenizer_config.json` if needed for the eot token."""
        path = Path(path)
        write_whole(path, self.to_str())
        if _find_end_of_text(self._tokenizer, json.loads(self.to_str())) != self.eot_token:
            config = json.dumps({"eos_token": self.eot_token}, ensure_ascii=False)
            write_whole(path.with_name("tokenizer_config.json"), config)

    @functools.cached_property
    def sha256(self) -> str:
        """sha256 of the `tokenizer.json`, independent of white space and of the order of keys."""
        canonical = json.dumps(json.loads(self.to_str()), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    def encode(self, text: str) -> Int32[np.ndarray, " tokens"]:
        """The token ids of `text`, with nothing added at either end.

        Raises:
          UserError: a `char` vocabulary lacks a character, or the text has half a surrogate pair.
        """
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[Int32[np.ndarray, " tokens"]]:
        """What `encode` returns for each text; uses all cores unless the kind has a faster way."""
        if self.kind == "char":
            return [self._encode_characters(text) for text in texts]
        if self.kind == "byte":
            return [np.frombuffer(_utf8(text), dtype=np.uint8).astype(np.int32) for text in texts]
        for text in texts:
            _utf8(text)
        if self.kind == "jieba":
            texts = [vocabularies.segmented(text) for text in texts]
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]

    def token_bytes(self) -> Int32[np.ndarray, " vocab"]:
        """UTF-8 bytes of the text of each token; 0 for special tokens.

        Raises:
          UserError: the tokens of this kind are not pieces of the text.
        """
        description = json.loads(self.to_str())
        if (description["decoder"] or {}).get("type") not in ("ByteLevel", "Fuse"):
            raise UserError(f"the tokenizer is of the kind {self.kind}, whose tokens have no fixed number of bytes")
        is_bytes = description["decoder"]["type"] == "ByteLevel"
        sizes = np.zeros(self.vocab_size, np.int32)
        for token, i in description["model"]["vocab"].items():
            sizes[i] = len(token) if is_bytes else len(token.encode())
        sizes[list(self.special_tokens.values())] = 0
        return sizes

    def _encode_characters(self, text: str) -> Int32[np.ndarray, " tokens"]:
        codepoints = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
        table = self._id_of_codepoint
        ids = table[np.minimum(codepoints, len(table) - 1)]
        if ids.size and ids.min() < 0:
            character = text[int(np.argmax(ids < 0))]
            raise UserError(
                f"the character {character!r} (U+{ord(character):04X}) is not in the vocabulary, which is "
                "the characters of the training corpus; leave it out, or train with tokenizer=byte"
            )
        return ids

    @functools.cached_property
    def unknown_token(self) -> str | None:
        """The token for text that the vocabulary lacks, such as [UNK]; None if it lacks nothing."""
        model = json.loads(self.to_str())["model"]
        token = model.get("unk_token")
        if model.get("unk_id") is not None and not model.get("byte_fallback"):
            token = model["vocab"][model["unk_id"]][0]
        return token if token is not None and self._tokenizer.token_to_id(token) is not None else None

    @functools.cached_property
    def unknown_id(self) -> int | None:
        """The id of `unknown_token`; None also where what a vocabulary lacks is refused, or reads so by intent."""
        if self.kind in ("char", "word", "jieba") or self.unknown_token is None:
            return None
        return self._tokenizer.token_to_id(self.unknown_token)

    def lacking(self, texts: Iterable[str]) -> str:
        """A sentence about the parts of some texts that the vocabulary lacks; empty if it has all."""
        if (number := self.unknown_id) is None:
            return ""
        pieces: collections.Counter[str] = collections.Counter()
        for text in texts:
            encoding = self._tokenizer.encode(text, add_special_tokens=False)
            places = zip(encoding.ids, encoding.offsets, strict=True)
            pieces.update(text[begin:end] for i, (begin, end) in places if i == number)
        if not pieces:
            return ""
        shown = " ".join(piece[:_SHOWN_CHARACTERS] for piece, _ in pieces.most_common(_SHOWN_PIECES))
        more = f" and {len(pieces) - _SHOWN_PIECES} others" if len(pieces) > _SHOWN_PIECES else ""
        return f"the vocabulary lacks {shown}{more}: the model reads {self.unknown_token} there"

    def decode(self, ids: ArrayLike) -> str:
        """The text of `ids` (any array or sequence of integers), special tokens left out.

        Bytes that are not UTF-8, such as half a character at the end, become U+FFFD.
        """
        return self._tokenizer.decode(np.asarray(ids, dtype=np.int64).tolist(), skip_special_tokens=True)

    def __reduce__(self):
        return _unpickle, (self.to_str(), self.eot_token)


def build_tokenizer(spec: str, texts: Iterable[str] = ()) -> Tokenizer:
    """Makes the tokenizer that `spec`, one of `SPECS`, describes.

    Args:
      spec: `char` has the characters of the texts, in their order, then eot. `byte` has the 256 bytes, whose
        ids are their values, then eot. `bpe:N` is a byte-level BPE with GPT-2's pre-tokenisation, in which
        Han characters never merge with others, trained on the texts, of at most N ids with eot the last;
        `bpe:N:digits=3` cuts numbers into groups of at most three digits, as GPT-4's tokenizer does.
        `word:N` and `jieba:N` have the N - 2 most frequent words of the texts, as white space and punctuation
        or as jieba separates them; every other word is <|unknown|>, and `word` does not keep white space: for
        ablations, not for models that write. `hf:DIR_OR_NAME` is a Hugging Face tokenizer on disk or on the
        hub: tokenizer.json, or the vocabulary of GPT-2, Qwen2, BERT (vocab.txt) or SentencePiece.
      texts: read once, and not for `byte` and `hf`.

    Raises:
      UserError: the spec is unknown, the texts are empty, or the Hugging Face tokenizer cannot be loaded.
    """
    scheme, _, rest = spec.partition(":")
    if spec == "char":
        return Tokenizer(vocabularies.characters(texts, END_OF_TEXT))
    if spec == "byte":
        return Tokenizer(vocabularies.all_bytes(END_OF_TEXT))
    check_spec(spec)
    if scheme == "bpe":
        size, digits = _size_and_digits(rest)
        return Tokenizer(vocabularies.train_bpe(texts, size, END_OF_TEXT, digits=digits))
    if scheme in ("word", "jieba"):
        return Tokenizer(vocabularies.words(scheme, texts, int(rest), END_OF_TEXT))
    if scheme == "hf" and rest:
        return Tokenizer(*published.read(rest))
    raise AssertionError(spec)


def check_spec(spec: "str | Tokenizer") -> None:
    """Raises UserError if a spec describes no tokenizer; opens no file and reads no corpus."""
    if not isinstance(spec, str) or spec in ("char", "byte"):
        return
    scheme, _, rest = spec.partition(":")
    if scheme in _SMALLEST:
        smallest, what = _SMALLEST[scheme]
        size, colon, digits = rest.partition(":")
        if scheme == "bpe" and colon:
            if not re.fullmatch(r"digits=[1-9]", digits):
                raise UserError(
                    f"tokenizer {spec[:60]!r}: expected bpe:N:digits=D, where D is the most digits in a token, from "
                    "1 to 9, such as bpe:8192:digits=3"
                )
            rest = size
        whole = rest.isascii() and rest.isdecimal() and len(rest) < 20
        if not whole or not smallest <= int(rest) <= MAX_VOCAB_SIZE:
            raise UserError(
                f"tokenizer {spec[:60]!r}: expected {scheme}:N with a whole number N from {smallest} ({what}) to "
                f"{MAX_VOCAB_SIZE:,}, such as {scheme}:8192"
            )
    elif scheme != "hf" or not rest:
        near = difflib.get_close_matches(scheme, ("char", "byte", *_SMALLEST, "hf"), n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(f"unknown tokenizer {spec[:60]!r}: expected one of {', '.join(SPECS)}{hint}")


def _size_and_digits(rest: str) -> tuple[int, int]:
    """(vocabulary size, most digits in a token or 0) of the text after "bpe:"."""
    size, _, digits = rest.partition(":digits=")
    return int(size), int(digits or 0)


def _unpickle(text: str, eot_token: str) -> Tokenizer:
    return Tokenizer.from_str(text, eot_token=eot_token)


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"character {error.start} of a text is half a surrogate pair ({text[error.start]!r}), not text; "
            "repair it where it comes from"
        ) from None


def _find_end_of_text(tokenizer: Any, description: dict) -> str:
    special = {token["content"] for token in description["added_tokens"] if token["special"]}
    for names in (special, tokenizer.get_vocab(with_added_tokens=True)):
        for name in _END_OF_TEXT_NAMES:
            if name in names:
                return name
    raise UserError(
        f"the tokenizer has no end-of-text token; special tokens: {', '.join(sorted(special)) or 'none'}; "
        "name it as eos_token in the tokenizer_config.json beside the tokenizer.json"
    )


def _configured_end_of_text(directory: Path) -> str | None:
    """`eos_token` in the files beside a tokenizer.json."""
    roles = published_files.read_special_tokens(directory).roles() | published_files.read_config(directory).roles()
    return published_files.content(roles["eos_token"]) if "eos_token" in roles else None


def _kind(description: dict) -> str:
    model = description["model"]
    splitter = description["pre_tokenizer"] or {}
    if model["type"] == "WordLevel" and model["unk_token"] == vocabularies.UNKNOWN:
        if splitter.get("pattern") == {"Regex": vocabularies.ANY_CHARACTER}:
            return "char"
        return "jieba" if splitter.get("pattern") == {"String": vocabularies.WORD_BORDER} else "word"
    if model["type"] != "BPE" or model["merges"]:
        return model["type"].lower()
    values = [model["vocab"].get(symbol) for symbol in vocabularies.BYTE_SYMBOLS]
    plain = description["normalizer"] is None and splitter.get("add_prefix_space") is False
    return "byte" if plain and values == list(range(256)) else "bpe"


def _codepoint_table(description: dict) -> Int32[np.ndarray, " codepoints"]:
    """Token id of each code point, up to one more than the largest; -1 if it has none."""
    vocabulary = {ord(text): i for text, i in description["model"]["vocab"].items() if len(text) == 1}
    table = np.full(max(vocabulary, default=0) + 2, -1, dtype=np.int32)
    table[list(vocabulary)] = list(vocabulary.values())
    return table


def known_vocab_size(spec: str) -> int:
    """The vocabulary size of a tokenizer without its training corpus; 0 if it depends on that.

    bpe:N, word:N and jieba:N have N at most. Raises UserError if the files of hf:... are missing.
    """
    check_spec(spec)
    scheme, _, rest = spec.partition(":")
    if scheme in _SMALLEST:
        return _size_and_digits(rest)[0]
    return build_tokenizer(spec).vocab_size if scheme in ("byte", "hf") else 0
