"""A chat model from nothing: text, dialogues, preferences, rewards; every stage measured, one report at the end.

  python tools/chat_quickstart.py --workdir=runs/chat
  python tools/chat_quickstart.py --workdir=runs/chinese --text='jsonl:poems.json#paragraphs' \\
      --dialogues='alpaca:chat.json' --task=toy:反转 --tokenizer=char

The same command continues where it was stopped. Needs no network.
"""

import itertools
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

from gptjax import cli, files
from gptjax.errors import RunError, UserError

STAGES = ("text", "dialogue", "preference", "reward")
CONFIG = Path(__file__).parents[1] / "configs" / "chat_quickstart.py"
QUESTIONS = 100  # held-out ones that each stage is measured on
PAIRS = 400  # questions whose answers are compared
_ABOUT = {
    "text": "read the corpus",
    "dialogue": "learnt to answer from dialogues",
    "preference": "right answers against its own (DPO)",
    "reward": "the task by trial and error (GRPO)",
}


def main(argv: Sequence[str]) -> None:
    flag_values = flags.FlagValues()
    define = {"flag_values": flag_values}
    flags.DEFINE_string("workdir", None, "where everything is written, e.g. --workdir=runs/chat", **define)
    flags.DEFINE_string("text", "python_docs", "what is read first, e.g. --text='text:books/*.txt'", **define)
    flags.DEFINE_string(
        "dialogues", "python_docs:dialogues", "questions with answers, e.g. --dialogues=messages:chat.jsonl", **define
    )
    flags.DEFINE_string(
        "task", "toy:sort#length=3,size=900", "questions with answers to check, e.g. --task=toy:反转", **define
    )
    flags.DEFINE_string("tokenizer", "bpe:2048", "of everything, e.g. --tokenizer=char", **define)
    flags.DEFINE_multi_string("set", [], "an option for a stage, e.g. --set=text:train.num_steps=500", **define)
    cli.parse(flag_values, argv, __doc__)
    if not flag_values.workdir:
        raise UserError("--workdir is missing; e.g. --workdir=runs/chat")
    workdir = files.expand(flag_values.workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    sources = {
        "text": flag_values.text,
        "dialogue": f"{flag_values.dialogues}@0.95 + {flag_values.task}@0.05",
        "preference": f"preference:{workdir / 'pairs.jsonl'}",
        "reward": flag_values.task,
    }
    write_questions(workdir / "questions.jsonl", flag_values.dialogues, "validation", QUESTIONS)
    write_questions(workdir / "task.jsonl", flag_values.task, "validation", QUESTIONS)
    scores: dict[str, dict[str, Any]] = {}
    before = ""
    for stage in STAGES:
        if stage == "preference":
            write_pairs(workdir, flag_values.dialogues)
        options = [entry.partition(":")[2] for entry in flag_values.set if entry.startswith(f"{stage}:")]
        train(workdir, stage, sources[stage], before, flag_values.tokenizer, options)
        scores[stage] = measure(workdir, stage)
        before = stage
    report(workdir, scores, time.perf_counter() - started)


def gptjax(verb: str, *options: str) -> None:
    """Runs a verb, whose output is shown. Raises RunError where it fails."""
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
    """The first questions and last answers of the dialogues of one split, as training splits them."""
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
    questions = questions_of(source, split)
    if not questions:
        raise UserError(f"{source} has no question in its {split} split; use more dialogues")
    step = max(len(questions) // most, 1)
    files.write_whole(path, "".join(json.dumps(q, ensure_ascii=False) + "\n" for q in questions[::step][:most]))


def write_pairs(workdir: Path, source: str) -> None:
    """Answers of the model to training questions, each the worse side of a right answer (Chen et al. 2024, SPIN)."""
    pairs = workdir / "pairs.jsonl"
    if pairs.exists():
        return
    asked = workdir / "asked.jsonl"
    write_questions(asked, source, "train", PAIRS)
    options = ["--temperature=1", "--max_new_tokens=48", "--batch_size=64", f"--output={workdir / 'answers.jsonl'}"]
    gptjax("generate", f"--workdir={workdir / 'dialogue'}", f"--prompts={asked}", *options)
    answers = read_lines(workdir / "answers.jsonl")
    records = [
        {"prompt": one["prompt"], "chosen": one["references"][0], "rejected": one["completion"].strip()}
        for one in map(json.loads, answers)
    ]
    records = [one for one in records if one["rejected"] and one["rejected"] != one["chosen"].strip()]
    files.write_whole(pairs, "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in records))


def measure(workdir: Path, stage: str) -> dict[str, Any]:
    """Perplexity of the stage's own data, texts against the references of the questions, the task's answers."""
    run = workdir / stage
    outputs = {name: run / f"{name}.json" for name in ("perplexity", "questions", "task")}
    if not outputs["task"].exists():
        both = [f"--workdir={run}", "--checkpoint=best", "--max_prompts=100"]
        gptjax("evaluate", *both, "--tasks=perplexity", f"--output={outputs['perplexity']}")
        for name, tasks in (("questions", "bleu,rouge,f1"), ("task", "exact_match")):
            prompts = f"--prompts={workdir / name}.jsonl"
            gptjax("evaluate", *both, f"--tasks={tasks}", prompts, "--max_new_tokens=48", f"--output={outputs[name]}")
    results = {name: json.loads(path.read_text(encoding="utf-8"))["results"] for name, path in outputs.items()}
    return {
        "perplexity": results["perplexity"]["perplexity"]["perplexity"],
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


def curve(workdir: Path, stage: str, name: str) -> str:
    """The first and last value of a validation metric."""
    lines = [json.loads(line) for line in read_lines(workdir / stage / "metrics.jsonl")]
    values = [line[name] for line in lines if line["split"] == "validation" and name in line]
    return f"{values[0]:.3f} to {values[-1]:.3f}" if values else "not measured"


def report(workdir: Path, scores: dict[str, dict[str, Any]], seconds: float) -> None:
    """Writes report.md, and says what to do next."""
    names = list(scores["text"])
    lines = [
        f"# A chat model, stage by stage: {workdir.name}",
        "",
        f"{seconds / 60:.1f} minutes. Held-out questions; 95 % intervals; greedy answers.",
        "",
        "| stage | " + " | ".join(names) + " |",
        "|---" * (len(names) + 1) + "|",
    ]
    for stage in STAGES:
        cells = [
            f"{value['value']:.2f} [{value['ci95'][0]:.2f}, {value['ci95'][1]:.2f}]"
            if value["ci95"][0] is not None
            else f"{value['value']:.2f}"
            for value in scores[stage].values()
        ]
        lines.append(f"| {stage}: {_ABOUT[stage]} | " + " | ".join(cells) + " |")
    rates = [(stage, *win_rate(workdir, stage, before)) for before, stage in itertools.pairwise(STAGES[1:])]
    lines += [
        "",
        "Perplexities of different stages are of different data: they do not compare.",
        "",
        f"* Preferences: accuracy on held-out pairs {curve(workdir, 'preference', 'accuracy')}, "
        f"margin {curve(workdir, 'preference', 'margin')}.",
        f"* Rewards: {curve(workdir, 'reward', 'reward')} on held-out questions of the task.",
        *(
            f"* {stage} against the stage before, by F1 on the questions: win rate {mean:.2f} [{low:.2f}, {high:.2f}]."
            for stage, mean, low, high in rates
        ),
        "",
        "## The same questions, after each stage",
        "",
    ]
    shown = {stage: items(workdir, stage, "questions", "f1") for stage in STAGES}
    for prompt, line in list(shown["text"].items())[:5]:
        lines += [f"**{prompt}** ({line['references'][0]})", ""]
        lines += [
            f"* {stage}: {' '.join(shown[stage][prompt]['hypothesis'].split())[:200]}"
            for stage in STAGES
            if prompt in shown[stage]
        ]
        lines.append("")
    best = workdir / STAGES[-1]
    files.write_whole(workdir / "report.md", "\n".join(lines) + "\n")
    print("\n".join(lines))
    print(f"report: {workdir / 'report.md'}; each stage has its own: {workdir}/STAGE/report.html")
    print(f"talk:   gptjax chat --workdir={best}")
    print(f"serve:  gptjax serve --model=mine={best}")
    print(f"export: gptjax convert --from={best} --to=hf:models/{workdir.name}")


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
