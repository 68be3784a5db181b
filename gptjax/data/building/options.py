"""The options of a build that decide what is in the store."""

from dataclasses import dataclass
from typing import Any

from gptjax.data.building.splits import Fractions
from gptjax.errors import UserError

DTYPES = ("auto", "uint16", "uint32")


@dataclass(frozen=True)
class Options:
    """How a store is built.

    Attributes:
      cleaning: profile of `gptjax.data.cleaning.cleaner.Cleaner`.
      cleaning_options: its options.
      deduplicate: "none", "exact", or "near" for exact and near duplicates.
      near_threshold: Jaccard similarity of word 5-grams from which on documents are near duplicates.
      decontaminate: globs of JSONL files of evaluation sets.
      split_by: "document" by a hash of each document; "position" by the order of the characters: the first of
        them train, then validation, then test, exact to the character; "auto" as the source says if it does,
        else "document" for 100 documents or more.
      validation_fraction: share of the documents or characters held out for validation.
      test_fraction: the same for testing.
      shard_tokens: most tokens in a file.
      dtype: of the tokens; "auto" is uint16 where the vocabulary fits.
    """

    cleaning: str = "none"
    cleaning_options: dict[str, Any] | None = None
    deduplicate: str = "none"
    near_threshold: float = 0.8
    decontaminate: tuple[str, ...] = ()
    split_by: str = "auto"
    validation_fraction: float = 0.05
    test_fraction: float = 0.05
    shard_tokens: int = 100_000_000
    dtype: str = "auto"

    def __post_init__(self) -> None:
        if self.shard_tokens < 1:
            raise UserError(f"shard_tokens={self.shard_tokens}: expected at least 1")
        if self.dtype not in DTYPES:
            raise UserError(f"dtype={self.dtype!r}: expected one of {', '.join(DTYPES)}")

    @property
    def fractions(self) -> Fractions:
        return Fractions(self.validation_fraction, self.test_fraction)
