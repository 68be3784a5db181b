"""Prints the options: python -m gptjax.config."""

from rich.console import Console
from rich.table import Table

from gptjax.config.options import flat_options


def main() -> int:
    table = Table("option", "default", "meaning", title="gptjax options")
    for path, option in flat_options().items():
        choices = f" [{' | '.join(option.choices)}]" if option.choices else ""
        table.add_row(path, str(option.default), (option.help + choices).replace("[", r"\["))
    Console().print(table)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
