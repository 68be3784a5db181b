"""The READMEs are right: every command is understood, every named file exists, README has the length of a page."""

import importlib
import re
import shlex
from pathlib import Path

import pytest

from gptjax import cli
from gptjax.errors import UserError

REPOSITORY = Path(__file__).parents[1]
READMES = [REPOSITORY / "README.md", REPOSITORY / "README.zh.md", *sorted(REPOSITORY.glob("*/README.md"))]
WRITTEN_BY_THE_READER = ("FILE", "..")


def commands(path: Path) -> list[str]:
    """The commands of gptjax in the indented blocks, continued lines joined, comments and prompts removed."""
    blocks = "\n".join(line[4:] for line in path.read_text("utf-8").splitlines() if line.startswith("    "))
    lines = re.sub(r"\\\n\s*", "", blocks).splitlines()
    found = (re.search(r"(?:^|\s)(?:gptjax|python -m gptjax\.)\s?([a-z]+ .*)$", line) for line in lines)
    return [match[1] for match in found if match]


class Understood(Exception):
    """Raised once the flags of a command were parsed."""


@pytest.mark.parametrize("path", READMES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_every_command_is_understood(path, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    parse = cli.parse

    def read(*arguments, **options):
        parse(*arguments, **options)
        raise Understood

    monkeypatch.setattr(cli, "parse", read)
    for command in commands(path):
        verb, *options = shlex.split(command, comments=True)
        if "..." in options:
            continue
        if any(
            word in option for option in options for word in WRITTEN_BY_THE_READER if option.startswith("--config=")
        ):
            continue
        module = importlib.import_module(f"gptjax.{verb}")
        assert verb in cli.VERBS, command
        if verb == "launch":
            module.parse(options)
            continue
        with pytest.raises((Understood, UserError)) as ended:
            module.main([f"gptjax {verb}", *options])
        # Some forms read their work directories, which are not here, before anything else.
        assert ended.type is Understood or "is not a work directory" in str(ended.value), command


@pytest.mark.parametrize("path", READMES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_every_file_that_is_named_exists(path):
    text = path.read_text("utf-8")
    named = set(
        re.findall(r"(?<![\w/.-])((?:configs|experiments|tests|tools|gptjax)/[\w/.-]+\.(?:py|md|png|json|yaml))", text)
    )
    links = {link for link in re.findall(r"\]\(([^)#:]+)\)", text) if not link.startswith("http")}
    missing = [name for name in named if not (REPOSITORY / name).exists()]
    missing += [link for link in links if not (path.parent / link).exists()]
    assert not missing


def test_readme_is_a_page():
    lines = (REPOSITORY / "README.md").read_text("utf-8").splitlines()
    assert len(lines) <= 220
    assert not [line for line in lines if len(line) > 120]
