"""The command line: `gptjax VERB`, its flags, and its exit status.

Exit status: 0 done; 1 the run failed; 2 the request was wrong; 130 Ctrl-C. The last line on stderr says what to do.
"""

import contextlib
import difflib
import importlib
import inspect
import math
import os
import re
import shlex
import sys
import traceback
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags

import gptjax
from gptjax import config as config_lib
from gptjax import failures, files, interrupts
from gptjax.config.values import shown
from gptjax.errors import UserError

_MOST_LACKING = 20  # a config that lacks more options than this was not made from get_default()
_PATHS = ("output", "api_keys", "preferences", "compare", "hypotheses", "examples", "adapter")  # flags that name files
VERBS = {
    "train": "config -> trained checkpoint",
    "evaluate": "checkpoint -> metrics with confidence intervals",
    "prepare": "raw text -> token store",
    "generate": "prompts -> completions",
    "chat": "a model -> a conversation at the terminal",
    "serve": "models -> OpenAI's API and a web page",
    "ablate": "study -> cells, a table, a verdict",
    "plan": "config, target hardware -> does it fit, what does it cost",
    "convert": "Hugging Face <-> gptjax",
    "launch": "a run -> Slurm, Cloud TPU, GKE, SkyPilot, managed training",
}
_VERBS_ELSEWHERE = {  # other programs' names for our verbs, where the most similar name would be wrong
    **dict.fromkeys(("finetune", "fine-tune", "sft", "dpo", "fit"), "train"),
    **dict.fromkeys(("test", "score", "benchmark"), "evaluate"),
    **dict.fromkeys(("tokenize", "preprocess", "clean"), "prepare"),
    **dict.fromkeys(("sample", "complete", "infer", "inference", "predict"), "generate"),
    **dict.fromkeys(("talk", "run"), "chat"),
    **dict.fromkeys(("api", "deploy"), "serve"),
    **dict.fromkeys(("search", "sweep", "study"), "ablate"),
    **dict.fromkeys(("export", "import", "merge"), "convert"),
}


class _ConfigFlag(flags.Flag):
    """--config: the name of a file; `parse` replaces it by the config. `chosen`: options set on the command line."""

    chosen: frozenset[str] = frozenset()


def define_config(flag_values: flags.FlagValues) -> None:
    """Adds --config=FILE[:ARG] and --config.section.option=value."""
    flag = _ConfigFlag(
        parser=flags.ArgumentParser(),
        serializer=flags.ArgumentSerializer(),
        name="config",
        default=None,
        help_string="configuration, e.g. --config=configs/quickstart.py --config.train.num_steps=500",
    )
    flags.DEFINE_flag(flag, flag_values)


def read_config(flag_values: flags.FlagValues) -> config_lib.Config:
    """The validated, locked config of the command line."""
    if flag_values.config is None:
        raise UserError("--config is missing; e.g. --config=configs/quickstart.py")
    config_lib.validate(flag_values.config)
    return flag_values.config.lock()


def chosen_options(flag_values: flags.FlagValues) -> frozenset[str]:
    """The options that --config.section.option=value sets: {"section.option"}."""
    return flag_values["config"].chosen


def parse(flag_values: flags.FlagValues, argv: Sequence[str], doc: str) -> None:
    """Parses argv; --help prints this verb's flags. Raises UserError on any mistake, with the likely name."""
    if {"--help", "-h", "-help"} & set(argv[1:]):
        print(doc.strip() + "\n\nFlags:")
        for name in flag_values:
            flag = flag_values[name]
            default = "" if flag.default in (None, "", False) else f" (default: {flag.default})"
            print(f"  --{name}\n      {flag.help}{default}")
        print("\n`python -m gptjax.config` lists every option of --config.")
        raise SystemExit(0)
    argv, overrides = _overrides(argv) if "config" in flag_values else (list(argv), {})
    known = [*flag_values, *(f"config.{path}" for path in config_lib.flat_options())]
    for argument in argv[1:]:  # absl would read the file of --flagfile, even one that never ends
        if (name := argument.lstrip("-").partition("=")[0]) in ("flagfile", "undefok") and argument.startswith("-"):
            raise UserError(f"unknown option --{name}")
    try:
        rest = flag_values(argv)[1:]
    except flags.UnrecognizedFlagError as error:
        name = str(error.flagname)
        hint = config_lib.suggestion(name, known).replace("mean ", "mean --")
        raise UserError(f"unknown option --{name[:100]}{hint}") from None
    except (flags.Error, ValueError) as error:
        raise UserError(_in_words(error, flag_values, argv)) from None
    for name in flag_values:
        _check_flag(name, flag_values[name].value)
        if name in _PATHS:
            flag_values[name].value = _expanded(flag_values[name].value)
    if rest:
        raise UserError(f"unexpected argument {shown(rest[0])}; {_as_option(rest[0], flag_values)}")
    if "config" in flag_values and flag_values.config is not None:
        _apply(flag_values["config"], overrides)
    elif overrides:
        raise UserError(f"--config.{next(iter(overrides))} needs --config=FILE; e.g. --config=configs/quickstart.py")


def _as_option(argument: str, flag_values: flags.FlagValues) -> str:
    """A hint for an argument without a name: how to write it."""
    path = Path(argument[:1000].split(":")[0])
    kinds = {"config": path.suffix == ".py", "workdir": path.is_dir() or len(path.parts) > 1, "prompt": " " in argument}
    for name, likely in kinds.items():
        if likely and name in flag_values:
            return f"did you mean --{name}={shlex.quote(argument[:1000])}?"
    return "options are written --name=value"


def _expanded(value: Any) -> Any:
    """Expands ~ in a path or a list of paths: no shell does so in --flag=~/file."""
    if isinstance(value, list):
        return [_expanded(entry) for entry in value]
    return str(files.expand(value)) if isinstance(value, str) and value.startswith("~") else value


def _check_flag(name: str, value: Any) -> None:
    """Raises UserError for a value that no flag can have."""
    texts = value if isinstance(value, list) else [value]
    if any(isinstance(text, str) and "\0" in text for text in texts):
        raise UserError(f"--{name}={shown(value)} has a zero byte in it")
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"--{name}={value}: expected a finite number")
    if isinstance(value, int) and abs(value) >= 2**63:
        raise UserError(f"--{name}={shown(value)} is too large")


_KINDS = {"int": "a whole number", "float": "a number", "bool": "true or false"}


def _in_words(error: Exception, flag_values: flags.FlagValues, argv: Sequence[str]) -> str:
    """An error of absl in plain words."""
    text = str(error).strip()
    if match := re.match(r"(?:flag )?--([\w.]+)=(.*?): ", text, re.DOTALL):
        name, value = match.groups()
        if name in flag_values:
            parser = flag_values[name].parser
            needed = _KINDS.get(parser.flag_type(), text[match.end() :][:300])
            if isinstance(parser.syntactic_help, str) and re.search(" from | range ", parser.syntactic_help):
                needed = parser.syntactic_help.replace("an integer", "a whole number")
            return f"--{name}={shown(value)[1:-1]}: expected {needed}"
    if match := re.search(r"Missing value for flag (\S+)", text):
        return f"{match[1]} has no value; write {match[1]}=VALUE"
    return " ".join(text[:300].split())


def _overrides(argv: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """The arguments without --config.section.option=value, and {option: value} of those. Raises UserError."""
    options, rest, found = config_lib.flat_options(), [], {}
    waiting = iter(argv)
    wrong: list[str] = []
    for argument in waiting:
        match = re.match(r"--?(no)?config\.([^=]*)(?:=(.*))?$", argument, re.DOTALL)
        if argument == "--":
            rest += [argument, *waiting]
        elif not match:
            rest.append(argument)
        elif match[2] not in options:
            wrong.append(f"config.{match[2]}")
            if match[3] is None and not match[1]:
                next(waiting, None)
        else:
            name, value = match[2], match[3]
            boolean = isinstance(options[name].default, bool)
            if match[1] and (value is not None or not boolean):
                raise UserError(f"--noconfig.{name} is not an option; write --config.{name}=VALUE")
            if boolean:
                value = ("false" if match[1] else "true") if value is None else value
            elif value is None and (value := next(waiting, None)) is None:
                raise UserError(f"--config.{name} has no value; write --config.{name}=VALUE")
            found[name] = value
    if wrong:
        known = [f"config.{path}" for path in options]
        nearest = [config_lib.suggestion(name, known).replace("; did you mean ", ": did you mean --") for name in wrong]
        hints = (f"--{name[:100]}{near}" for name, near in zip(wrong[:10], nearest, strict=False))
        raise UserError(f"unknown option {'; '.join(hints)}")
    return rest, found


def _apply(flag: _ConfigFlag, overrides: Mapping[str, str]) -> None:
    """Replaces the file name in the flag by the config of that file, with overrides."""
    config = _load(flag.value)
    for path, text in overrides.items():
        config_lib.override(config, path, text)
    flag.value, flag.chosen = config, frozenset(overrides)


def _load(text: str) -> config_lib.Config:
    """What get_config() of FILE[:ARG] returns. An error inside the file is a UserError with its line."""
    name, colon, argument = text.partition(":")
    with contextlib.suppress(RuntimeError):  # no such user
        name = str(Path(name).expanduser()) if name.startswith("~") else name
    path = Path(name)
    if "\0" in name or len(os.fsencode(name)) > 4000 or not os.access(path, os.F_OK):
        near = [each for each in (f"configs/{name}", f"configs/{name}.py", f"{name}.py") if len(each) < 255]
        near = [each for each in near if "\0" not in each and Path(each).is_file()]
        hint = f"; did you mean --config={near[0]}?" if near else ""
        raise UserError(f"--config={shown(name)[1:-1]}: there is no such file{hint}")
    files.regular(path)
    try:
        module = types.ModuleType("gptjax_config")
        module.__file__ = str(path)
        sys.modules[module.__name__] = module  # where dataclasses and pickle look for it
        exec(compile(path.read_bytes(), str(path), "exec"), module.__dict__)
        if not callable(getattr(module, "get_config", None)):
            raise UserError(f"--config={path} has no function get_config(); see configs/quickstart.py")
        arguments = [argument] if colon else []
        if not _takes(module.get_config, arguments):
            raise UserError(
                f"--config={path} takes no argument after a colon, and {shown(argument)} was given"
                if colon
                else f"--config={path}: its get_config must take no argument or one, the text after the colon"
            )
        config = module.get_config(*arguments)
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"--config={path}: {files.explain(error)}") from None
    except SystemExit:
        raise UserError(f"--config={path} calls sys.exit(); it must only return a config") from None
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        numbers = [frame.lineno for frame in frames if Path(frame.filename).absolute() == path.absolute()]
        numbers += [error.lineno] if isinstance(error, SyntaxError) and error.lineno else []
        reason = " ".join(f"{type(error).__name__}: {error}"[:300].split())
        if not numbers:
            raise UserError(f"--config={path} is not a Python file ({reason})") from None
        raise UserError(f"--config={path} failed at line {numbers[-1]}: {reason}") from None
    if not isinstance(config, config_lib.Config):
        raise UserError(f"get_config() of --config={path} returns no config; begin with gptjax.config.get_default()")
    if not _named(config):
        raise UserError(f"get_config() of --config={path} returns a config in which the name of an option is not text")
    lacking = [path for path in config_lib.flat_options() if not _has(config, path)]
    if len(lacking) > _MOST_LACKING:
        raise UserError(
            f"get_config() of --config={path} returns a config without {len(lacking)} options, such as {lacking[0]}; "
            "begin with gptjax.config.get_default(), as configs/quickstart.py does"
        )
    return config.unlock()


def _has(config: config_lib.Config, path: str) -> bool:
    section, _, name = path.rpartition(".")
    if section and section not in config:
        return False
    held = config[section] if section else config
    return not isinstance(held, config_lib.Config) or name in held


def _takes(function: Callable[..., Any], arguments: Sequence[str]) -> bool:
    try:
        inspect.signature(function).bind(*arguments)
    except TypeError:
        return False
    return True


def _named(config: config_lib.Config) -> bool:
    """Whether the names of all options are texts."""
    try:
        parts = [config, *(part for part in config.values() if isinstance(part, config_lib.Config))]
        return all(isinstance(name, str) for part in parts for name in part)
    except TypeError:  # names of several kinds, which cannot be sorted
        return False


def data_progress(stage: str, done: int, total: int | None) -> None:
    """Shows the progress of building a token store on one line of a terminal."""
    share = f"{done / total:4.0%}" if total else f"{done / 1e6:.1f}M characters"
    print(f"\r{stage} {share}\x1b[K", end="\n" if done == total else "", file=sys.stderr, flush=True)


def run(main: Callable[[Sequence[str]], None], argv: Sequence[str] | None = None) -> int:
    """Calls main(argv) and turns its errors into an exit status and one last line on stderr."""
    argv, status = sys.argv if argv is None else argv, 0
    try:
        interrupts.running()
        interrupts.handle(*interrupts.STOPPING)
        main(argv)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    except (Exception, KeyboardInterrupt) as error:
        status, line = failures.describe(error)
        with contextlib.suppress(OSError):  # the terminal may be gone
            print(failures.one_line(line), file=sys.stderr)
    interrupts.ending(status)
    if interrupts.received:
        interrupts.leave(status)
    if status:
        interrupts.leave_after_failure(status)
    return status


def _unknown_verb(verb: str, rest: Sequence[str]) -> str:
    """What is wrong, with the command that was probably meant."""
    if verb.startswith("-"):
        return f"the verb comes first: gptjax VERB {shlex.join([verb, *rest])}; VERB is one of {', '.join(VERBS)}"
    name = verb.lower().removesuffix(".py")
    near = _VERBS_ELSEWHERE.get(name) or next(iter(difflib.get_close_matches(name, VERBS, n=1, cutoff=0.5)), None)
    meant = f"did you mean: {shlex.join(['gptjax', near, *rest])}" if near else f"the verbs are {', '.join(VERBS)}"
    return f"unknown verb {shown(verb)}; {meant}"


def main() -> int:
    """Entry point of `gptjax VERB ...`."""
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help", "help"):
        print("usage: gptjax VERB [--flags]\n")
        for verb, meaning in VERBS.items():
            print(f"  {verb:10} {meaning}")
        print("\n`gptjax VERB --help` shows the flags of a verb.")
        return 0 if len(sys.argv) > 1 else 2
    verb = sys.argv[1]
    if verb == "--version":
        print(f"gptjax {gptjax.__version__}")
        return 0
    if verb not in VERBS:
        print(f"error: {failures.one_line(_unknown_verb(verb, sys.argv[2:]))}", file=sys.stderr)
        return 2
    return run(importlib.import_module(f"gptjax.{verb}").main, [f"gptjax {verb}", *sys.argv[2:]])
