"""Generated texts against references, by the name of a task; and files of system outputs by all of them."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

from gptjax.config import suggestion
from gptjax.errors import UserError
from gptjax.evaluation import diversity, overlap, references
from gptjax.evaluation.metrics import Metric, Outcome, item_ids
from gptjax.evaluation.prompts import read_hypotheses, read_references

Texts = Sequence[str]
References = Sequence[Sequence[str]]
Score = Callable[[Texts, References, str], dict[str, Metric]]


def _bleu(hypotheses: Texts, expected: References, tokenize: str) -> dict[str, Metric]:
    return {"bleu": references.bleu(hypotheses, expected, tokenize), "chrf": references.chrf(hypotheses, expected)}


def _bleu_lowercase(hypotheses: Texts, expected: References, tokenize: str) -> dict[str, Metric]:
    """What mteval-v13a.pl and the E2E challenge's script print, where words are those of 13a."""
    return {"bleu_lowercase": references.bleu(hypotheses, expected, tokenize, lowercase=True)}


def _chrf(hypotheses: Texts, expected: References, tokenize: str) -> dict[str, Metric]:
    return {"chrf": references.chrf(hypotheses, expected)}


def _ter(hypotheses: Texts, expected: References, tokenize: str) -> dict[str, Metric]:
    return {"ter": references.ter(hypotheses, expected, characters=tokenize == "zh")}


def _rouge(hypotheses: Texts, expected: References, tokenize: str) -> dict[str, Metric]:
    return overlap.rouge(hypotheses, expected, characters=tokenize == "zh")


def _f1(hypotheses: Texts, expected: References, tokenize: str) -> dict[str, Metric]:
    return overlap.f1(hypotheses, expected, characters=tokenize == "zh")


def _exact_match(hypotheses: Texts, expected: References, tokenize: str) -> dict[str, Metric]:
    return {"exact_match": _f1(hypotheses, expected, tokenize)["exact_match"]}


def _exact_answer(hypotheses: Texts, expected: References, tokenize: str) -> dict[str, Metric]:
    return overlap.exact_answer(hypotheses, expected)


def _diversity(hypotheses: Texts, expected: References, tokenize: str) -> dict[str, Metric]:
    return diversity.diversity(hypotheses, item_ids([list(texts) for texts in expected]), tokenize)


def _variants(hypotheses: Texts, expected: References, tokenize: str) -> dict[str, Metric]:
    """Settings other than the defaults that papers have used."""
    metrics = {
        f"bleu_{name}": references.bleu(hypotheses, expected, name) for name in ("none", "13a", "intl", "zh", "char")
    }
    metrics["chrf++"] = references.chrf(hypotheses, expected, word_order=2)
    stemmed = overlap.rouge(hypotheses, expected, stemmer=True)
    return metrics | {f"{name}_stemmed": metric for name, metric in stemmed.items()}


TASKS: dict[str, Score] = {
    "bleu": _bleu,
    "bleu_lowercase": _bleu_lowercase,
    "chrf": _chrf,
    "ter": _ter,
    "rouge": _rouge,
    "f1": _f1,
    "exact_match": _exact_match,
    "exact_answer": _exact_answer,
    "diversity": _diversity,
    "variants": _variants,
}
OF_OUTPUTS = ("bleu", "bleu_lowercase", "variants", "ter", "rouge", "f1", "diversity")


def score_texts(
    task: str, prompts: Texts, hypotheses: Texts, expected: References, *, identity: str = "", tokenize: str = ""
) -> Outcome:
    """The metrics of a task. Words are those of sacrebleu's 13a, or characters where most letters are Chinese.

    An empty hypothesis is scored as it is, with 0 by most metrics, and counted in the signature.

    Args:
      prompts: what was asked, to be shown beside the texts; may be empty.
      identity: of prompts and decoding, added to the signatures.
      tokenize: instead of the tokenizer that the references suggest.
    """
    references.check(hypotheses, expected)
    tokenize = tokenize or references.choose_tokenizer(text for texts in expected for text in texts)
    metrics = TASKS[task](hypotheses, expected, tokenize)
    empty = sum(not text.strip() for text in hypotheses)
    notes = "".join(f"|{note}" for note in (identity, f"empty:{empty}" if empty else "") if note)
    metrics = {
        name: dataclasses.replace(metric, signature=metric.signature + notes) for name, metric in metrics.items()
    }
    ids = item_ids([list(texts) for texts in expected])
    shown = {
        item: {"prompt": prompt, "hypothesis": hypothesis, "references": list(texts)}
        for item, prompt, hypothesis, texts in zip(ids, prompts or [""] * len(ids), hypotheses, expected, strict=True)
    }
    return Outcome(dict(metrics), shown)


@dataclasses.dataclass(frozen=True)
class Outputs:
    """What one system wrote."""

    path: Path
    hypotheses: list[str]
    references: list[list[str]]


def read_outputs(path: Path, reference_specs: Sequence[str]) -> list[Outputs]:
    """The outputs of a file, or of every file of a directory, each with the references. Raises UserError."""
    if path.is_dir():
        taken = {Path(spec.rpartition("#")[0] or spec).resolve() for spec in reference_specs}
        files = [
            file for file in sorted(path.iterdir())
            if file.is_file() and not file.name.startswith(".") and file.resolve() not in taken
        ]  # fmt: skip
        if not files:
            raise UserError(f"--hypotheses={path}: the directory has no files")
    else:
        files = [path]
    shared = read_references(reference_specs) if reference_specs else None
    outputs = []
    for file in files:
        hypotheses, own = read_hypotheses(file)
        expected = shared or own
        if expected is None:
            raise UserError(f"{file} has no references; name them: --references=FILE[,FILE...]")
        if len(expected) != len(hypotheses):
            raise UserError(
                f"{file} has {len(hypotheses)} hypotheses, {','.join(reference_specs)} has references for "
                f"{len(expected)} items; item k of one belongs to item k of the other"
            )
        outputs.append(Outputs(file, hypotheses, expected))
    return outputs


def choose_tasks(text: str | None) -> list[str]:
    """The tasks of a list with commas; all that need no particular kind of text where there is none."""
    tasks = [task.strip() for task in text.split(",") if task.strip()] if text else list(OF_OUTPUTS)
    for task in tasks:
        if task not in TASKS:
            raise UserError(f"unknown task {task!r}; choose from {', '.join(TASKS)}{suggestion(task, TASKS)}")
    return tasks
