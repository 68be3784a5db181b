"""Prepare a corpus: raw text or dialogues -> token store, which `--config.data.source=store:DIR` trains on.

  python -m gptjax.prepare --source='text:books/*.txt' --output=stores/books --tokenizer=bpe:8192
  python -m gptjax.prepare --source='html:pages/**/*.html' --output=stores/web --cleaning=web --deduplicate=near
  python -m gptjax.prepare --source='alpaca:chat.json' --output=stores/chat --cleaning=dialogue
  python -m gptjax.prepare --output=stores/chat --show=3

A build that is interrupted is continued by the same command. The store has a data card: card.md.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from absl import flags

from gptjax import cli
from gptjax.errors import RunError, UserError


def main(argv: list[str]) -> None:
    options = _flags()
    cli.parse(options, argv, __doc__)
    for name in ("output",) if options.show else ("source", "output"):
        if not options[name].value:
            raise UserError(f"--{name} is missing; {options[name].help}")
    if options.source:
        prepare(options)
    if options.show:
        show(Path(options.output), options.show, options.show_tokens)


def _flags() -> flags.FlagValues:
    values = flags.FlagValues()
    define = {"flag_values": values}
    flags.DEFINE_string("source", None, "e.g. --source='text:books/*.txt'; see README for every kind", **define)
    flags.DEFINE_string("output", None, "a new directory, e.g. --output=stores/books", **define)
    flags.DEFINE_string(
        "tokenizer",
        "bpe:4096",
        "char, byte, bpe:SIZE, word:SIZE, jieba:SIZE or hf:DIR, e.g. --tokenizer=char",
        **define,
    )
    flags.DEFINE_string(
        "cleaning",
        "none",
        "none, plain, web, code, dialogue, chinese, guide, steps, or e.g. --cleaning=web-language",
        **define,
    )
    flags.DEFINE_string(
        "cleaning_options", "", "e.g. --cleaning_options='min_characters=200 languages=en,zh'", **define
    )
    flags.DEFINE_enum("deduplicate", "none", ["none", "exact", "near"], "e.g. --deduplicate=near", **define)
    flags.DEFINE_float(
        "near_threshold", 0.8, "Jaccard similarity of near duplicates, e.g. --near_threshold=0.7", **define
    )
    flags.DEFINE_string("decontaminate", "", "evaluation sets, e.g. --decontaminate='eval/*.jsonl'", **define)
    flags.DEFINE_string("data_dir", "", "of prepared TFDS datasets, e.g. --data_dir=~/tensorflow_datasets", **define)
    flags.DEFINE_enum("decode_errors", "reject", ["reject", "replace"], "e.g. --decode_errors=replace", **define)
    flags.DEFINE_enum(
        "on_error",
        "raise",
        ["raise", "skip"],
        "documents that cannot be read, e.g. --on_error=skip",
        **define,
    )
    flags.DEFINE_enum("split_by", "auto", ["auto", "document", "position"], "e.g. --split_by=position", **define)
    flags.DEFINE_float("validation_fraction", 0.05, "e.g. --validation_fraction=0.1", **define)
    flags.DEFINE_float("test_fraction", 0.05, "e.g. --test_fraction=0", **define)
    flags.DEFINE_integer("shard_tokens", 100_000_000, "most tokens in a file, e.g. --shard_tokens=10000000", **define)
    flags.DEFINE_enum("dtype", "auto", ["auto", "uint16", "uint32"], "of the tokens, e.g. --dtype=uint32", **define)
    flags.DEFINE_enum("runner", "local", ["local", "beam"], "e.g. --runner=beam", **define)
    flags.DEFINE_integer("workers", 0, "processes of --runner=local; 0 = one a core, e.g. --workers=8", **define)
    flags.DEFINE_string("beam_options", "", "e.g. --beam_options='--runner=FlinkRunner --parallelism=64'", **define)
    flags.DEFINE_integer("show", 0, "rows of the store to print, e.g. --show=3", **define)
    flags.DEFINE_integer("show_tokens", 256, "tokens in a row, e.g. --show_tokens=1024", **define)
    return values


def prepare(options: flags.FlagValues) -> None:
    """Builds the store and prints what is in it."""
    from gptjax.data.building.build import build_store, work_directory
    from gptjax.data.opening import parse_globs, parse_options
    from gptjax.data.sources.opening import open_source

    source = open_source(
        options.source,
        data_dir=options.data_dir,
        decode_errors=options.decode_errors,
        on_error=options.on_error,
    )
    output = Path(options.output).expanduser()
    try:
        with _progress() as progress:
            store = build_store(
                source,
                output,
                tokenizer=options.tokenizer,
                runner=options.runner,
                workers=options.workers,
                beam_options=options.beam_options.split(),
                progress=progress,
                cleaning=options.cleaning,
                cleaning_options=parse_options(options.cleaning_options),
                deduplicate=options.deduplicate,
                near_threshold=options.near_threshold,
                decontaminate=parse_globs(options.decontaminate),
                split_by=options.split_by,
                validation_fraction=options.validation_fraction,
                test_fraction=options.test_fraction,
                shard_tokens=options.shard_tokens,
                dtype=options.dtype,
            )
    except KeyboardInterrupt:
        if not work_directory(output.absolute()).exists():
            raise
        raise RunError(
            f"interrupted; what is done is kept in {work_directory(output)}: the same command continues"
        ) from None
    for name in store.splits:
        about = store.manifest["splits"][name]
        size = f"{about['documents']:,} documents, {about['tokens']:,} tokens, {about['bytes']:,} bytes"
        print(f"{name:>10}: {size}")
    left_out = {
        "duplicates": "duplicates",
        "contaminated": "documents with text of evaluation sets",
        "skipped": "lines, documents or ends of files that cannot be read",
    }
    for name, meaning in left_out.items():
        if store.manifest[name]:
            print(f"left out: {store.manifest[name]:,} {meaning}")
    print(f"vocabulary {store.tokenizer().vocab_size}, fingerprint {store.fingerprint[:12]}")
    print(f"data card: {Path(options.output) / 'card.md'}")
    print(f"train on it: --config.data.source=store:{options.output}")


@contextmanager
def _progress() -> Iterator:
    """A bar for each stage on a terminal, nothing elsewhere."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description:9}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bars:
        tasks = {}

        def progress(stage: str, done: int, total: int | None) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done, total=total)

        yield progress


def show(directory: Path, rows: int, row_tokens: int) -> None:
    """Prints the first rows of the training split with the borders of documents and, in colour, the loss mask."""
    from rich.console import Console

    from gptjax.data.store.store import open_store
    from gptjax.data.store.view import rows_as_text

    console = Console(highlight=False, soft_wrap=True)
    for row in rows_as_text(open_store(directory), "train", rows, row_tokens):
        console.print(row)


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
