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
from gptjax.config import OPTIONS
from gptjax.config.validation import option_problem
from gptjax.data.building.options import BUILD_OPTIONS, Options
from gptjax.data.sources.base import READING
from gptjax.errors import RunError, UserError

_OPTIONS = {
    "tokenizer": OPTIONS["tokenizer"],
    **BUILD_OPTIONS,
    **{name: OPTIONS["data"][name] for name in ("data_dir", *READING, "on_error", "workers")},
}
_EXAMPLES = {
    "tokenizer": "char",
    "cleaning": "web-language",
    "cleaning_options": "'min_characters=200 languages=en,zh'",
    "near_threshold": 0.7,
    "decontaminate": "'eval/*.jsonl'",
    "validation_fraction": 0.1,
    "test_fraction": 0,
    "shard_tokens": 10_000_000,
    "data_dir": "~/tensorflow_datasets",
    "workers": 8,
    "encoding": "gb18030",
}


def main(argv: list[str]) -> None:
    options = _flags()
    cli.parse(options, argv, __doc__)
    for name in ("output",) if options.show else ("source", "output"):
        if not options[name].value:
            raise UserError(f"--{name} is missing; {options[name].help}")
    problems = (option_problem(f"--{name}", option, options[name].value) for name, option in _OPTIONS.items())
    if found := [problem for problem in problems if problem]:
        raise UserError("; ".join(found))
    if options.source:
        prepare(options)
    if options.show:
        show(Path(options.output), options.show, options.show_tokens)


def _flags() -> flags.FlagValues:
    values = flags.FlagValues()
    define = {"flag_values": values}
    flags.DEFINE_string("source", None, "e.g. --source='text:books/*.txt'; see README for every kind", **define)
    flags.DEFINE_string("output", None, "a new directory, e.g. --output=stores/books", **define)
    for name, option in _OPTIONS.items():
        kind = {float: flags.DEFINE_float, int: flags.DEFINE_integer, str: flags.DEFINE_string}[type(option.default)]
        choices = f"{' | '.join(option.choices)}: " if option.choices else ""
        example = option.choices[-1] if option.choices else _EXAMPLES[name]
        kind(name, option.default, f"{choices}{option.help}, e.g. --{name}={example}", **define)
    flags.DEFINE_enum("runner", "local", ["local", "beam"], "e.g. --runner=beam", **define)
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
        on_error=options.on_error,
        **{name: options[name].value for name in READING},
    )
    values = {name: options[name].value for name in BUILD_OPTIONS}
    values["cleaning_options"] = parse_options(options.cleaning_options)
    values["decontaminate"] = parse_globs(options.decontaminate)
    built = Options(**values)
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
                **vars(built),
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
