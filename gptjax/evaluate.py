"""Evaluate a checkpoint: perplexity of a whole split, BLEU and chrF from prompts with references.

  python -m gptjax.evaluate --workdir=runs/quickstart
  python -m gptjax.evaluate --workdir=runs/quickstart --tasks=perplexity --stride=64 --split=test
  python -m gptjax.evaluate --workdir=runs/quickstart --tasks=bleu --prompts=questions.jsonl --output=bleu.json

Every value comes with a 95 % confidence interval and a signature that says how it was computed.
"""

import json
import sys
from pathlib import Path

from absl import flags

from gptjax import cli
from gptjax.errors import UserError

TASKS = ("perplexity", "bleu")


def main(argv: list[str]) -> None:
    flag_values = flags.FlagValues()
    define = dict(flag_values=flag_values)
    flags.DEFINE_string("workdir", None, "of a training run, e.g. --workdir=runs/quickstart", **define)
    flags.DEFINE_string("checkpoint", "best", "best, last or a step, e.g. --checkpoint=last", **define)
    flags.DEFINE_string("tasks", None, "comma-separated, e.g. --tasks=perplexity,bleu; default: the config's", **define)
    flags.DEFINE_enum("split", "validation", ["train", "validation", "test"], "e.g. --split=test", **define)
    flags.DEFINE_integer("stride", None, "tokens between windows, e.g. --stride=64; default: the config's", **define)
    flags.DEFINE_integer(
        "batch_size", None, "rows scored at once; results do not depend on it, e.g. --batch_size=32", **define
    )
    flags.DEFINE_string("prompts", None, "JSONL with prompt and references, e.g. --prompts=questions.jsonl", **define)
    flags.DEFINE_integer("max_prompts", None, "prompts scored at most, 0 = all, e.g. --max_prompts=100", **define)
    flags.DEFINE_string("output", None, "also write the results here, e.g. --output=results.json", **define)
    cli.parse(flag_values, argv, __doc__)
    if not flag_values.workdir:
        raise UserError("--workdir is missing; e.g. --workdir=runs/quickstart")
    evaluate(flag_values)


def evaluate(options: flags.FlagValues) -> None:
    """Runs the tasks, prints a table, writes WORKDIR/evaluation/TASKS-SPLIT-STEP.json and --output."""
    from gptjax import config as config_lib
    from gptjax.data import corpus
    from gptjax.evaluation.report import write_report
    from gptjax.parallel import mesh as mesh_lib
    from gptjax.parallel import partition, runtime
    from gptjax.training import checkpoints

    path = checkpoints.find(Path(options.workdir), options.checkpoint)
    config = checkpoints.read_config(path).unlock()
    evaluation = config.evaluation
    evaluation.tasks = evaluation.tasks if options.tasks is None else options.tasks
    evaluation.stride = evaluation.stride if options.stride is None else options.stride
    evaluation.prompts = evaluation.prompts if options.prompts is None else options.prompts
    evaluation.max_prompts = evaluation.max_prompts if options.max_prompts is None else options.max_prompts
    evaluation.batch_size = options.batch_size or evaluation.batch_size or 2 * config.train.batch_size
    config_lib.validate(config)
    if options.output:
        _claim_output(Path(options.output))
    tasks = _choose_tasks(config, explicit=options.tasks is not None)

    config.mesh.update(data=-1, fsdp=1, context=1, tensor=1)
    runtime.start(config.mesh, rows=evaluation.batch_size, cache_dir=corpus.cache_directory(config))
    mesh = mesh_lib.make_mesh(config.mesh)
    trained = checkpoints.load(path, shardings=lambda abstract: partition.parameter_shardings(abstract, mesh))
    results = {}
    if "perplexity" in tasks:
        results["perplexity"] = _perplexity(config, trained, mesh, options.split)
    if "bleu" in tasks:
        results["bleu"] = _bleu(config, trained, options.split)

    answer = {
        "checkpoint": {
            "path": str(path),
            "step": trained.step,
            "config_sha256": config_lib.sha256(trained.config),
        },
        "results": {task: {name: e.to_json() for name, e in metrics.items()} for task, metrics in results.items()},
    }
    text = json.dumps(answer, indent=1) + "\n"
    workdir = path.parent.parent if path.parent.name == "checkpoints" else path
    places = [workdir / "evaluation" / f"{'-'.join(tasks)}-{options.split}-{trained.step}.json"]
    places += [Path(options.output)] if options.output else []
    for place in places:
        place.parent.mkdir(parents=True, exist_ok=True)
        temporary = place.with_name(place.name + ".tmp")
        temporary.write_text(text)
        temporary.replace(place)
    if (workdir / "metrics.jsonl").exists():
        write_report(workdir)
    _print_table(results, f"{path}, {options.split} split")
    print(f"written: {', '.join(map(str, places))}")


def _claim_output(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output={path} cannot be made: {error.strerror}") from None
    if path.is_dir():
        raise UserError(f"--output={path} is a directory; name a file")


def _choose_tasks(config, *, explicit: bool) -> list[str]:
    from gptjax.config import suggestion

    tasks = [task.strip() for task in config.evaluation.tasks.split(",") if task.strip()]
    for task in tasks:
        if task not in TASKS:
            raise UserError(f"unknown task {task!r}; choose from {', '.join(TASKS)}{suggestion(task, TASKS)}")
    if not tasks:
        raise UserError(f"--tasks is empty; choose from {', '.join(TASKS)}")
    if "bleu" in tasks and not config.evaluation.prompts and not config.data.source.startswith("python_docs"):
        if explicit:
            raise UserError("the task bleu needs prompts with references: --prompts=FILE.jsonl")
        tasks.remove("bleu")
    return tasks


def _perplexity(config, trained, mesh, split_name: str) -> dict:
    """Perplexity, nll, bits per byte and accuracy, and the perplexity of a unigram model beside them.

    Of a mixture, of all sources together and, as METRIC/SOURCE, of each.
    """
    import math

    from gptjax.data import corpus
    from gptjax.evaluation.confidence import Estimate
    from gptjax.evaluation.likelihood import Likelihood, Scorer, unigram_nll

    tokenizer = trained.tokenizer
    sources = corpus.open_sources(config)
    if sources[0].store.tokenizer().sha256 != tokenizer.sha256:
        raise UserError(
            f"{config.data.source} is not the data that {trained.path} was trained on (its tokenizer differs); "
            "restore the data"
        )
    splits = {source.name: source.store.split(split_name) for source in sources}
    scorer = Scorer(
        trained.graphdef,
        mesh,
        context_length=config.model.context_length,
        batch_size=config.evaluation.batch_size,
    )
    likelihoods = {
        name: scorer.score(
            trained.params,
            split,
            eot_id=tokenizer.eot_id,
            stride=config.evaluation.stride,
            progress=_progress("scoring"),
        )
        for name, split in splits.items()
    }
    fingerprint = corpus.identity(sources)["source_fingerprint"]
    identity = f"tokenizer:{tokenizer.sha256[:12]}|data:{fingerprint[:12]}|split:{split_name}"
    results = Likelihood.joined(list(likelihoods.values())).estimates(identity)
    if len(sources) > 1:
        for name, likelihood in likelihoods.items():
            results |= {f"{metric}/{name}": e for metric, e in likelihood.estimates(identity).items()}
    elif not (split := splits[sources[0].name]).has_mask:  # whose frequencies are of all tokens, prompts too
        unigram = math.exp(unigram_nll(sources[0].store.split("train"), split, tokenizer.vocab_size))
        results["unigram_perplexity"] = Estimate(
            unigram, [math.nan, math.nan], split.num_tokens, f"{identity}|model:unigram-add1"
        )
    return results


def _bleu(config, trained, split_name: str) -> dict:
    """BLEU and chrF of greedy completions."""
    from gptjax.evaluation import references
    from gptjax.generation.engine import Generator
    from gptjax.generation.sampling import SamplingParams

    evaluation = config.evaluation
    if evaluation.prompts:
        prompts = references.read_prompts(evaluation.prompts)
    else:
        prompts = _held_out_questions(config, split_name)
    prompts = prompts[: evaluation.max_prompts or None]
    generator = Generator.from_trained(trained)
    sampling = SamplingParams(max_new_tokens=evaluation.max_new_tokens, temperature=0.0)
    completions = generator.complete([prompt["prompt"] for prompt in prompts], sampling)
    hypotheses = [completion.text.strip() for completion in completions]
    answers = [prompt["references"] for prompt in prompts]
    tokenize = references.choose_tokenizer(text for texts in answers for text in texts)
    return {
        "bleu": references.bleu(hypotheses, answers, tokenize),
        "chrf": references.chrf(hypotheses, answers),
    }


def _held_out_questions(config, split_name: str) -> list[dict]:
    """Questions on docstrings of the given split, spread over the library, so that none was trained on."""
    from gptjax.data.python_docs import question_answer_pairs
    from gptjax.data.splits import Fractions, hashed_split

    fractions = Fractions(config.data.validation_fraction, config.data.test_fraction)
    pairs = [p for p in question_answer_pairs() if hashed_split(p["split_key"], fractions) == split_name]
    if not pairs:
        raise UserError(f"the {split_name} split has no questions; raise data.{split_name}_fraction")
    wanted = config.evaluation.max_prompts or len(pairs)
    return pairs[:: max(len(pairs) // wanted, 1)]


def _progress(what: str):
    def show(done: int, total: int) -> None:
        print(
            f"\r{what} {done / total:4.0%}\x1b[K",
            end="\n" if done == total else "",
            file=sys.stderr,
            flush=True,
        )

    return show if sys.stderr.isatty() else None


def _print_table(results: dict, title: str) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("task", "metric", "value", "95 % interval", "n", title=title, title_justify="left")
    for task, metrics in results.items():
        for name, estimate in metrics.items():
            low, high = estimate.ci95
            interval = f"{low:.4f} .. {high:.4f}" if low == low else ""  # NaN: no interval
            table.add_row(task, name, f"{estimate.value:.4f}", interval, f"{estimate.n:,}")
    console = Console()
    console.print(table)
    for signature in dict.fromkeys(e.signature for metrics in results.values() for e in metrics.values()):
        console.print(f"  {signature}", style="dim", soft_wrap=True, highlight=False)


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
