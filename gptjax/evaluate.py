"""Evaluate a checkpoint, score what a system wrote, or compare two evaluations.

  python -m gptjax.evaluate --workdir=runs/quickstart
  python -m gptjax.evaluate --workdir=runs/quickstart --tasks=perplexity --stride=64 --split=test
  python -m gptjax.evaluate --workdir=runs/quickstart --data='text:wikitext/*.txt' --tasks=perplexity
  python -m gptjax.evaluate --workdir=runs/quickstart --tasks=bleu,rouge --prompts=questions.jsonl --output=bleu.json
  python -m gptjax.evaluate --workdir=runs/quickstart --tasks=multiple_choice:copa.jsonl,hellaswag:hellaswag_val.jsonl
  python -m gptjax.evaluate --workdir=runs/quickstart --tasks=lm_eval:arc_easy
  python -m gptjax.evaluate --compare runs/a runs/b
  python -m gptjax.evaluate --hypotheses=outputs/ --references=references.txt

Tasks: perplexity; on --prompts: bleu, bleu_lowercase, chrf, ter, rouge, f1, exact_match, exact_answer (GSM8K),
diversity, variants; on FILE.jsonl after a colon: multiple_choice (query, choices, gold), hellaswag, arc, piqa, lambada;
lm_eval:TASK where lm-eval is installed.

Every value comes with a 95 % confidence interval and a signature that says how it was computed.
"""

import dataclasses
import functools
import hashlib
import json
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags

from gptjax import cli, files
from gptjax.errors import UserError
from gptjax.files import write_whole
from gptjax.processes import cluster, distributed

if TYPE_CHECKING:
    from rich.console import Console

    from gptjax.evaluation.metrics import Outcome

_LONGEST_NAME = 120  # bytes of a file's name
_FILE_COLUMNS = 160  # of a table that is not printed to a terminal


def main(argv: Sequence[str]) -> None:
    flag_values = flags.FlagValues()
    define = dict(flag_values=flag_values)
    flags.DEFINE_string("workdir", None, "of a training run, e.g. --workdir=runs/quickstart", **define)
    flags.DEFINE_string("checkpoint", "best", "best, last or a step, e.g. --checkpoint=last", **define)
    flags.DEFINE_string("tasks", None, "comma-separated, e.g. --tasks=perplexity,bleu; default: the config's", **define)
    flags.DEFINE_enum("split", "validation", ["train", "validation", "test"], "e.g. --split=test", **define)
    flags.DEFINE_string("data", "", "perplexity of all of another source, e.g. --data=text:notes/*.txt", **define)
    flags.DEFINE_integer("stride", None, "tokens between windows, e.g. --stride=64; default: the config's", **define)
    flags.DEFINE_integer(
        "batch_size", None, "rows scored at once; results do not depend on it, e.g. --batch_size=32", **define
    )
    flags.DEFINE_string(
        "prompts",
        None,
        "prompts with references, e.g. --prompts=questions.jsonl or --prompts=test.csv#mr,ref",
        **define,
    )
    flags.DEFINE_integer("max_prompts", None, "prompts scored at most, 0 = all, e.g. --max_prompts=100", **define)
    flags.DEFINE_integer("max_new_tokens", None, "tokens generated at most, e.g. --max_new_tokens=100", **define)
    flags.DEFINE_string("examples", "", "questions of tasks named without a file, e.g. --examples=copa.jsonl", **define)
    flags.DEFINE_string("delimiter", " ", r"between query and choice, e.g. --delimiter='\nAnswer: '", **define)
    flags.DEFINE_multi_string("compare", [], "two work directories or results, e.g. --compare runs/a runs/b", **define)
    flags.DEFINE_string("hypotheses", None, "a file or folder of outputs to score, e.g. --hypotheses=out.txt", **define)
    flags.DEFINE_string("references", "", "one text per line, e.g. --references=a.txt,b.txt", **define)
    flags.DEFINE_string("output", None, "also write the results here, e.g. --output=results.json", **define)
    cluster.define_flags(flag_values)
    cli.parse(flag_values, _join_compare(argv), __doc__)
    if flag_values.output:
        _claim_output(Path(flag_values.output))
    if flag_values.compare:
        compare(flag_values)
    elif flag_values.hypotheses:
        score_outputs(flag_values)
    elif flag_values.workdir:
        with distributed.join(flag_values, cli.describe):
            evaluate(flag_values)
    else:
        raise UserError("--workdir is missing; e.g. --workdir=runs/quickstart")


def _join_compare(argv: Sequence[str]) -> list[str]:
    """`--compare A B` and `--compare=A,B` as `--compare=A --compare=B`."""
    joined, rest = [], list(argv)
    while rest:
        argument = rest.pop(0)
        if argument == "--compare":
            while rest and not rest[0].startswith("-"):
                joined.append(f"--compare={rest.pop(0)}")
        elif argument.startswith("--compare="):
            joined += [f"--compare={path}" for path in argument.removeprefix("--compare=").split(",")]
        else:
            joined.append(argument)
    return joined


# ---- A checkpoint ----------------------------------------------------------------------------------------


def evaluate(options: flags.FlagValues) -> None:
    """Runs the tasks, prints a table, writes WORKDIR/evaluation/TASKS-SPLIT-STEP.json and --output."""
    import jax

    from gptjax import config as config_lib
    from gptjax.artifacts import loading
    from gptjax.evaluation import tasks
    from gptjax.model import gpt
    from gptjax.model.architecture import Architecture
    from gptjax.parallel import mesh as mesh_lib
    from gptjax.parallel import partition
    from gptjax.processes import runtime
    from gptjax.reporting.page import write_report
    from gptjax.training import footprint

    # 1. Everything that can fail cheaply: flags, config, tasks and their files, before a device is touched.
    path = loading.find(Path(options.workdir), options.checkpoint)
    config = loading.read_config(path).unlock()
    evaluation = config.evaluation
    for name in ("tasks", "stride", "prompts", "max_prompts", "max_new_tokens"):
        if options[name].value is not None:
            evaluation[name] = options[name].value
    evaluation.batch_size = options.batch_size or evaluation.batch_size or 2 * config.train.batch_size
    config_lib.validate(config)
    requests = tasks.parse(evaluation.tasks)
    if options.tasks is None and not evaluation.prompts and not config.data.source.startswith("python_docs"):
        requests = [request for request in requests if not tasks.need_prompts(request)] or tasks.parse("perplexity")
    task_options = tasks.Options(options.split, options.data, options.examples, options.delimiter.replace("\\n", "\n"))
    materials = [tasks.TASKS[request.kind].read(request, config, task_options) for request in requests]

    # 2. The checkpoint, on a mesh of this machine: that of the training run says nothing about the devices here.
    config.mesh.update(config_lib.get_default().mesh)
    runtime.start(config.mesh, rows=evaluation.batch_size, cache_dir=config_lib.cache_directory(config))
    params = gpt.abstract_params(Architecture.from_config(config.model, 0))
    if not footprint.replicas_fit(params):
        config.mesh.update(data=1, fsdp=jax.device_count())
    mesh = mesh_lib.make_mesh(config.mesh)
    trained = loading.load(path, shardings=lambda abstract: partition.parameter_shardings(abstract, mesh))
    # 3. All processes run all tasks, since they compute together; only process 0 writes and prints.
    context = tasks.Context(config, task_options, trained, mesh, _generator(trained, mesh), _progress)
    outcomes = {
        request.name: tasks.TASKS[request.kind].run(context, request, material)
        for request, material in zip(requests, materials, strict=True)
    }
    if distributed.current().index:
        return
    answer = {
        "checkpoint": {
            "path": str(path),
            "step": trained.step,
            "config_sha256": config_lib.sha256(trained.config),
        },
        "results": _results(outcomes),
    }
    workdir = path.parent.parent if path.parent.name == "checkpoints" else path
    name = _file_name(list(outcomes), options.data or options.split, trained.step)
    places = [workdir / "evaluation" / f"{name}.json"]
    places += [Path(options.output)] if options.output else []
    _print_results(outcomes, f"{path}, {options.data or f'{options.split} split'}")
    written = [place for place in places if _wrote(lambda place=place: _write(place, answer, outcomes), places, place)]
    # The report reads the files just written, so it comes last; a bare checkpoint has no run to report on.
    if (workdir / "metrics.jsonl").exists():
        _wrote(lambda: write_report(workdir), places)
    print(f"written: {', '.join(map(str, written)) or 'nothing'}")


def _wrote(write: Callable[[], Any], places: Sequence[Path], place: Path | None = None) -> bool:
    """Whether it could be written; of what nobody named on the command line, a warning tells that it could not."""
    try:
        write()
    except OSError as error:
        if place is not None and place != places[0]:
            raise
        print(f"warning: {files.explain(error)}", file=sys.stderr)
        return False
    return True


def _generator(trained, mesh):
    """What completes texts, or token ids; made when it is first called."""
    import jax

    from gptjax.generation.completion import Generator
    from gptjax.generation.params import SamplingParams

    if mesh.devices.flat[0].platform == "cpu" and jax.process_count() == 1:
        # Decoding reads the whole model for every token. Each virtual device would read it from the same memory.
        trained = dataclasses.replace(trained, params=jax.device_put(trained.params, mesh.devices.flat[0]))
        mesh = None
    generator = functools.cache(lambda: Generator.from_trained(trained, mesh=mesh))

    def generate(prompts: Sequence, **sampling) -> list[str]:
        texts = all(isinstance(prompt, str) for prompt in prompts)
        complete = generator().complete if texts else generator().complete_tokens
        completions = complete(prompts, SamplingParams(**sampling))
        _warn_of_empty("completions", [completion.text for completion in completions])
        return [completion.text for completion in completions]

    return generate


# ---- What a system wrote ---------------------------------------------------------------------------------


def score_outputs(options: flags.FlagValues) -> None:
    """Scores a file of texts, or every file of a folder, against references. No checkpoint is needed."""
    from gptjax.evaluation import text_tasks

    chosen = text_tasks.choose_tasks(options.tasks)
    outputs = text_tasks.read_outputs(Path(options.hypotheses), _split_specs(options.references))
    systems = {}
    for output in outputs:
        _warn_of_empty(f"hypotheses of {output.path}", output.hypotheses)
        systems[output.path.name] = {
            task: text_tasks.score_texts(task, (), output.hypotheses, output.references) for task in chosen
        }
        _print_results(systems[output.path.name], str(output.path))
    if options.output and len(outputs) == 1:
        (outcomes,) = systems.values()
        _write(Path(options.output), {"hypotheses": str(outputs[0].path), "results": _results(outcomes)}, outcomes)
    elif options.output:
        _write(Path(options.output), {"systems": {name: _results(outcomes) for name, outcomes in systems.items()}}, {})


def _split_specs(text: str) -> list[str]:
    """The entries of a list with commas, of which FILE#PROMPT,REFERENCE is one."""
    return re.findall(r"[^,#]+(?:#[^,]*,[^,]*)?", text)


def _warn_of_empty(what: str, texts: Sequence[str]) -> None:
    if count := sum(not text.strip() for text in texts):
        print(f"warning: {count} of {len(texts)} {what} are empty; they are scored as they are", file=sys.stderr)


# ---- Two evaluations -------------------------------------------------------------------------------------


def compare(options: flags.FlagValues) -> None:
    """Prints the paired differences between two evaluations, and says which metrics differ."""
    from rich.console import Console
    from rich.table import Table

    from gptjax.evaluation import compare as compare_lib

    if len(options.compare) != 2:
        raise UserError(f"--compare takes two work directories or results, not {len(options.compare)}: --compare A B")
    a, b = map(Path, options.compare)
    comparison = compare_lib.compare(a, b)
    differences, problems = comparison.differences, comparison.problems
    sides = [f"{side} = {' '.join(map(str, files))}" for side, files in zip("AB", comparison.files, strict=True)]
    title = "\n".join([*sides, f"B - A over the same items, {compare_lib.SAMPLES} paired bootstrap samples"])
    table = Table("task", "metric", "A", "B", "B - A", "95 % interval", "p", "n", "")
    for d in differences:
        low, high = d.ci95
        interval = f"{_number(low, '+')} .. {_number(high, '+')}"
        numbers = [_number(d.a), _number(d.b), _number(d.difference, "+"), interval, f"{d.p:.3f}"]
        table.add_row(d.task, d.metric, *numbers, f"{d.n:,}", d.verdict)
    console = Console(width=None if sys.stdout.isatty() else _FILE_COLUMNS)
    _print_title(console, title)
    console.print(table)
    better = {side: [f"{d.task} {d.metric}" for d in differences if d.verdict.startswith(side)] for side in "AB"}
    for side, names in better.items():
        if names:
            console.print(f"{side} is better: {', '.join(names)}", soft_wrap=True, highlight=False)
    if not any(better.values()):
        console.print("no metric differs", highlight=False)
    for problem in problems:
        console.print(f"not compared: {problem}", style="dim", soft_wrap=True, highlight=False)
    if options.output:
        found: dict[str, dict[str, Any]] = {}
        for d in differences:
            found.setdefault(d.task, {})[d.metric] = d.to_json()
        _write_text(Path(options.output), _json({"a": str(a), "b": str(b), "differences": found, "problems": problems}))


# ---- Results ---------------------------------------------------------------------------------------------


def _claim_output(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output={path} cannot be made: {error.strerror}") from None
    if path.is_dir():
        raise UserError(f"--output={path} is a directory; name a file")


def _results(outcomes: "dict[str, Outcome]") -> dict[str, dict[str, Any]]:
    return {
        task: {name: estimate.to_json() for name, estimate in outcome.metrics.items()}
        for task, outcome in outcomes.items()
    }


def _file_name(tasks: Sequence[str], data: str, step: int) -> str:
    """TASKS-DATA-STEP; where that is long, only the first task, and a digest that tells such names apart."""
    name = "-".join([*tasks, data, str(step)])
    if len(name.encode()) > _LONGEST_NAME:
        digest = hashlib.sha256(name.encode()).hexdigest()[:6]
        more = f"and-{len(tasks) - 1}-more-" if len(tasks) > 1 else ""
        name = f"{tasks[0][:32]}-{more}{data[-24:]}-{step}-{digest}"
    return re.sub(r"[^\w.=+-]+", "-", name).strip("-.")


def _write(place: Path, answer: dict[str, Any], outcomes: "dict[str, Outcome]") -> None:
    """The results, and beside them the items that --compare reads."""
    from gptjax.evaluation import metrics as items
    from gptjax.evaluation.compare import ITEMS_SUFFIX

    if outcomes:
        _write_text(place.with_suffix(ITEMS_SUFFIX), items.lines(outcomes))
    _write_text(place, _json(answer))


def _write_text(place: Path, lines: Iterable[str]) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    write_whole(place, lines, errors="replace")


def _json(answer: dict[str, Any]) -> str:
    return json.dumps(answer, indent=1) + "\n"


def _progress(what: str):
    def show(done: int, total: int) -> None:
        print(
            f"\r{what} {done / total:4.0%}\x1b[K",
            end="\n" if done == total else "",
            file=sys.stderr,
            flush=True,
        )

    return show if sys.stderr.isatty() else None


def _number(value: float, sign: str = "") -> str:
    return f"{value:{sign}.4f}" if abs(value) < 1e6 else f"{value:{sign}.4g}"


def _print_results(outcomes: "dict[str, Outcome]", title: str) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("task", "metric", "value", "95 % interval", "n")
    for task, outcome in outcomes.items():
        for name, estimate in outcome.metrics.items():
            low, high = estimate.ci95
            interval = f"{_number(low)} .. {_number(high)}" if low == low else ""  # NaN: no interval
            table.add_row(task, name, _number(estimate.value), interval, f"{estimate.n:,}")
    console = Console(width=None if sys.stdout.isatty() else _FILE_COLUMNS)
    _print_title(console, title)
    console.print(table)
    for signature in dict.fromkeys(e.signature for outcome in outcomes.values() for e in outcome.metrics.values()):
        console.print(f"  {signature}", style="dim", soft_wrap=True, highlight=False)


def _print_title(console: "Console", title: str) -> None:
    """A line by itself: the title of a rich table is broken at the width of the table, and a path is often longer."""
    console.print(title, style="table.title", markup=False, soft_wrap=True, highlight=False)


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
