"""A chat model from scratch: text, dialogues, preferences, rewards; each stage is measured, with one report at the end.

  python tools/chat_quickstart.py --workdir=runs/chat
  python tools/chat_quickstart.py --workdir=runs/chinese --text='jsonl:poems.json#paragraphs' \\
      --dialogues='alpaca:chat.json' --task=toy:反转 --tokenizer=char

The same command continues after an interruption. Needs no network.
"""

import html
import itertools
import json
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags

from gptjax import cli, files
from gptjax.errors import RunError, UserError

STAGES = ("text", "dialogue", "preference", "reward")
CONFIG = Path(__file__).parents[1] / "configs" / "chat_quickstart.py"
QUESTIONS = 100  # held-out questions for each stage
PAIRS = 400  # questions of each kind for preference pairs
TASK_SHARE = 0.03  # share of the dialogues: enough to learn the form of its answers
_ABOUT = {
    "text": "read the corpus",
    "dialogue": "learned to answer from dialogues",
    "preference": "right answers against its own (ORPO)",
    "reward": "the task by reinforcement learning (GRPO)",
}
_CURVES = {"text": "loss", "dialogue": "loss", "preference": "accuracy", "reward": "reward"}  # keys of validation lines


def main(argv: Sequence[str]) -> None:
    flag_values = flags.FlagValues()
    define = {"flag_values": flag_values}
    flags.DEFINE_string("workdir", None, "directory of all results, e.g. --workdir=runs/chat", **define)
    flags.DEFINE_string("text", "python_docs", "source of the first stage, e.g. --text='text:books/*.txt'", **define)
    flags.DEFINE_string(
        "dialogues", "python_docs:dialogues", "questions with answers, e.g. --dialogues=messages:chat.jsonl", **define
    )
    flags.DEFINE_string(
        "task", "toy:sort#length=3,size=900", "questions with answers to check, e.g. --task=toy:反转", **define
    )
    flags.DEFINE_string("tokenizer", "bpe:2048", "tokenizer of all stages, e.g. --tokenizer=char", **define)
    flags.DEFINE_multi_string("set", [], "an option for a stage, e.g. --set=text:train.num_steps=500", **define)
    cli.parse(flag_values, argv, __doc__)
    if not flag_values.workdir:
        raise UserError("--workdir is missing; e.g. --workdir=runs/chat")
    workdir = files.expand(flag_values.workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    sources = {
        "text": flag_values.text,
        "dialogue": f"{flag_values.dialogues}@{1 - TASK_SHARE} + {flag_values.task}@{TASK_SHARE}",
        "preference": f"preference:{workdir / 'pairs.jsonl'}",
        "reward": flag_values.task,
    }
    write_questions(workdir / "questions.jsonl", flag_values.dialogues, "validation", QUESTIONS)
    write_questions(workdir / "task.jsonl", flag_values.task, "validation", QUESTIONS)
    scores: dict[str, dict[str, Any]] = {}
    before = ""
    for stage in STAGES:
        started = clocks()
        if stage == "preference":
            write_pairs(workdir, [flag_values.dialogues, flag_values.task])
        options = [entry.partition(":")[2] for entry in flag_values.set if entry.startswith(f"{stage}:")]
        train(workdir, stage, sources[stage], before, flag_values.tokenizer, options)
        scores[stage] = measure(workdir, stage)
        add_time(workdir, stage, started)
        before = stage
    report(workdir, scores)


def clocks() -> tuple[float, float]:
    """Wall-clock seconds, and CPU seconds of the commands that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.perf_counter(), used.ru_utime + used.ru_stime


def add_time(workdir: Path, stage: str, started: tuple[float, float]) -> None:
    """Adds the time of a stage to WORKDIR/seconds.json: a stage may take several commands."""
    path = workdir / "seconds.json"
    known = files.read_json(path) if path.exists() else {}
    spent = [now - then for now, then in zip(clocks(), started, strict=True)]
    known[stage] = [old + new for old, new in zip(known.get(stage, (0.0, 0.0)), spent, strict=True)]
    files.write_json(path, known)


def gptjax(verb: str, *options: str) -> None:
    """Runs a verb and shows its output. Raises RunError if it fails."""
    command = [sys.executable, "-m", f"gptjax.{verb}", *options]
    status = subprocess.run(command, check=False).returncode
    if status:
        raise RunError(f"gptjax {verb} ended with status {status}; the same command continues")


def train(workdir: Path, stage: str, source: str, before: str, tokenizer: str, options: Sequence[str]) -> None:
    print(f"\n==== {stage}: {_ABOUT[stage]}", flush=True)
    start = [f"--config.init_from={workdir / before}"] if before else [f"--config.tokenizer={tokenizer}"]
    settings = [f"--config.{option}" for option in options]
    gptjax(
        "train", f"--config={CONFIG}:{stage}", f"--workdir={workdir / stage}", f"--config.data.source={source}",
        *start, *settings,
    )  # fmt: skip


def read_lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


def questions_of(source: str, split: str) -> list[dict[str, Any]]:
    """The first questions and last answers of the dialogues of a split, with the same split as training."""
    from gptjax.config import get_default
    from gptjax.data.building.splits import split_of_key
    from gptjax.data.sources.opening import open_source

    about = get_default().data.to_dict()
    found = []
    for document in open_source(source).documents():
        messages = document["messages"]
        if len(messages) == 2 and split_of_key(about, document["split_key"]) == split:
            found.append({"prompt": messages[0]["content"], "references": [messages[1]["content"]]})
    return found


def write_questions(path: Path, source: str, split: str, most: int) -> None:
    files.write_whole(path, as_lines(chosen_questions(source, split, most)))


def chosen_questions(source: str, split: str, most: int) -> list[dict[str, Any]]:
    """At most `most` questions, spread over the split. Raises UserError if it has none."""
    questions = questions_of(source, split)
    if not questions:
        raise UserError(f"{source} has no question in its {split} split; use more dialogues")
    return questions[:: max(len(questions) // most, 1)][:most]


def as_lines(records: Sequence[dict[str, Any]]) -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def write_pairs(workdir: Path, sources: Sequence[str]) -> None:
    """Pairs for training questions: the right answer, and the model's own as the worse one (Chen et al. 2024, SPIN)."""
    pairs = workdir / "pairs.jsonl"
    if pairs.exists():
        return
    asked = workdir / "asked.jsonl"
    questions = [question for source in sources for question in chosen_questions(source, "train", PAIRS)]
    files.write_whole(asked, as_lines(questions))
    options = ["--temperature=1", "--max_new_tokens=48", "--batch_size=64", f"--output={workdir / 'answers.jsonl'}"]
    gptjax("generate", f"--workdir={workdir / 'dialogue'}", f"--prompts={asked}", *options)
    answers = read_lines(workdir / "answers.jsonl")
    records = [
        {"prompt": one["prompt"], "chosen": one["references"][0], "rejected": one["completion"].strip()}
        for one in map(json.loads, answers)
    ]
    records = [one for one in records if one["rejected"] and one["rejected"] != one["chosen"].strip()]
    files.write_whole(pairs, as_lines(records))


def measure(workdir: Path, stage: str) -> dict[str, Any]:
    """Perplexity on the stage's own data, scores against the reference answers, and right answers to the task."""
    run = workdir / stage
    outputs = {name: run / f"{name}.json" for name in ("questions", "task")}
    if not outputs["task"].exists():
        both = [f"--workdir={run}", "--checkpoint=best", "--max_prompts=100"]
        for name, tasks in (("questions", "perplexity,bleu,rouge,f1"), ("task", "exact_match")):
            prompts = f"--prompts={workdir / name}.jsonl"
            gptjax("evaluate", *both, f"--tasks={tasks}", prompts, "--max_new_tokens=48", f"--output={outputs[name]}")
    results = {name: json.loads(path.read_text(encoding="utf-8"))["results"] for name, path in outputs.items()}
    return {
        "perplexity": results["questions"]["perplexity"]["perplexity"],
        "BLEU": results["questions"]["bleu"]["bleu"],
        "ROUGE-L": results["questions"]["rouge"]["rougeL"],
        "F1": results["questions"]["f1"]["f1"],
        "task, exact match": results["task"]["exact_match"]["exact_match"],
    }


# ---- The report ----------------------------------------------------------------------------------------------


def items(workdir: Path, stage: str, name: str, task: str) -> dict[str, dict[str, Any]]:
    """The items of an evaluation by their prompts."""
    lines = map(json.loads, read_lines(workdir / stage / f"{name}.items.jsonl"))
    return {line["prompt"]: line for line in lines if line["task"] == task and "prompt" in line}


def win_rate(workdir: Path, stage: str, before: str) -> tuple[float, float, float]:
    """How often the F1 of an answer is above that of the stage before (equal: half), with its 95 % interval."""
    import numpy as np

    from gptjax.evaluation import answers
    from gptjax.evaluation.confidence import ratio_interval

    ours, theirs = (items(workdir, one, "questions", "f1") for one in (stage, before))

    def score(line: dict[str, Any]) -> float:
        return answers.f1([line["hypothesis"]], [line["references"]])["f1"].value

    wins = np.array([np.sign(score(ours[p]) - score(theirs[p])) / 2 + 0.5 for p in ours if p in theirs])
    return float(wins.mean()), *ratio_interval(wins, np.ones(len(wins)))


def curve(workdir: Path, stage: str, name: str) -> list[tuple[int, float]]:
    """(step, value) of a validation metric."""
    lines = [json.loads(line) for line in read_lines(workdir / stage / "metrics.jsonl")]
    return [(line["step"], line[name]) for line in lines if line["split"] == "validation" and name in line]


def from_to(points: Sequence[tuple[int, float]]) -> str:
    """The first and the last value of a curve."""
    return f"{points[0][1]:.3f} to {points[-1][1]:.3f}" if points else "not measured"


class Report(NamedTuple):
    """The content of report.md and report.html.

    Attributes:
      headings, rows: of the table of stages.
      notes: sentences.
      answers: (question, reference, {stage: answer}).
    """

    title: str
    summary: str
    headings: list[str]
    rows: list[list[str]]
    notes: list[str]
    answers: list[tuple[str, str, dict[str, str]]]


def report(workdir: Path, scores: dict[str, dict[str, Any]]) -> None:
    """Writes report.md and report.html, and prints the next commands."""
    found = compose(workdir, scores)
    text = as_markdown(found)
    files.write_whole(workdir / "report.md", text)
    files.write_whole(workdir / "report.html", as_html(found, workdir), errors="replace")
    best = workdir / STAGES[-1]
    print(text)
    print(f"report: {workdir / 'report.html'}, also as .md; each stage has its own: {workdir}/STAGE/report.html")
    print(f"talk:   gptjax chat --workdir={best}")
    print(f"serve:  gptjax serve --model=mine={best}")
    print(f"export: gptjax convert --from={best} --to=hf:models/{workdir.name}")


def compose(workdir: Path, scores: dict[str, dict[str, Any]]) -> Report:
    seconds = files.read_json(workdir / "seconds.json")
    rows = []
    for stage in STAGES:
        cells = [
            f"{value['value']:.2f} [{value['ci95'][0]:.2f}, {value['ci95'][1]:.2f}]"
            if value["ci95"][0] is not None
            else f"{value['value']:.2f}"
            for value in scores[stage].values()
        ]
        rows.append([f"{stage}: {_ABOUT[stage]}", *cells, *(f"{spent / 60:.1f}" for spent in seconds[stage])])
    clock, processor = (sum(spent) / 60 for spent in zip(*seconds.values(), strict=True))
    rates = [(stage, *win_rate(workdir, stage, before)) for before, stage in itertools.pairwise(STAGES[1:])]
    shown = {stage: items(workdir, stage, "questions", "f1") for stage in STAGES}
    answers = [
        (
            prompt,
            line["references"][0],
            {
                stage: " ".join(shown[stage][prompt]["hypothesis"].split())[:200]
                for stage in STAGES
                if prompt in shown[stage]
            },
        )
        for prompt, line in list(shown["text"].items())[:5]
    ]
    return Report(
        f"A chat model, stage by stage: {workdir.name}",
        f"{clock:.1f} minutes of wall-clock time, {processor:.1f} of CPU time. Held-out questions; 95 % intervals; "
        "greedy answers.",
        ["stage", *scores["text"], "minutes", "CPU minutes"],
        rows,
        [
            "Stages have perplexities on different data, which cannot be compared.",
            f"Preferences: accuracy on held-out pairs {from_to(curve(workdir, 'preference', 'accuracy'))}, "
            f"margin {from_to(curve(workdir, 'preference', 'margin'))}.",
            f"Rewards: {from_to(curve(workdir, 'reward', 'reward'))} on held-out questions of the task.",
            *(
                f"{stage} against the stage before, F1 on the questions: win rate {mean:.2f} [{low:.2f}, {high:.2f}]."
                for stage, mean, low, high in rates
            ),
        ],
        answers,
    )


def as_markdown(found: Report) -> str:
    table = [found.headings, ["---"] * len(found.headings), *found.rows]
    lines = [f"# {found.title}", "", found.summary, ""]
    lines += ["| " + " | ".join(row) + " |" for row in table]
    lines += ["", *(f"* {note}" for note in found.notes), "", "## The same questions, after each stage", ""]
    for question, reference, answers in found.answers:
        lines += [f"**{question}** ({reference})", "", *(f"* {stage}: {text}" for stage, text in answers.items()), ""]
    return "\n".join(lines)


def as_html(found: Report, workdir: Path) -> str:
    """One page without network access, with the curves of the stages."""
    from gptjax.reporting import charts, markup, page

    drawn = []
    for stage, name in _CURVES.items():
        if points := curve(workdir, stage, name):
            series = [charts.Series("validation", *zip(*points, strict=True))]
            figure = charts.line_chart(series, title=f"{stage}: {name}", x_label="step", y_label=name)
            drawn.append(f'<div class="panel">{figure}</div>')
    columns = dict.fromkeys(found.headings, "number") | {"stage": "key"}
    notes = "\n".join(f"<li>{html.escape(note)}</li>" for note in found.notes)
    questions = [
        f'<div class="panel"><h3>{html.escape(question)}</h3><p class="note">{html.escape(reference)}</p>'
        f"{markup.table({'stage': 'key', 'answer': ''}, answers.items())}</div>"
        for question, reference, answers in found.answers
    ]
    body = [
        f'<header><h1>{html.escape(found.title)}</h1><div class="muted">{html.escape(found.summary)}</div></header>',
        f'<h2>Stages</h2>\n<div class="panel">{markup.table(columns, found.rows)}</div>\n<ul>{notes}</ul>',
        "<h2>Curves</h2>\n" + '<div class="charts">\n' + "\n".join(drawn) + "\n</div>",
        "<h2>The same questions, after each stage</h2>",
        *questions,
    ]
    return page.document(html.escape(found.title), "\n".join(body), style=charts.CSS, script=charts.SCRIPT)


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
