"""From a config's data section to an open token store."""

import os
from pathlib import Path

from gptjax.config import Config
from gptjax.data.sources import open_source
from gptjax.data.store import Progress, Store, cached_store, open_store


def cache_directory(config: Config) -> Path:
    """data.cache_dir, else $GPTJAX_CACHE, else ~/.cache/gptjax."""
    return Path(config.data.cache_dir or os.environ.get("GPTJAX_CACHE") or "~/.cache/gptjax").expanduser()


def open_corpus(config: Config, *, progress: Progress | None = None) -> Store:
    """The prepared store of `store:DIR`, or the cached one of any other source, built if it is new."""
    data = config.data
    if data.source.startswith("store:"):
        return open_store(data.source)
    source = open_source(data.source, data_dir=data.data_dir, decode_errors=data.decode_errors)
    return cached_store(
        source,
        cache_directory(config),
        tokenizer=config.tokenizer,
        split_by=data.split_by,
        validation_fraction=data.validation_fraction,
        test_fraction=data.test_fraction,
        progress=progress,
    )
