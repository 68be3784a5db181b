"""Gives every option and every flag of every verb senseless values, and checks the messages.

  python tools/bad_inputs.py --number=20000 --seed=0
  python tools/bad_inputs.py --number=2000 --verbs=train,plan
  python tools/bad_inputs.py --first=1234 --number=1      (one case again)

All cases run in one process, in a temporary directory. A case fails if it ends in a traceback, in words that are not
meant for a user, in a last line that is too long, in an exit status other than 0, 1 or 2, or if it hangs.
"""

import argparse
import contextlib
import importlib
import io
import os
import random
import re
import resource
import shlex
import signal
import sys
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from gptjax import cli
from gptjax import config as config_lib

SECONDS = 60  # a case that takes longer counts as hung
MEMORY = 12 * 2**30  # limit of the address space of the process, in bytes
LONGEST_LINE = 2000

# Words that no message may contain.
FOREIGN = re.compile(
    r"""Traceback|this\ is\ a\ bug|invalid\ literal|NoneType|object\ is\ not|\[Errno|argument\ must\ be
    |could\ not\ convert|not\ supported\ between|unhashable|has\ no\ attribute|Expecting\ value|out\ of\ range
    |codec\ can't|expected\ str|takes\ \d+\ positional|unexpected\ keyword|subscriptable|unpack|embedded\ null
    |must\ be\ str|can't\ multiply|unsupported\ operand|division\ by\ zero|<class|<object|\bdict\b|KeyError|TypeError
    |ValueError|IndexError|AttributeError|OverflowError|RecursionError|MemoryError|StopIteration|panicked
    |PyErr|XlaRuntimeError|INVALID_ARGUMENT|INTERNAL:|pydantic|jaxlib|ufunc|dtype\(""",
    re.VERBOSE,
)
VALUES = (
    *("", " ", "0", "-1", "1", "2", "1.5", "-0.0", "1e400", "1e-400", "nan", "-inf", "inf", str(2**31), str(2**63)),
    *(str(2**64), str(10**30), "1e9999", "9" * 5000, "0x10", "1_000", "1,000", "1,2", "4K", "1e3", "true", "None"),
    *("null", "[]", "{}", "[" * 5000, "{'a': 1}", "中文", "１２", "٣", "🙂", "é", "\udce9", "a\0b", "a\nb", "\t"),
    *("x" * 200_000, "..", "~", "~nobody/x", "'", '"', "$(x)", "%s", "%", "50%", "200%", "-5%", "{0}", "-", "--", "="),
    *(
        "/",
        "/dev/zero",
        "/dev/null/x",
        ".",
        "random.bin",
        "missing.txt",
        "corpus",
        "empty",
        "(",
        "*",
        "**",
        "[a",
        ".*=",
    ),
    *("a{99999999999}", "(" * 2000, "#", ":", "::", ",", ",,", "@", "+", "a=b=c", ".*=nan", ".*=1e400", "=1"),
    *("10M tokens", "1e400 tokens", "1 epoch", "-1 epoch", "0 epochs", "1e300 epochs", "0:0", "1:1", "5:-1"),
    *("99999999999999999999:1", "text:", "text:~nobody/x", "text:/dev/zero", "text:random.bin", "text:corpus"),
    *(
        "text:a@nan",
        "text:a@0 + text:b@-1",
        "jsonl:#",
        "jsonl:random.bin#text",
        "csv:random.bin#",
        "parquet:random.bin#a",
    ),
    *("store:", "store:corpus", "tokens:", "tokens:random.bin", "messages:random.bin", "ftp://x/y", "text:ftp://x/y"),
    *("bpe:", "bpe:0", "bpe:-1", "bpe:nan", "bpe:99999999999", "bpe:1e9", "word:0", "word:99999999999999999999"),
    *("jieba:x", "hf:", "hf:random.bin", "hf:corpus", "perplexity,", "perplexity,nonsense", "v5e:0x0", "v9:4x4"),
    *("v5e:99999999999x9", "v5e:4x4*0", "v5e:4x4*99999", "local:1", "nfc,nonsense", "plain+", "web-nfc"),
    *("min_characters=nan", "min_characters=", "languages=,,", "10.0.0.1:99999999"),
)
# Other arguments of a verb, chosen so that it ends soon: the flag is refused, or an input is missing.
BESIDE = {
    "train": ("--config=tiny.py", "--describe"),
    "evaluate": ("--workdir=missing",),
    "prepare": ("--source=text:corpus/*.txt", "--output=random.bin/x"),
    "generate": ("--workdir=missing", "--prompt=a"),
    "serve": ("--model=missing", "--port=0"),
    "chat": ("--workdir=missing", "--prompt=a"),
    "plan": ("--config=tiny.py", "--topology=v5e:3x3"),
    "convert": (),
    "ablate": ("--study=missing.py", "--workdir=random.bin/run"),
    "launch": ("slurm", "--config=tiny.py", "--workdir=random.bin/run", "--dry_run"),
}
SUBJECT = {"launch": ("slurm",)}  # the subcommand whose flags are tested
# Options of places are also checked by a run that starts; it ends because its work directory is below a file.
OPENED = ("--config=tiny.py", "--workdir=random.bin/run")
# Flags that would use the network, wait for other processes, or write outside the temporary directory.
LEFT_OUT = {("plan", "setup"), ("train", "coordinator"), ("train", "num_processes"), ("train", "process_id")}
OUTSIDE = {"/", "..", "~", "."}
CONFIG = """
from gptjax.config import get_default


def get_config():
    config = get_default()
    config.tokenizer = "byte"
    config.data.update(source="text:corpus/*.txt", split_by="position", validation_fraction=0.1, cache_dir="cache")
    config.model.update(num_layers=1, num_heads=2, embed_dim=16, context_length=16)
    config.train.update(num_steps=4, batch_size=8, checkpoint_every=2)
    config.evaluation.update(every=4, max_tokens=200, tasks="perplexity")
    config.logging.update(samples=0, tensorboard=False)
    return config
"""


class Case(NamedTuple):
    verb: str
    argv: list[str]


class Failure(NamedTuple):
    case: Case
    reason: str
    said: str


class _Hang(BaseException):
    pass


def flags_of(verb: str) -> list[str]:
    """The names of a verb's flags, as its --help prints them."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        importlib.import_module(f"gptjax.{verb}").main([verb, *SUBJECT.get(verb, ()), "--help"])
    return re.findall(r"^  --(\w+)", out.getvalue(), re.MULTILINE)


def cases(seed: int, number: int, *, first: int = 0, verbs: Sequence[str] = tuple(cli.VERBS)) -> Iterator[Case]:
    """Cases `first` to `first + number` of a seed."""
    options = list(config_lib.flat_options())
    flags = {verb: [name for name in flags_of(verb) if (verb, name) not in LEFT_OUT] for verb in verbs}
    for index in range(first, first + number):
        generator = random.Random(f"{seed}:{index}")
        verb = generator.choice(verbs)
        beside, configured = list(BESIDE[verb]), "config" in flags[verb]
        argv = []
        for _ in range(generator.choice((1, 1, 1, 2, 3))):
            name = generator.choice(flags[verb])
            if configured and generator.random() < 0.8:
                name = "config." + generator.choice(options)
                if verb == "train" and name.startswith(("config.data.", "config.tok", "config.init", "config.eval")):
                    beside = list(OPENED) if generator.random() < 0.5 else beside
            value = _value(generator)
            written = name.startswith(("config.data.cache_dir", "output", "workdir"))
            if written and (value in OUTSIDE or value.startswith("~")):
                value = "random.bin"
            argv.append(generator.choice((f"--{name}={value}",) * 8 + (f"-{name}={value}", f"--{name}", f"--no{name}")))
            if name == "workdir" and verb == "train":  # a valid name would start a run
                beside = ["--config=tiny.py", "--config.data.source=text:missing/*.txt"]
        yield Case(verb, [f"gptjax {verb}", *beside, *argv])


def _value(generator: random.Random) -> str:
    if generator.random() < 0.85:
        return generator.choice(VALUES)
    a, b = generator.choice(VALUES), generator.choice(VALUES)
    return (a + generator.choice((":", ",", "=", " ", "/", "")) + b)[:200_000]


def write_inputs(directory: Path) -> None:
    """Writes the files that cases name."""
    generator = random.Random(0)
    (directory / "tiny.py").write_text(CONFIG, encoding="utf-8")
    (directory / "random.bin").write_bytes(generator.randbytes(5000))
    (directory / "empty").touch()
    (directory / "corpus").mkdir()
    text = " ".join(generator.choices(("the", "cat", "sat", "on", "a", "mat."), k=2000))
    (directory / "corpus" / "a.txt").write_text(text, encoding="utf-8")


def failure(case: Case) -> Failure | None:
    """Runs a case in this process, in the current directory."""
    said, status, reason = io.StringIO(), None, ""
    main = importlib.import_module(f"gptjax.{case.verb}").main

    def hangs(*_: object) -> None:
        raise _Hang

    before = signal.signal(signal.SIGALRM, hangs)
    signal.alarm(SECONDS)
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            status = cli.run(main, case.argv)
    except SystemExit as end:
        status = end.code or 0
    except _Hang:
        reason = f"no end after {SECONDS} s\n{traceback.format_exc()[-1500:]}"
    except BaseException:
        reason = traceback.format_exc()[-3000:]
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    text = said.getvalue()
    last = text.strip().splitlines()[-1] if text.strip() else ""
    if not reason and status not in (0, 1, 2):
        reason = f"exit status {status}"
    elif not reason and status and not last.startswith(("error: ", "failed: ")):
        reason = "the last line does not say what is wrong"
    elif not reason and len(last) > LONGEST_LINE:
        reason = f"a last line of {len(last)} characters"
    elif not reason and status and (match := FOREIGN.search(_without_values(text, case))):
        reason = f"the words {match[0]!r}"
    return Failure(case, reason, text[-3000:]) if reason else None


def _without_values(text: str, case: Case) -> str:
    """The message without the values of the case."""
    for argument in case.argv:
        value = argument.partition("=")[2]
        if len(value) > 3:
            text = text.replace(value, "...")
    return text


def run(cases: Iterator[Case], progress: int = 0) -> Iterator[tuple[int, Failure]]:
    """(index, failure) of each failing case. The current directory must have been filled by `write_inputs`."""
    for place, case in enumerate(cases):
        if progress and sys.stderr.isatty():
            print(f"\r{place}/{progress}\x1b[K", end="", file=sys.stderr, flush=True)
        if found := failure(case):
            yield place, found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--number", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--verbs", default=",".join(cli.VERBS))
    options = parser.parse_args(arguments)
    verbs = options.verbs.split(",")
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    count = 0
    with tempfile.TemporaryDirectory() as directory, contextlib.chdir(directory):
        write_inputs(Path())
        chosen = cases(options.seed, options.number, first=options.first, verbs=verbs)
        for place, found in run(chosen, options.number):
            count += 1
            index = options.first + place
            command = shlex.join(f"{a[:150]}..." if len(a) > 150 else a for a in found.case.argv)
            print(f"\n== {found.reason}\n{command}\n{found.said[-1500:]}".rstrip(), flush=True)
            again = f"--seed={options.seed} --first={index} --number=1 --verbs={options.verbs}"
            print(f"again: python tools/bad_inputs.py {again}", flush=True)
    print(f"\n{count} of {options.number} cases failed")
    return 1 if count else 0


if __name__ == "__main__":
    raise SystemExit(main())
