"""Prepare a corpus: raw text or dialogues -> token store, which `--config.data.source=store:DIR` trains on.

  python -m gptjax.prepare --source='text:books/*.txt' --output=stores/books --tokenizer=bpe:8192
  python -m gptjax.prepare --source='html:pages/**/*.html' --output=stores/web --cleaning=web --deduplicate=near
  python -m gptjax.prepare --source='alpaca:chat.json' --output=stores/chat --cleaning=dialogue
  python -m gptjax.prepare --output=stores/chat --show=3

A build that is interrupted is continued by the same command. The store has a data card: card.md.
"""

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from absl import flags

from gptjax import cli
from gptjax.config import OPTIONS, Option
from gptjax.config.validation import option_problem
from gptjax.config.values import read
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


_SHOWN = {
    "show": Option(0, "rows of the store to print", minimum=0, maximum=100_000),
    "show_tokens": Option(256, "tokens in a row", minimum=1, maximum=1_000_000),
}


def main(argv: list[str]) -> None:
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files may not be valid text
    flag_values = _flags()
    cli.parse(flag_values, argv, __doc__)
    try:
        values = _values(flag_values)
        if flag_values.source:
            prepare(flag_values.source, flag_values, values)
        if values["show"]:
            show(flag_values.output, values["show"], values["show_tokens"])
    except UserError as error:
        raise UserError(_of_this_verb(str(error))) from None


def _values(flag_values: flags.FlagValues) -> dict[str, Any]:
    """{option: value}. Raises UserError with every problem."""
    options = {**_OPTIONS, **_SHOWN}
    values, found = {}, []
    for name, option in options.items():
        values[name] = flag_values[name].value
        if not isinstance(values[name], type(option.default)):
            kind = "a whole number" if isinstance(option.default, int) else "a number"
            found.append(f"--{name} is {_cut(str(values[name]))!r}; it must be {kind} from {_range(option)}")
        elif problem := option_problem(f"--{name}", option, values[name]):
            found.append(_cut(problem, 500))
    for name in ("output",) if values["show"] else ("source", "output"):
        if not flag_values[name].value:
            raise UserError(f"--{name} is missing; {flag_values[name].help}")
    if found:
        raise UserError("; ".join(found))
    return values


class _Number(flags.ArgumentParser):
    """A number in any notation (1e3, 8.0). Other text stays as it is, and `_values` refuses it in plain words."""

    def __init__(self, option: Option):
        self._option = option

    def parse(self, argument: Any) -> Any:
        try:
            return read(self._option, argument)
        except ValueError:
            return argument


def _range(option: Option) -> str:
    return f"{option.minimum:,} to {option.maximum:,}" if option.maximum is not None else f"{option.minimum:,} on"


def _cut(text: str, most: int = 100) -> str:
    return text if len(text) <= most else f"{text[:most]}..."


def _of_this_verb(message: str) -> str:
    """The message with the flags of this verb: --NAME in place of --config.data.NAME or data.NAME."""
    names = "|".join(name for name in _OPTIONS if name != "tokenizer")
    message = re.sub(rf"(?<![\w./-])(?:--config\.)?data\.({names})\b", r"--\1", message)
    return message.replace("--config.tokenizer=", "--tokenizer=")


def _flags() -> flags.FlagValues:
    values = flags.FlagValues()
    define = {"flag_values": values}
    flags.DEFINE_string("source", None, "e.g. --source='text:books/*.txt'; see README for every kind", **define)
    flags.DEFINE_string("output", None, "a new directory, e.g. --output=stores/books", **define)
    for name, option in _OPTIONS.items():
        choices = f"{' | '.join(option.choices)}: " if option.choices else ""
        example = option.choices[-1] if option.choices else _EXAMPLES[name]
        text = f"{choices}{option.help}, e.g. --{name}={example}"
        _define(name, option, text, values)
    flags.DEFINE_enum(
        "runner", "local", ["local", "beam"], "processes of this machine, or Apache Beam, e.g. --runner=beam", **define
    )
    flags.DEFINE_string(
        "beam_options", "", "options of Beam, e.g. --beam_options='--runner=FlinkRunner --parallelism=64'", **define
    )
    _define("show", _SHOWN["show"], "rows of the store to print, e.g. --show=3", values)
    _define("show_tokens", _SHOWN["show_tokens"], "tokens in a row, e.g. --show_tokens=1024", values)
    return values


def _define(name: str, option: Option, text: str, values: flags.FlagValues) -> None:
    if isinstance(option.default, str):
        flags.DEFINE_string(name, option.default, text, flag_values=values)
    else:
        flags.DEFINE(_Number(option), name, option.default, text, flag_values=values)


def prepare(spec: str, flag_values: flags.FlagValues, values: dict[str, Any]) -> None:
    """Builds the store and prints what is in it."""
    from gptjax.buckets import Bucket, is_url
    from gptjax.data.building.build import build_store, place_of, work_directory
    from gptjax.data.opening import parse_globs, parse_options
    from gptjax.data.sources.opening import open_source

    _refuse_mixture(spec)
    output = place_of(flag_values.output).absolute()
    source = open_source(
        spec,
        data_dir=values["data_dir"],
        on_error=values["on_error"],
        **{name: values[name] for name in READING},
    )
    build = {name: values[name] for name in BUILD_OPTIONS}
    build["cleaning_options"] = parse_options(values["cleaning_options"])
    build["decontaminate"] = parse_globs(values["decontaminate"])
    built = Options(**build)
    url = flag_values.output if is_url(flag_values.output) else ""
    there = Bucket(url).read("manifest.json") is not None if url else (output / "manifest.json").exists()
    try:
        with _progress() as progress:
            store = build_store(
                source,
                url or output,
                tokenizer=values["tokenizer"],
                runner=flag_values.runner,
                workers=values["workers"],
                beam_options=flag_values.beam_options.split(),
                progress=progress,
                **vars(built),
            )
    except KeyboardInterrupt:
        if not work_directory(output).exists():
            raise
        raise RunError(
            f"interrupted; what is done is kept in {work_directory(output)}: the same command continues"
        ) from None
    if there:
        print(f"{url or output} already exists, built from the same source with the same options")
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
    if removed := store.removed_by_cleaning:
        steps = ", ".join(f"{name} {count:,}" for name, count in removed.items())
        count = sum(removed.values())
        print(f"left out: {count:,} documents removed by cleaning ({steps}); the data card has examples")
    for note in store.notes:
        print(f"beware: {note}")
    print(f"vocabulary {store.tokenizer().vocab_size}, fingerprint {store.fingerprint[:12]}")
    print(f"data card: {flag_values.output.rstrip('/')}/card.md")
    print(f"train on it: --config.data.source=store:{flag_values.output}")


def _refuse_mixture(spec: str) -> None:
    path = spec.partition(":")[2].partition("#")[0]
    is_file = "\0" not in path and os.path.exists(os.path.expanduser(path))  # noqa: PTH110, PTH111
    if re.search(r"\S\s+\+\s+\S", spec) and not is_file:
        parts = [part.rpartition("@")[0] or part for part in re.split(r"\s+\+\s+", spec.strip())]
        stores = " + ".join(f"store:DIR{number}@1" for number in range(1, len(parts) + 1))
        raise UserError(
            f"--source={_cut(spec)!r} is a mixture, which is made while training: prepare each of its "
            f"{len(parts)} sources into a directory of its own, with one tokenizer, then train with "
            f"--config.data.source='{stores}' (@ gives the weight)"
        )


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


def show(directory: str, rows: int, row_tokens: int) -> None:
    """Prints the first rows of the training split with the starts of documents and, in colour, the loss mask."""
    from rich.console import Console

    from gptjax.data.store.store import open_store
    from gptjax.data.store.view import rows_as_text

    console = Console(highlight=False, soft_wrap=True)
    for row in rows_as_text(open_store(directory), "train", rows, row_tokens):
        console.print(row)


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
