"""The command line: `gptjax VERB`, flags, and how an error becomes an exit status.

Exit status: 0 done; 1 the run failed; 2 the request was wrong; 130 Ctrl-C. The last line on stderr says what to do.
"""

import contextlib
import importlib
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from gptjax import config as config_lib
from gptjax import files, interrupts
from gptjax.errors import RunError, UserError

VERBS = {
    "train": "config -> trained checkpoint",
    "evaluate": "checkpoint -> metrics with confidence intervals",
    "prepare": "raw text -> token store",
    "generate": "prompts -> completions",
    "ablate": "study -> cells, a table, a verdict",
    "plan": "config, hardware that is not here -> does it fit, what does it cost",
    "convert": "Hugging Face <-> gptjax",
}


def define_config(flag_values: flags.FlagValues, argv: Sequence[str]) -> None:
    """Adds --config=FILE[:ARG] and --config.section.option=value."""
    config_flags.DEFINE_config_file(
        "config",
        None,
        "configuration, e.g. --config=configs/quickstart.py --config.train.num_steps=500",
        flag_values=flag_values,
        sys_argv=list(argv),
    )


def read_config(flag_values: flags.FlagValues) -> config_lib.Config:
    """The validated, locked config of the command line."""
    if flag_values.config is None:
        raise UserError("--config is missing; e.g. --config=configs/quickstart.py")
    config_lib.validate(flag_values.config)
    return flag_values.config.lock()


def chosen_options(flag_values: flags.FlagValues) -> frozenset[str]:
    """The options that --config.section.option=value sets: {"section.option"}."""
    return frozenset(config_flags.get_override_values(flag_values["config"]))


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
    try:
        rest = _parse_flags(flag_values, argv)
    except flags.UnrecognizedFlagError as error:
        known = [*flag_values, *(f"config.{path}" for path in config_lib.flat_options())]
        raise UserError(f"unknown option --{error.flagname}{config_lib.suggestion(error.flagname, known)}") from None
    except (KeyError, AttributeError) as error:
        names = [a.lstrip("-").split("=")[0] for a in argv if a.startswith("--config.")]
        known = [f"config.{path}" for path in config_lib.flat_options()]
        wrong = [n for n in names if n not in known]
        if not wrong:
            raise
        hints = "; ".join(f"--{n}{config_lib.suggestion(n, known).replace('; did', ': did')}" for n in wrong)
        raise UserError(f"unknown option {hints}") from error
    except (flags.Error, OSError, TypeError, ValueError) as error:
        raise UserError(str(error).strip()) from None
    if rest:
        raise UserError(f"unexpected argument {rest[0]!r}; options are written --name=value")


def _parse_flags(flag_values: flags.FlagValues, argv: Sequence[str]) -> list[str]:
    """Arguments that are no flags. What goes wrong inside the config file is a UserError with its line."""
    names = [value for flag, _, value in (a.partition("=") for a in argv) if flag.lstrip("-") == "config"]
    path = Path(names[-1].partition(":")[0]) if names else None
    if path and not path.is_file():
        raise UserError(f"--config={path}: there is no such file")
    try:
        return flag_values(list(argv))[1:]
    except UserError:
        raise
    except Exception as error:
        if path is None:
            raise
        if isinstance(error, AttributeError) and error.name == "get_config":
            raise UserError(f"--config={path} has no function get_config(); see configs/quickstart.py") from None
        frames = traceback.extract_tb(error.__traceback__)
        numbers = [frame.lineno for frame in frames if Path(frame.filename).absolute() == path.absolute()]
        numbers += [error.lineno] if isinstance(error, SyntaxError) else []
        if not numbers:
            raise
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:300]
        raise UserError(f"--config={path} failed at line {numbers[-1]}: {reason}") from None


def data_progress(stage: str, done: int, total: int | None) -> None:
    """Shows how far the building of a token store is, on one line of a terminal."""
    share = f"{done / total:4.0%}" if total else f"{done / 1e6:.1f}M characters"
    print(f"\r{stage} {share}\x1b[K", end="\n" if done == total else "", file=sys.stderr, flush=True)


def run(main: Callable[[Sequence[str]], None], argv: Sequence[str] | None = None) -> int:
    """Calls main(argv) and turns its errors into an exit status and one last line on stderr."""
    argv, status = sys.argv if argv is None else argv, 0
    try:
        interrupts.running()
        main(argv)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    except (Exception, KeyboardInterrupt) as error:
        status, line = describe(error)
        with contextlib.suppress(OSError):  # the terminal may be gone
            print(line, file=sys.stderr)
    interrupts.ending(status)
    if interrupts.received:
        interrupts.leave(status)
    return status


def describe(error: BaseException) -> tuple[int, str]:
    """The exit status and the last line on stderr for what ended a command; of a bug also prints where it is."""
    if isinstance(error, KeyboardInterrupt) or (interrupts.received and not isinstance(error, RunError)):
        return interrupts.last_words()
    if isinstance(error, UserError):
        return 2, f"error: {error}"
    if isinstance(error, RunError):
        return 1, f"failed: {error}"
    if isinstance(error, OSError):  # a full disk, a file that went away
        return 1, f"failed: {files.explain(error)}"
    if "RESOURCE_EXHAUSTED" in str(error):  # XLA's error for memory, on every kind of device
        reason = str(error).splitlines()[0][:200]
        return 1, (
            f"failed: out of memory: {reason}. Lower --config.train.batch_size, raise --config.train.accumulation "
            "or set --config.model.remat=full"
        )
    if "jax" in sys.modules:
        from gptjax.processes import runtime

        if reason := runtime.missing_platform(error):
            return 2, f"error: {reason}"
    traceback.print_exception(error)
    return 1, f"failed: {type(error).__name__}: this is a bug in gptjax; please report the lines above"


def main() -> int:
    """Entry point of `gptjax VERB ...`."""
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help", "help"):
        print("usage: gptjax VERB [--flags]\n")
        for verb, meaning in VERBS.items():
            print(f"  {verb:10} {meaning}")
        print("\n`gptjax VERB --help` shows the flags of a verb.")
        return 0 if len(sys.argv) > 1 else 2
    verb = sys.argv[1]
    if verb not in VERBS:
        print(f"error: unknown verb {verb!r}{config_lib.suggestion(verb, VERBS)}", file=sys.stderr)
        return 2
    return run(importlib.import_module(f"gptjax.{verb}").main, [f"gptjax {verb}", *sys.argv[2:]])
