"""From a config's data section to open token stores and the batches of a run."""

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
from gptjax.data.sources.opening import open_source
from gptjax.data.store.store import Store, open_store
from gptjax.data.store.token_files import open_token_files
from gptjax.data.tokenization.templates import ChatTemplate
from gptjax.data.tokenization.tokenizer import Tokenizer, build_tokenizer
from gptjax.errors import UserError


class WeightedStore(NamedTuple):
    """One source of a run; the only one unless data.source is a mixture."""

    name: str
    store: Store
    weight: Fraction


def open_sources(config: Config, *, progress: Progress | None = None) -> list[WeightedStore]:
    """`open_corpus` of every source of data.source, all with the tokenizer of the first.

    Raises:
      UserError: a prepared store has another tokenizer, or two stores of dialogues another chat template.
    """
    sources: list[WeightedStore] = []
    tokenizer = None
    for name, spec, weight in parse_mixture(config.data.source):
        one = config.copy_and_resolve_references().unlock()
        one.data.source = spec
        store = open_corpus(one, tokenizer=tokenizer, progress=progress)
        sources.append(WeightedStore(name, store, weight))
        tokenizer = tokenizer or store.tokenizer()
        if store.tokenizer().sha256 != tokenizer.sha256:
            raise UserError(
                f"the sources of a mixture share one tokenizer, that of the first, {sources[0].name!r}; {spec!r} has "
                "another. Put a prepared store or a source of dialogues first, or prepare it with "
                "--tokenizer=hf:DIR of the first"
            )
    templates = {json.dumps(template) for s in sources if (template := s.store.manifest.get("chat_template"))}
    if len(templates) > 1:
        raise UserError(f"data.source={config.data.source!r}: the stores have different chat templates")
    return sources


def identity(sources: Sequence[WeightedStore]) -> dict[str, Any]:
    """What a run remembers of its data: the fingerprint of the text and what the manifest says of the tokenizer."""
    fingerprints = [source.store.fingerprint for source in sources]
    joined = hashlib.sha256("".join(fingerprints).encode()).hexdigest()
    return {
        "source_fingerprint": fingerprints[0] if len(sources) == 1 else joined,
        "tokenizer": sources[0].store.manifest["tokenizer"],
    }


def data_card(sources: Sequence[WeightedStore]) -> str:
    """The cards of all stores that have one, as Markdown."""
    cards = [source.store.directory / "card.md" for source in sources]
    return "\n\n".join(card.read_text(encoding="utf-8") for card in cards if card.exists())


def chat_template(sources: Sequence[WeightedStore]) -> ChatTemplate | None:
    """The template of the dialogues, where there are any."""
    descriptions = (source.store.manifest.get("chat_template") for source in sources)
    return next((ChatTemplate.from_json(description) for description in descriptions if description), None)


def open_batches(
    sources: Sequence[WeightedStore], config: Config, *, rows: slice | np.ndarray | None = None
) -> BatchSource:
    """The training batches: dialogues packed whole, text in windows, several sources mixed by weight."""
    tokenizer, size = sources[0].store.tokenizer(), config.train.batch_size
    if len(sources) == 1:
        return _batches(sources[0].store, config, tokenizer, config.seed, batch_size=size, rows=rows)
    parts = {
        # A mixture asks for rows, not batches, and may go through a small source again and again.
        source.name: _batches(source.store, config, tokenizer, _source_seed(config.seed, number), batch_size=1)
        for number, source in enumerate(sources)
    }
    weights = {source.name: source.weight for source in sources}
    return Mixture(parts, weights, batch_size=size, seed=config.seed, rows=rows)


def _batches(store: Store, config: Config, tokenizer: Tokenizer, seed: int, **options: Any) -> BatchSource:
    split = store.split("train")
    kind = PackedBatches if split.has_mask else Batches
    return kind(
        split,
        context_length=config.model.context_length,
        seed=seed,
        isolate_documents=config.data.isolate_documents,
        augmentation=Augmentation.from_config(config, tokenizer, seed=seed),
        **options,
    )


def _source_seed(seed: int, number: int) -> int:
    return int(np.random.SeedSequence(seed, spawn_key=(number,)).generate_state(1)[0])


def open_corpus(config: Config, *, tokenizer: Tokenizer | None = None, progress: Progress | None = None) -> Store:
    """The prepared store of `store:DIR`, token files, or the cached store of any other source, built if it is new.

    Args:
      tokenizer: instead of the one that the config describes.
    """
    data = config.data
    cache = cache_directory(config)
    if data.source.startswith("store:"):
        return open_store(data.source)
    if data.source.startswith("tokens:"):
        if tokenizer is None and not config.tokenizer.startswith("hf:") and config.tokenizer != "byte":
            raise UserError(
                f"data.source={data.source!r} holds tokens, and tokenizer={config.tokenizer!r} is trained on text: "
                "name the tokenizer that the files were made with, such as tokenizer=hf:gpt2"
            )
        return open_token_files(data.source, tokenizer or build_tokenizer(config.tokenizer), cache / "tokens")
    source = open_source(data.source, data_dir=data.data_dir, decode_errors=data.decode_errors, on_error=data.on_error)
    return cached_store(
        source,
        cache,
        tokenizer=tokenizer or config.tokenizer,
        cleaning=data.cleaning,
        cleaning_options=parse_options(data.cleaning_options),
        deduplicate=data.deduplicate,
        near_threshold=data.near_threshold,
        decontaminate=parse_globs(data.decontaminate),
        split_by=data.split_by,
        validation_fraction=data.validation_fraction,
        test_fraction=data.test_fraction,
        workers=data.workers,
        progress=progress,
    )


def parse_options(text: str) -> dict[str, Any]:
    """{"min_characters": 200, "languages": "en,zh"} from "min_characters=200 languages=en,zh"."""
    options: dict[str, Any] = {}
    for entry in text.split():
        name, equals, value = entry.partition("=")
        if not equals:
            raise UserError(f"data.cleaning_options={text!r}: expected NAME=VALUE, found {entry!r}")
        try:
            options[name] = json.loads(value)
        except ValueError:
            options[name] = value
    return options


def parse_globs(text: str) -> tuple[str, ...]:
    """The globs of a list with commas."""
    return tuple(pattern.strip() for pattern in text.split(",") if pattern.strip())
