"""Prints the options: python -m gptjax.config."""

import sys

from rich.console import Console
from rich.table import Column, Table

from gptjax.config.options import flat_options

_FILE_COLUMNS = 200  # width of the table if it is not printed to a terminal


def main() -> int:
    table = Table(Column("option", no_wrap=True), "default", "meaning", title="gptjax options")
    for path, option in flat_options().items():
        choices = f" [{' | '.join(option.choices)}]" if option.choices else ""
        table.add_row(path, str(option.default), (option.help + choices).replace("[", r"\["))
    Console(width=None if sys.stdout.isatty() else _FILE_COLUMNS).print(table)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
