"""The options of a build that decide what is in the store."""

from dataclasses import dataclass
from typing import Any

from gptjax.config import OPTIONS, Option
from gptjax.config.validation import option_problem
from gptjax.data.building.splits import Fractions
from gptjax.errors import UserError

_OF_A_CONFIG = (
    "cleaning",
    "cleaning_options",
    "cleaned_splits",
    "deduplicate",
    "near_threshold",
    "decontaminate",
    "split_by",
    "validation_fraction",
    "test_fraction",
)
# Name, default, meaning and range of each; a config has all but the last two in its section data.
BUILD_OPTIONS: dict[str, Option] = {
    **{name: OPTIONS["data"][name] for name in _OF_A_CONFIG},
    "shard_tokens": Option(100_000_000, "most tokens in a file", minimum=1, maximum=10**12),
    "dtype": Option(
        "auto", "type of the tokens; auto = uint16 where the vocabulary fits", choices=("auto", "uint16", "uint32")
    ),
}


def _default(name: str) -> Any:
    return BUILD_OPTIONS[name].default


@dataclass(frozen=True)
class Options:
    """How a store is built: the values of `BUILD_OPTIONS`, parsed where they are text with a structure.

    Raises UserError where a value is out of range.
    """

    cleaning: str = _default("cleaning")
    cleaning_options: dict[str, Any] | None = None  # by name
    cleaned_splits: str = _default("cleaned_splits")
    deduplicate: str = _default("deduplicate")
    near_threshold: float = _default("near_threshold")
    decontaminate: tuple[str, ...] = ()  # globs
    split_by: str = _default("split_by")
    validation_fraction: float = _default("validation_fraction")
    test_fraction: float = _default("test_fraction")
    shard_tokens: int = _default("shard_tokens")
    dtype: str = _default("dtype")

    def __post_init__(self) -> None:
        for name, option in BUILD_OPTIONS.items():
            parsed = name in ("cleaning_options", "decontaminate")
            if not parsed and (problem := option_problem(name, option, getattr(self, name))):
                raise UserError(problem)
        if self.cleaned_splits == "train" and self.split_by != "document":
            raise UserError(
                f"data.cleaned_splits=train needs data.split_by=document, and it is {self.split_by}: what is held out "
                "must be known before a text is cleaned"
            )

    @property
    def fractions(self) -> Fractions:
        return Fractions(self.validation_fraction, self.test_fraction)
