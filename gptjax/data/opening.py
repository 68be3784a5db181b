"""Opens the token stores and the batches of a run, as the data section of its config says."""

import hashlib
import json
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np

from gptjax.config import Config, cache_directory
from gptjax.data.building.build import Progress, cached_store
from gptjax.data.pipeline.augmentation import Augmentation
from gptjax.data.pipeline.batches import Batches, BatchSource
from gptjax.data.pipeline.mixture import Mixture, parse_mixture
from gptjax.data.pipeline.packing import PackedBatches
from gptjax.data.pipeline.preferences import Examples, InOrder, PreferenceBatches
from gptjax.data.pipeline.prompts import PromptBatches, Questions
from gptjax.data.sources.base import READING
from gptjax.data.sources.opening import open_source
from gptjax.data.store.shards import TokenSplit
from gptjax.data.store.store import Store, open_store
from gptjax.data.store.token_files import open_token_files
from gptjax.data.tokenization.templates import ChatTemplate
from gptjax.data.tokenization.tokenizer import Tokenizer, build_tokenizer
from gptjax.errors import UserError

MOST_CHECKED_BYTES = 1 << 30  # the checksums of a store up to this size are compared before it is used


class WeightedStore(NamedTuple):
    """One source of a run; the only one unless data.source is a mixture."""

    name: str
    store: Store
    weight: Fraction


class RunData:
    """The data of a run: a token store for each source, their tokenizer, and the batches that are made of them.

    Attributes:
      stores: in the order of the mixture.
      tokenizer: of all stores.
      template: the chat template of the dialogues, or None.
    """

    def __init__(self, stores: Sequence[WeightedStore]):
        self.stores = list(stores)
        self._examples: dict[tuple[str, str, int, bool], Examples] = {}
        self.tokenizer: Tokenizer = self.stores[0].store.tokenizer()
        descriptions = (source.store.manifest.get("chat_template") for source in self.stores)
        described = next(filter(None, descriptions), None)
        self.template: ChatTemplate | None = described and ChatTemplate.from_json(described)

    @classmethod
    def open(cls, config: Config, *, tokenizer: Tokenizer | None = None, progress: Progress | None = None) -> "RunData":
        """Opens, or builds, the store of every source of data.source, all with the tokenizer of the first.

        Args:
          tokenizer: instead of the one that the config describes.

        Raises:
          UserError: a prepared store has another tokenizer, or two stores of dialogues have different chat templates.
        """
        stores: list[WeightedStore] = []
        for name, spec, weight in parse_mixture(config.data.source):
            one = config.copy_and_resolve_references().unlock()
            one.data.source = spec
            store = open_store_of(one, tokenizer=tokenizer, progress=progress)
            stores.append(WeightedStore(name, store, weight))
            tokenizer = tokenizer or store.tokenizer()
            if store.tokenizer().sha256 != tokenizer.sha256:
                raise UserError(
                    f"the sources of a mixture share one tokenizer, that of the first, {stores[0].name!r}; {spec!r} "
                    "has another. Put a prepared store or a source of dialogues first, or prepare it with "
                    "--tokenizer=hf:DIR of the first"
                )
        templates = {json.dumps(template) for s in stores if (template := s.store.manifest.get("chat_template"))}
        if len(templates) > 1:
            raise UserError(f"data.source={config.data.source!r}: the stores have different chat templates")
        return cls(stores)

    @property
    def has_dialogues(self) -> bool:
        """Whether any source has a loss mask."""
        return any(source.store.split("train").has_mask for source in self.stores)

    @property
    def has_preferences(self) -> bool:
        """Whether any source compares or judges answers."""
        return any(source.store.split("train").has_preferences for source in self.stores)

    @property
    def identity(self) -> dict[str, Any]:
        """What a run records of its data: fingerprints, and the tokenizer as the manifest describes it.

        `source_fingerprint` covers texts and their names, `splits` the splits made of them, `tokens` the tokens of all
        splits without names.
        """
        stores = [source.store for source in self.stores]
        contents = [store.content for store in stores]
        identity = {
            "source_fingerprint": _joined([store.fingerprint for store in stores]),
            "splits": _joined([store.layout for store in stores]),
            "tokens": _joined(contents) if all(contents) else "",
            "tokenizer": stores[0].manifest["tokenizer"],
        }
        if len(self.stores) > 1:
            identity["weights"] = [str(source.weight) for source in self.stores]
        return identity

    @property
    def card(self) -> str:
        """The cards of all stores that have one, as Markdown."""
        cards = [source.store.directory / "card.md" for source in self.stores]
        return "\n\n".join(card.read_text(encoding="utf-8") for card in cards if card.exists())

    @property
    def num_training_tokens(self) -> int:
        return sum(source.store.split("train").num_tokens for source in self.stores)

    def splits(self, name: str) -> dict[str, TokenSplit]:
        """A split of every source, by the source's name."""
        return {source.name: source.store.split(name) for source in self.stores}

    def questions(self, config: Config, split: str) -> Questions:
        """The questions of the dialogues of a split. Raises UserError if none fits the context."""
        splits = {s.name: s.store.split(split) for s in self.stores if split in s.store.splits}
        most_tokens = config.model.context_length - config.objective.max_new_tokens
        return Questions.read(splits, self.tokenizer, most_tokens=most_tokens)

    def prompts(self, config: Config) -> PromptBatches:
        """Which questions of the train split are asked at each step. Raises UserError as `questions`."""
        objective = config.objective
        return PromptBatches(
            self.questions(config, "train"),
            batch_size=config.train.batch_size,
            group_size=objective.group_size,
            num_iterations=objective.num_iterations,
            seed=data_seed(config),
        )

    def batches(
        self, config: Config, *, rows: slice | np.ndarray | None = None, dialogues: bool = False
    ) -> BatchSource:
        """The training batches, several sources mixed by weight.

        Args:
          rows: those of the global batch that this process reads; default: all.
          dialogues: whether dialogues are packed whole, with their loss mask. Otherwise, as always for text, they are
            read in windows.

        Raises UserError where there are no dialogues to pack.
        """
        if dialogues and not self.has_dialogues:
            raise UserError(
                f"objective.name=instruction needs dialogues, whose loss mask says what is learnt, and "
                f"data.source={config.data.source!r} has none; use --config.objective.name=language_modeling for text"
            )
        size, seed = config.train.batch_size, data_seed(config)
        if len(self.stores) == 1:
            return self._batches(self.stores[0].store, config, seed, dialogues, batch_size=size, rows=rows)
        parts = {
            # A mixture asks for rows, not batches, and may go through a small source again and again.
            source.name: self._batches(source.store, config, _source_seed(seed, number), dialogues, batch_size=1)
            for number, source in enumerate(self.stores)
        }
        return self._mixed(parts, size, seed, rows)

    def preference_batches(
        self, config: Config, *, judged: bool, rows: slice | np.ndarray | None = None
    ) -> BatchSource:
        """The training batches of pairs or, `judged`, of single answers; several sources mixed by weight.

        Raises UserError where a source has none, or the config asks for augmentation, which these do not have.
        """
        size, seed = config.train.batch_size, data_seed(config)
        if Augmentation.from_config(config, self.tokenizer, seed=seed) is not None:
            raise UserError("preferences are not augmented; leave out data.token_dropout and the options like it")
        parts = self.examples(config, "train", judged=judged)
        if len(parts) == 1:
            return PreferenceBatches(*parts.values(), batch_size=size, seed=seed, rows=rows)
        sources = {
            name: PreferenceBatches(part, batch_size=1, seed=_source_seed(seed, number))
            for number, (name, part) in enumerate(parts.items())
        }
        return self._mixed(sources, size, seed, rows)

    def validation_preferences(
        self, config: Config, *, judged: bool, rows: slice | np.ndarray | None = None
    ) -> BatchSource | None:
        """All pairs, or judged answers, of the validation splits in batches; None if there are none."""
        parts = [part for part in self.examples(config, "validation", judged=judged).values() if len(part)]
        return InOrder(parts, batch_size=config.train.batch_size, rows=rows) if parts else None

    def examples(self, config: Config, split: str, *, judged: bool) -> dict[str, Examples]:
        """The examples of each source that has the split; they are cached, so each call returns the same objects."""
        length = config.model.context_length
        for source in self.stores:
            key = (source.name, split, length, judged)
            if split in source.store.splits and key not in self._examples:
                self._examples[key] = Examples.of(source.store.split(split), length, judged=judged)
        found = {source.name: self._examples.get((source.name, split, length, judged)) for source in self.stores}
        return {name: examples for name, examples in found.items() if examples is not None}

    def _mixed(self, parts: dict[str, Any], size: int, seed: int, rows: slice | np.ndarray | None) -> Mixture:
        weights = {source.name: source.weight for source in self.stores}
        return Mixture(parts, weights, batch_size=size, seed=seed, rows=rows)

    def _batches(self, store: Store, config: Config, seed: int, dialogues: bool, **options: Any) -> BatchSource:
        split = store.split("train")
        kind = PackedBatches if dialogues and split.has_mask else Batches
        return kind(
            split,
            context_length=config.model.context_length,
            seed=seed,
            isolate_documents=config.data.isolate_documents,
            augmentation=Augmentation.from_config(config, self.tokenizer, seed=seed),
            **options,
        )


def _joined(fingerprints: list[str]) -> str:
    return fingerprints[0] if len(fingerprints) == 1 else hashlib.sha256("".join(fingerprints).encode()).hexdigest()


def data_seed(config: Config) -> int:
    """The seed of data order and augmentation."""
    return config.seed if config.data_seed < 0 else config.data_seed


def _source_seed(seed: int, number: int) -> int:
    return int(np.random.SeedSequence(seed, spawn_key=(number,)).generate_state(1)[0])


def open_store_of(config: Config, *, tokenizer: Tokenizer | None = None, progress: Progress | None = None) -> Store:
    """The prepared store of `store:DIR`, token files, or the cached store of any other source, built if it is new.

    Args:
      tokenizer: instead of the one that the config describes.
    """
    data = config.data
    cache = cache_directory(config)
    if data.source.startswith("store:"):
        return _whole(open_store(data.source))
    if data.source.startswith("tokens:"):
        if tokenizer is None and not config.tokenizer.startswith("hf:") and config.tokenizer != "byte":
            raise UserError(
                f"data.source={data.source!r} holds tokens, and tokenizer={config.tokenizer!r} is trained on text: "
                "name the tokenizer that the files were made with, such as tokenizer=hf:gpt2"
            )
        tokenizer = tokenizer or build_tokenizer(config.tokenizer)
        return open_token_files(data.source, tokenizer, cache / "tokens", dtype=data.token_dtype)
    reading = {name: data[name] for name in READING}
    source = open_source(data.source, data_dir=data.data_dir, on_error=data.on_error, **reading)
    built = cached_store(
        source,
        cache,
        tokenizer=tokenizer or config.tokenizer,
        cleaning=data.cleaning,
        cleaning_options=parse_options(data.cleaning_options),
        cleaned_splits=data.cleaned_splits,
        deduplicate=data.deduplicate,
        near_threshold=data.near_threshold,
        decontaminate=parse_globs(data.decontaminate),
        split_by=data.split_by,
        validation_fraction=data.validation_fraction,
        test_fraction=data.test_fraction,
        workers=data.workers,
        progress=progress,
    )
    return _whole(built)


def _whole(store: Store) -> Store:
    """The store, after its checksums are compared if it is small. Raises UserError."""
    if not store.url and store.num_bytes <= MOST_CHECKED_BYTES:
        store.verify()
    return store


def parse_options(text: str) -> dict[str, Any]:
    """{"min_characters": 200, "languages": "en,zh"} from "min_characters=200 languages=en,zh"."""
    options: dict[str, Any] = {}
    for entry in text.split():
        name, equals, value = entry.partition("=")
        if not equals:
            raise UserError(f"data.cleaning_options={text!r}: expected NAME=VALUE, found {entry!r}")
        try:
            options[name] = json.loads(value)
        except (ValueError, RecursionError):
            options[name] = value
    return options


def parse_globs(text: str) -> tuple[str, ...]:
    """The globs of a list with commas."""
    return tuple(pattern.strip() for pattern in text.split(",") if pattern.strip())
