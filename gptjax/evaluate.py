"""Evaluate a checkpoint, score texts of any system, or compare two evaluations.

  python -m gptjax.evaluate --workdir=runs/quickstart
  python -m gptjax.evaluate --workdir=runs/quickstart --tasks=perplexity --stride=64 --split=test
  python -m gptjax.evaluate --workdir=runs/quickstart --data='text:wikitext/*.txt' --tasks=perplexity
  python -m gptjax.evaluate --workdir=hf:models/gpt2 --data='text:wikitext/*.txt' --tasks=perplexity
  python -m gptjax.evaluate --workdir=runs/quickstart --tasks=bleu,rouge --prompts=questions.jsonl --output=bleu.json
  python -m gptjax.evaluate --workdir=runs/e2e --prompts=test.csv#mr,ref --beams=4 --length_penalty=0.8
  python -m gptjax.evaluate --workdir=runs/chat --prompts=test.jsonl --tasks=f1 --best_of=8 --reward=model:runs/reward
  python -m gptjax.evaluate --workdir=runs/quickstart --tasks=multiple_choice:copa.jsonl,hellaswag:hellaswag_val.jsonl
  python -m gptjax.evaluate --workdir=runs/quickstart --tasks=lm_eval:arc_easy
  python -m gptjax.evaluate --compare runs/a runs/b
  python -m gptjax.evaluate --hypotheses=outputs/ --references=references.txt

Tasks: perplexity; on --prompts: bleu, bleu_lowercase, chrf, ter, rouge, f1, exact_match, exact_answer (GSM8K),
diversity, variants; on FILE after a colon: multiple_choice (query, choices, gold), hellaswag, arc, piqa, winogrande,
boolq, copa, mmlu, ceval, cmmlu, lambada;
lm_eval:TASK where lm-eval is installed.

Every value comes with a 95 % confidence interval and a signature that says how it was computed.
"""

import dataclasses
import functools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

from gptjax import cli, failures, files, outputs
from gptjax.buckets import is_url
from gptjax.errors import RunError, UserError
from gptjax.generation.flags import define_beams, define_model, define_number
from gptjax.processes import cluster, distributed


def main(argv: Sequence[str]) -> None:
    flag_values = flags.FlagValues()
    define = dict(flag_values=flag_values)
    define_model(flag_values)
    flags.DEFINE_string("tasks", None, "comma-separated, e.g. --tasks=perplexity,bleu; default: the config's", **define)
    flags.DEFINE_enum("split", "validation", ["train", "validation", "test"], "e.g. --split=test", **define)
    flags.DEFINE_string("data", "", "measure perplexity on all of this source, e.g. --data=text:notes/*.txt", **define)
    number = functools.partial(define_number, flag_values)
    number("stride", None, "tokens between windows, e.g. --stride=64; default: the config's", (0, 2**24))
    number("batch_size", None, "rows scored at once; no result depends on it, e.g. --batch_size=32", (1, 2**20))
    flags.DEFINE_string(
        "prompts",
        None,
        "prompts with references, e.g. --prompts=questions.jsonl or --prompts=test.csv#mr,ref",
        **define,
    )
    number("max_prompts", None, "prompts scored at most, 0 = all, e.g. --max_prompts=100", (0, 2**31))
    number("max_new_tokens", None, "tokens generated at most, e.g. --max_new_tokens=100", (1, 2**24))
    define_beams(flag_values, default=None)
    number("best_of", 1, "completions drawn per prompt; the best one is scored, e.g. --best_of=8", (1, 1000))
    flags.DEFINE_string("reward", "", "reward by which --best_of chooses, e.g. --reward=model:runs/reward", **define)
    flags.DEFINE_string("examples", "", "questions for tasks without FILE, e.g. --examples=copa.jsonl", **define)
    flags.DEFINE_string("delimiter", " ", r"text between query and choice, e.g. --delimiter='\nAnswer: '", **define)
    flags.DEFINE_multi_string("compare", [], "two work directories or results, e.g. --compare runs/a runs/b", **define)
    flags.DEFINE_string("hypotheses", None, "a file or folder of outputs to score, e.g. --hypotheses=out.txt", **define)
    flags.DEFINE_string("references", "", "one text per line, e.g. --references=a.txt,b.txt", **define)
    flags.DEFINE_enum(
        "begin",
        "tokenizer",
        ["tokenizer", "document", "none"],
        "tokens before a question: tokenizer = those that it puts before every text, as lm-eval does; document = those "
        "that begin a document in training, e.g. --begin=document",
        **define,
    )
    flags.DEFINE_enum(
        "too_long",
        "cut",
        ["cut", "skip", "fail"],
        "for a question or prompt longer than the context: cut its beginning off, or leave it out (skip), e.g. "
        "--too_long=skip",
        **define,
    )
    flags.DEFINE_string("rules", "", "for f1 and exact_match: squad, mlqa, mlqa-es, cmrc, e.g. --rules=cmrc", **define)
    flags.DEFINE_string("output", None, "also write the results here, e.g. --output=results.json", **define)
    cluster.define_flags(flag_values)
    cli.parse(flag_values, _join_compare(argv), __doc__)
    if flag_values.output:
        outputs.claim(flag_values.output)
    if flag_values.compare:
        compare(flag_values)
    elif flag_values.hypotheses:
        score_outputs(flag_values)
    elif flag_values.workdir:
        with distributed.join(flag_values, failures.describe):
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
    from gptjax.artifacts import mirror, models
    from gptjax.evaluation import answers, best_of, results, tasks
    from gptjax.model import gpt
    from gptjax.model.architecture import Architecture
    from gptjax.parallel import mesh as mesh_lib
    from gptjax.parallel import partition
    from gptjax.processes import runtime
    from gptjax.reporting.page import write_report
    from gptjax.training import footprint

    # 1. Everything that can fail cheaply: flags, config, tasks and their files, before a device is touched.
    place = models.find(options.workdir, options.checkpoint, adapter=options.adapter)
    config = place.config.copy_and_resolve_references().unlock()
    evaluation = config.evaluation
    for name in ("tasks", "stride", "prompts", "max_prompts", "max_new_tokens", "beams", "length_penalty"):
        if options[name].value is not None:
            evaluation[name] = options[name].value
    evaluation.batch_size = options.batch_size or evaluation.batch_size or 2 * config.train.batch_size
    config_lib.validate(config)
    best_of.check(options.best_of, options.reward, beams=evaluation.beams)
    requests = tasks.parse(evaluation.tasks)
    if options.tasks is None and not evaluation.prompts and not config.data.source.startswith("python_docs"):
        requests = [request for request in requests if not tasks.need_prompts(request)] or tasks.parse("perplexity")
    answers.check_rule(options.rules)
    task_options = tasks.Options(
        split=options.split,
        data=options.data,
        examples=options.examples,
        delimiter=options.delimiter.replace("\\n", "\n"),
        rules=options.rules,
        begin=options.begin,
        too_long=options.too_long,
        best_of=options.best_of,
        reward=options.reward,
    )
    materials = [tasks.TASKS[request.kind].read(request, config, task_options) for request in requests]

    # 2. The checkpoint, on a mesh of this machine, whose devices may differ from those of the training run.
    config.mesh.update(config_lib.get_default().mesh)
    runtime.start(config.mesh, rows=evaluation.batch_size, cache_dir=config_lib.cache_directory(config))
    params = gpt.abstract_params(Architecture.from_config(config.model, 0))
    if not footprint.replicas_fit(params):
        config.mesh.update(data=1, fsdp=jax.device_count())
    mesh = mesh_lib.make_mesh(config.mesh)
    trained = place.load(shardings=lambda abstract: partition.parameter_shardings(abstract, mesh))
    # 3. All processes run all tasks, since they compute together; only process 0 writes and prints.
    context = tasks.Context(config, task_options, trained, mesh, _generator(trained, mesh), results.progress)
    outcomes = {
        request.name: tasks.TASKS[request.kind].run(context, request, material)
        for request, material in zip(requests, materials, strict=True)
    }
    if distributed.current().index:
        return
    answer = {
        "checkpoint": {
            "path": mirror.shown(place.path),
            "step": trained.step,
            "config_sha256": config_lib.sha256(trained.config),
        },
        "results": results.to_json(outcomes),
    }
    results.show(outcomes, f"{mirror.shown(place.path)}, {options.data or f'{options.split} split'}")
    if options.output:
        results.write(options.output, answer, outcomes)
    if place.is_published:  # nothing is written into the directory of a published model, such as the hub's cache
        print(f"written: {options.output}" if options.output else "not written; --output=FILE.json keeps the results")
        return
    workdir = place.path.parent.parent if place.path.parent.name == "checkpoints" else place.path
    search = f"-beam-{evaluation.beams}-{evaluation.length_penalty:g}" if evaluation.beams > 1 else ""
    search += f"-best-of-{options.best_of}" if options.best_of > 1 else ""
    name = results.file_name(list(outcomes), (options.data or options.split) + search, trained.step)
    file = workdir / "evaluation" / f"{name}.json"
    try:
        results.write(file, answer, outcomes)
        # The report reads the files just written, so it comes last; a bare checkpoint has no run to report on.
        if (workdir / "metrics.jsonl").exists():
            write_report(workdir)
        mirror.push(workdir)
    except (RunError, UserError, OSError) as error:
        if not options.output:
            raise
        results.warn(f"no report: {files.explain(error)}" if isinstance(error, OSError) else str(error))
        file = None
    print(f"written: {', '.join(str(path) for path in (file and mirror.shown(file), options.output) if path)}")


def _generator(trained, mesh):
    """A function that completes texts or token ids; it makes the `Generator` at its first call."""
    import jax

    from gptjax.evaluation import best_of, results, tasks
    from gptjax.evaluation.room import fit
    from gptjax.generation import beam
    from gptjax.generation.beam_params import BeamParams
    from gptjax.generation.completion import Generator
    from gptjax.generation.params import SamplingParams

    if mesh.devices.flat[0].platform == "cpu" and jax.process_count() == 1:
        # Decoding reads the whole model for every token. Each virtual device would read it from the same memory.
        trained = dataclasses.replace(trained, params=jax.device_put(trained.params, mesh.devices.flat[0]))
        mesh = None
    generator = functools.cache(lambda: Generator.from_trained(trained, mesh=mesh))

    def generate(
        prompts: Sequence, too_long: str = "fail", best: tasks.BestOf | None = None, **sampling
    ) -> tuple[list[str], list[int], str]:
        if all(isinstance(prompt, str) for prompt in prompts):
            prompts = generator().encode(prompts)
        limit, new_tokens = trained.architecture.context_length, sampling["max_new_tokens"]
        fitted = fit(prompts, limit, new_tokens, too_long, generator().begin_ids)
        if "beams" in sampling:
            found = beam.search(generator(), fitted.prompts, BeamParams(**sampling), mesh=mesh)
            completions = [first for first, *_ in found]
        elif best:
            requests = [best.requests[place] for place in fitted.places]
            reward = best_of.open_reward(best.reward, trained, requests)
            drawn = [prompt for prompt in fitted.prompts for _ in range(best.count)]
            drawn = generator().complete_tokens(drawn, SamplingParams(**sampling))
            chosen = best_of.choose(reward, trained, fitted.prompts, requests, drawn)
            completions = [drawn[one.place] for one in chosen]
        else:
            completions = generator().complete_tokens(fitted.prompts, SamplingParams(**sampling))
        if count := sum(not completion.text.strip() for completion in completions):
            results.warn(f"{count} of {len(completions)} completions are empty; they are scored as they are")
        return [completion.text for completion in completions], fitted.places, fitted.note

    return generate


# ---- Texts of any system ---------------------------------------------------------------------------------


def score_outputs(options: flags.FlagValues) -> None:
    """Scores a file of texts, or every file of a folder, against references. No checkpoint is needed."""
    from gptjax.evaluation import answers, prompts, results, text_tasks

    chosen = text_tasks.choose_tasks(options.tasks)
    answers.check_rule(options.rules)
    outputs = text_tasks.read_outputs(options.hypotheses, _split_specs(options.references))
    for how in dict.fromkeys(output.how for output in outputs):
        print(f"references: {options.references or 'of each hypothesis'}, {how}", file=sys.stderr)
    systems = {}
    for group in text_tasks.by_references(outputs):
        read = {"references": [text for references in group[0].references for text in references]}
        read |= {f"hypotheses of {output.path}": output.hypotheses for output in group}
        for kind, texts in read.items():
            for oddity in prompts.oddities(texts):
                results.warn(f"of {kind}, {oddity}; they are scored as they are")
        expected = group[0].references
        setting = text_tasks.Setting.of(expected, options.rules)
        written = [output.hypotheses for output in group]
        counted = text_tasks.count(chosen, written, expected, setting, results.progress("scoring"))
        for output, sums in zip(group, counted, strict=True):
            given = {"setting": setting, "counted": sums}
            systems[output] = {
                task: text_tasks.score_texts(task, (), output.hypotheses, expected, **given) for task in chosen
            }
    for output in outputs:
        results.show(systems[output], str(output.path))
    if options.output and len(outputs) == 1:
        (outcomes,) = systems.values()
        answer = {"hypotheses": str(outputs[0].path), "results": results.to_json(outcomes)}
        results.write(options.output, answer, outcomes)
    elif options.output:
        found = {Path(output.path).name: results.to_json(systems[output]) for output in outputs}
        results.write(options.output, {"systems": found}, {})


def _split_specs(text: str) -> list[str]:
    """The entries of a list with commas, of which FILE#REFERENCE or FILE#PROMPT,REFERENCE is one."""
    specs: list[str] = []
    for part in filter(None, text.split(",")):
        if specs and "#" in specs[-1] and "," not in specs[-1] and "#" not in part and not Path(part).exists():
            specs[-1] += f",{part}"
        else:
            specs.append(part)
    return specs


# ---- Two evaluations -------------------------------------------------------------------------------------


def _evaluated(place: str) -> Path:
    """A work directory or a file of --output; for a URL, its local copy."""
    from gptjax.artifacts import mirror
    from gptjax.evaluation.compare import ITEMS_SUFFIX

    if not is_url(place):
        return Path(place)
    if not place.endswith((".json", ".jsonl")):
        return mirror.opened(place)
    folder, _, name = place.rpartition("/")
    return mirror.copies(folder, [name, outputs.beside(name, ITEMS_SUFFIX)]) / name


def compare(options: flags.FlagValues) -> None:
    """Prints the paired differences between two evaluations, and says which metrics differ."""
    from rich.table import Table

    from gptjax.artifacts import mirror
    from gptjax.evaluation import compare as compare_lib
    from gptjax.evaluation import results

    if len(options.compare) != 2:
        raise UserError(f"--compare takes two work directories or results, not {len(options.compare)}: --compare A B")
    a, b = map(_evaluated, options.compare)
    comparison = compare_lib.compare(a, b)
    differences, problems = comparison.differences, comparison.problems
    sides = [
        f"{side} = {' '.join(map(mirror.shown, files))}" for side, files in zip("AB", comparison.files, strict=True)
    ]
    title = "\n".join([*sides, f"B - A over the same items, {compare_lib.SAMPLES} paired bootstrap samples"])
    table = Table("task", "metric", "A", "B", "B - A", "95 % interval", "p", "n", "")
    for d in differences:
        low, high = d.ci95
        interval = f"{results.number(low, '+')} .. {results.number(high, '+')}"
        numbers = [results.number(d.a), results.number(d.b), results.number(d.difference, "+"), interval, f"{d.p:.3f}"]
        table.add_row(d.task, d.metric, *numbers, f"{d.n:,}", d.verdict)
    console = results.console()
    results.show_title(console, title)
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
        results.write(
            options.output, {"a": mirror.shown(a), "b": mirror.shown(b), "differences": found, "problems": problems}, {}
        )


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
