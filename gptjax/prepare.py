"""Prepare a corpus: raw text -> token store, which `--config.data.source=store:DIR` trains on.

  python -m gptjax.prepare --source='text:books/*.txt' --output=stores/books --tokenizer=bpe:8192
"""

import sys
from pathlib import Path

from absl import flags

from gptjax import cli
from gptjax.errors import UserError


def main(argv: list[str]) -> None:
    flag_values = flags.FlagValues()
    define = dict(flag_values=flag_values)
    flags.DEFINE_string("source", None, "e.g. --source='text:books/*.txt'", **define)
    flags.DEFINE_string("output", None, "a new directory, e.g. --output=stores/books", **define)
    flags.DEFINE_string("tokenizer", "bpe:4096", "char, byte, bpe:SIZE or hf:DIR, e.g. --tokenizer=char", **define)
    flags.DEFINE_string("data_dir", "", "of prepared TFDS datasets, e.g. --data_dir=~/tensorflow_datasets", **define)
    flags.DEFINE_enum("decode_errors", "reject", ["reject", "replace"], "e.g. --decode_errors=replace", **define)
    flags.DEFINE_enum("split_by", "auto", ["auto", "document", "position"], "e.g. --split_by=position", **define)
    flags.DEFINE_float("validation_fraction", 0.05, "e.g. --validation_fraction=0.1", **define)
    flags.DEFINE_float("test_fraction", 0.05, "e.g. --test_fraction=0", **define)
    cli.parse(flag_values, argv, __doc__)
    for name in ("source", "output"):
        if not flag_values[name].value:
            raise UserError(f"--{name} is missing; {flag_values[name].help}")
    prepare(flag_values)


def prepare(options: flags.FlagValues) -> None:
    """Builds the store and prints what is in it."""
    from gptjax.data.sources import open_source
    from gptjax.data.store import build_store

    source = open_source(options.source, data_dir=options.data_dir, decode_errors=options.decode_errors)
    store = build_store(
        source,
        Path(options.output),
        tokenizer=options.tokenizer,
        split_by=options.split_by,
        validation_fraction=options.validation_fraction,
        test_fraction=options.test_fraction,
        progress=cli.data_progress if sys.stderr.isatty() else None,
    )
    for name in store.splits:
        about = store.manifest["splits"][name]
        print(f"{name:>10}: {about['documents']:,} documents, {about['tokens']:,} tokens, {about['bytes']:,} bytes")
    print(f"vocabulary {store.tokenizer().vocab_size}, fingerprint {store.fingerprint[:12]}")
    print(f"train on it: --config.data.source=store:{options.output}")


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
