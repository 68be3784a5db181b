"""From a config's data section to an open token store."""

import json
import os
from pathlib import Path
from typing import Any

from gptjax.config import Config
from gptjax.data.build import Progress, cached_store
from gptjax.data.sources import open_source
from gptjax.data.store import Store, open_store
from gptjax.data.token_files import open_token_files
from gptjax.data.tokenizers import build_tokenizer
from gptjax.errors import UserError


def cache_directory(config: Config) -> Path:
    """data.cache_dir, else $GPTJAX_CACHE, else ~/.cache/gptjax."""
    return Path(config.data.cache_dir or os.environ.get("GPTJAX_CACHE") or "~/.cache/gptjax").expanduser()


def open_corpus(config: Config, *, progress: Progress | None = None) -> Store:
    """The prepared store of `store:DIR`, token files, or the cached store of any other source, built if it is
    new."""
    data = config.data
    cache = cache_directory(config)
    if data.source.startswith("store:"):
        return open_store(data.source)
    if data.source.startswith("tokens:"):
        return open_token_files(data.source, build_tokenizer(config.tokenizer), cache / "tokens")
    source = open_source(data.source, data_dir=data.data_dir, decode_errors=data.decode_errors, on_error=data.on_error)
    return cached_store(
        source,
        cache,
        tokenizer=config.tokenizer,
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
