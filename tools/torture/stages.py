"""The stages: the command of each, its output directories, its results, and the commands that read them next.

Each case has its own directory: `in` (copies of the inputs, which may be damaged), `out` (all outputs), `cache` and
`tmp`.
"""

import json
import random
import shutil
import string
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tools.torture import compare
from tools.torture.compare import Results
from tools.torture.processes import REPOSITORY, Server

CONFIGS = REPOSITORY / "configs"
_TINY = ("--max_new_tokens=8", "--temperature=0")
_WORDS = 40  # in a paragraph


@dataclass(frozen=True)
class Reader:
    """A command that reads the output of a stage.

    Attributes:
      argv: arguments, given a case.
      made: the results of this command; None if they say nothing about the stage.
      files: files of the case that may be damaged before it, as patterns of Path.glob.
      told: those of them whose damage must either be reported or change nothing.
    """

    name: str
    argv: Callable[[Path], list[str]]
    made: Callable[[Path], Results] | None
    files: tuple[str, ...]
    told: tuple[str, ...] = ()


@dataclass(frozen=True)
class Stage:
    """One command.

    Attributes:
      inputs: names of the inputs that are copied from the world into a case's `in`.
      results: the results, for comparison.
      readers: commands that read the results.
      whole: whether the rest of a killed command must be refused by the first reader or be complete; else it may be
        used (the checkpoints of a run).
      disks: directories of the case that may become a small disk, and whether they hold only a side result.
      workers: whether it starts worker processes.
    """

    name: str
    argv: Callable[[Path], list[str]]
    results: Callable[[Path], Results]
    inputs: tuple[str, ...] = ()
    readers: tuple[Reader, ...] = ()
    whole: bool = True
    disks: dict[str, bool] = field(default_factory=dict)
    workers: bool = False


class World:
    """The inputs of stages: texts, a tiny model trained on dialogues, its Hugging Face directory; always the same."""

    def __init__(self, directory: Path):
        self.directory = directory
        self.texts, self.chat, self.prompts = directory / "texts", directory / "chat.jsonl", directory / "prompts.jsonl"
        generator = random.Random(0)
        letters = string.ascii_lowercase[:16]
        words = ["".join(generator.choices(letters, k=generator.randint(2, 7))) for _ in range(200)]

        def sentence(number: int) -> str:
            return " ".join(generator.choices(words, k=number))

        self.texts.mkdir(parents=True)
        for number in range(6):
            paragraphs = (sentence(_WORDS) + "." for _ in range(30))
            (self.texts / f"{number}.txt").write_text("\n\n".join(paragraphs) + "\n")
        turns = (
            [{"role": "user", "content": sentence(6)}, {"role": "assistant", "content": sentence(8)}]
            for _ in range(150)
        )
        self.chat.write_text("".join(json.dumps({"messages": dialogue}) + "\n" for dialogue in turns))
        questions = ({"prompt": sentence(1), "references": [sentence(4)]} for _ in range(4))
        self.prompts.write_text("".join(json.dumps(question) + "\n" for question in questions))

    def build(self, server: Server) -> None:
        """Trains the model `base`, and exports it as `hf`."""
        base, hf = self.directory / "base", self.directory / "hf"
        options = ("model.activation=swiglu", "model.qk_norm=False", "logging.samples=0", "logging.tensorboard=False")
        source = (f"data.source=messages:{self.chat}", "tokenizer=bpe:300", "train.num_steps=40")
        train = ["train", f"--config={CONFIGS / 'dialogue.py'}:runlocal", f"--workdir={base}"]
        train += [f"--config.{option}" for option in (*options, *source)]
        cache = str(self.directory / "cache")
        for argv in (train, ["convert", f"--from={base}", f"--to=hf:{hf}"]):
            command = server.start(argv, cwd=self.directory, log=self.directory / "log", GPTJAX_CACHE=cache)
            if command.finish(600):
                raise SystemExit(f"the inputs cannot be made: {command.errors()[-2000:]}")

    def fill(self, stage: Stage, case: Path) -> None:
        """Creates the directory of a case."""
        for name in ("in", "out", "cache", "tmp"):
            (case / name).mkdir(parents=True)
        for name in stage.inputs:
            shutil.copytree(self.directory / name, case / "in" / name, dirs_exist_ok=True)


def stages(world: World) -> dict[str, Stage]:
    """All stages, by name."""
    prompts = f"--prompts={world.prompts}"
    # Metrics on every step, frequent checkpoints and evaluations: many moments at which something is incomplete.
    often = ("logging.every=1", "train.checkpoint_every=5", "train.num_steps=20")

    def train(case: Path) -> list[str]:
        options = (f"data.source=text:{world.texts}/*.txt", *often)
        return _train("quickstart.py", case / "out" / "run", options)

    def finetune(case: Path) -> list[str]:
        model = f"hf:{case / 'in' / 'hf'}"
        source = (f"data.source=messages:{world.chat}", f"init_from={model}", f"tokenizer={model}")
        return _train("dialogue.py", case / "out" / "run", (*source, "model.lora_rank=2", *often))

    def generate(workdir: str, output: str) -> Callable[[Path], list[str]]:
        return lambda case: ["generate", f"--workdir={case / workdir}", prompts, f"--output={case / output}", *_TINY]

    def evaluate(case: Path) -> list[str]:
        tasks = ("--tasks=perplexity,bleu", prompts, "--max_new_tokens=8")
        return ["evaluate", f"--workdir={case / 'in/base'}", *tasks, f"--output={case / 'out/scores.json'}"]

    def prepare(case: Path) -> list[str]:
        output = f"--output={case / 'out/store'}"
        return ["prepare", f"--source=text:{world.texts}/*.txt", output, "--tokenizer=bpe:300", "--workers=2"]

    def train_on_store(case: Path) -> list[str]:
        options = (f"data.source=store:{case / 'out/store'}", "train.num_steps=4", "logging.samples=0")
        return _train("quickstart.py", case / "out" / "next", options)

    def export(case: Path) -> list[str]:
        return ["convert", f"--from={case / 'in/base'}", f"--to=hf:{case / 'out/hf'}"]

    def imported(source: str, target: str) -> Callable[[Path], list[str]]:
        return lambda case: ["convert", f"--from=hf:{case / source}", f"--to={case / target}"]

    def text_of(path: str) -> Callable[[Path], Results]:
        return lambda case: {path: compare.file_digest(case / path, case)}

    def model_of(path: str) -> Callable[[Path], Results]:
        names = ("config.json", "tokenizer.json")
        return lambda case: (
            compare.last_state(case / path) | {name: compare.file_digest(case / path / name, case) for name in names}
        )

    def run_of(path: str) -> Callable[[Path], Results]:
        return lambda case: compare.run(case / path, case)

    def losses_of(path: str) -> Callable[[Path], Results]:
        wanted = ("metrics.jsonl", "state", "last step")
        return lambda case: {k: v for k, v in compare.run(case / path, case).items() if k in wanted}

    def scores(case: Path) -> Results:
        names = ("out/scores.json", "out/scores.items.jsonl")
        tables = {f"in/base/evaluation/{name}": sha for name, sha in _evaluations(case).items()}
        return {name: compare.file_digest(case / name, case) for name in names} | tables

    def _evaluations(case: Path) -> Results:
        return compare.files(case / "in/base/evaluation", case, leaving_out=r"(^|/)\.")

    state = "checkpoints/*/state/**/*"
    run_files = ("out/run/checkpoints/**/*", "out/run/*.json*")
    generated = generate("out/run", "out/next.jsonl")
    told = (f"out/run/{state}",)
    run_disks = {
        "out": False,
        "out/run": False,
        "out/run/tensorboard": True,
        "out/run/checkpoints": False,
        "cache": False,
    }
    run_disks |= {"tmp": True}

    def run_readers(again: Callable[[Path], list[str]], *inputs: str) -> tuple[Reader, ...]:
        return (
            Reader("generate", generated, text_of("out/next.jsonl"), run_files, told),
            Reader("again", again, run_of("out/run"), (*run_files, *inputs), told),
        )

    all_stages = (
        Stage("train", train, run_of("out/run"), (), run_readers(train), False, run_disks),
        Stage(
            "prepare",
            prepare,
            lambda case: compare.files(case / "out/store", case),
            (),
            (
                Reader("train", train_on_store, losses_of("out/next"), ("out/store/**/*",), ("out/store/*/*",)),
                Reader("again", prepare, None, ("out/store/**/*",)),
            ),
            True,
            {"out": False, "tmp": True},
            workers=True,
        ),
        Stage(
            "import",
            imported("in/hf", "out/model"),
            model_of("out/model"),
            ("hf",),
            (
                Reader(
                    "generate",
                    generate("out/model", "out/next.jsonl"),
                    text_of("out/next.jsonl"),
                    ("out/model/**/*",),
                    (f"out/model/{state}",),
                ),
                Reader("again", imported("in/hf", "out/again"), None, ("in/hf/*",)),
            ),
            True,
            {"out": False, "tmp": True},
        ),
        Stage(
            "export",
            export,
            lambda case: compare.files(case / "out/hf", case),
            ("base",),
            (
                Reader("import", imported("out/hf", "out/next"), model_of("out/next"), ("out/hf/*",)),
                Reader("again", export, None, ("in/base/checkpoints/**/*", "out/hf/*")),
            ),
            True,
            {"out": False, "tmp": True},
        ),
        Stage(
            "evaluate",
            evaluate,
            scores,
            ("base",),
            (
                Reader("again", evaluate, scores, ("in/base/checkpoints/**/*",), (f"in/base/{state}",)),
                Reader(
                    "compare",
                    lambda case: ["evaluate", "--compare", str(case / "out/scores.json"), str(case / "in/base")],
                    None,
                    ("out/*", "in/base/evaluation/*"),
                ),
            ),
            True,
            {"out": False, "in/base/evaluation": True, "tmp": True},
        ),
        Stage(
            "generate",
            generate("in/base", "out/texts.jsonl"),
            text_of("out/texts.jsonl"),
            ("base",),
            (
                Reader(
                    "again",
                    generate("in/base", "out/texts.jsonl"),
                    text_of("out/texts.jsonl"),
                    ("in/base/checkpoints/**/*", "out/*"),
                    (f"in/base/{state}", "out/*"),
                ),
            ),
            True,
            {"out": False, "tmp": True},
        ),
        Stage("finetune", finetune, run_of("out/run"), ("hf",), run_readers(finetune, "in/hf/*"), False, run_disks),
    )
    return {stage.name: stage for stage in all_stages}


def _train(config: str, workdir: Path, options: tuple[str, ...]) -> list[str]:
    flags = [f"--config.{option}" for option in options]
    return ["train", f"--config={CONFIGS / config}:runlocal", f"--workdir={workdir}", *flags]
