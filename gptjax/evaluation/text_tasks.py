"""Tasks that score texts against references: generated texts, or files of system outputs."""

import dataclasses
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from gptjax.buckets import is_url
from gptjax.config import suggestion
from gptjax.errors import UserError
from gptjax.evaluation import answers, diversity, item_sums, overlap, references
from gptjax.evaluation.item_sums import Counter, Sums
from gptjax.evaluation.metrics import Metric, Outcome, Progress, item_ids
from gptjax.evaluation.overlap import RougeCounts
from gptjax.evaluation.prompts import read_hypotheses, read_references
from gptjax.evaluation.references import Counts
from gptjax.evaluation.words import ROUGE_WORDS, choose_tokenizer, rouge_words

Texts = Sequence[str]
References = Sequence[Sequence[str]]


class Setting(NamedTuple):
    """Settings that follow from the references.

    Attributes:
      tokenize: sacrebleu's tokenizer.
      rouge: the words of ROUGE.
      rules: of F1 and exact match, or "".
    """

    tokenize: str
    rouge: str
    rules: str = ""

    @classmethod
    def of(cls, expected: References, rules: str = "") -> "Setting":
        texts = [text for references in expected for text in references]
        return cls(choose_tokenizer(texts), rouge_words(texts), rules)


def _variants(setting: Setting) -> dict[str, Counter]:
    """Metrics with other settings that papers have used."""
    bleus = {f"bleu_{name}": Counts.bleu(name) for name in ("none", "13a", "intl", "zh", "char")}
    return {**bleus, "chrf++": Counts.chrf(word_order=2), "{}_stemmed": RougeCounts(stemmer=True)}


# Task -> metric name -> what counts it for an item. "{}" stands for the metric names that the counter gives.
_COUNTED: dict[str, Callable[[Setting], dict[str, Counter]]] = {
    "bleu": lambda setting: {"bleu": Counts.bleu(setting.tokenize), "chrf": Counts.chrf()},
    # Equals mteval-v13a.pl and the script of the E2E challenge, if words are split as by 13a.
    "bleu_lowercase": lambda setting: {"bleu_lowercase": Counts.bleu(setting.tokenize, lowercase=True)},
    "chrf": lambda setting: {"chrf": Counts.chrf()},
    "ter": lambda setting: {"ter": Counts.ter(characters=setting.tokenize == "zh")},
    "rouge": lambda setting: {"{}": RougeCounts(setting.rouge)},
    "variants": _variants,
}


def _f1(hypotheses: Texts, expected: References, setting: Setting) -> dict[str, Metric]:
    return answers.f1(hypotheses, expected, tokenize=setting.tokenize, rules=setting.rules)


def _exact_match(hypotheses: Texts, expected: References, setting: Setting) -> dict[str, Metric]:
    return {"exact_match": _f1(hypotheses, expected, setting)["exact_match"]}


def _exact_answer(hypotheses: Texts, expected: References, setting: Setting) -> dict[str, Metric]:
    return answers.exact_answer(hypotheses, expected)


def _diversity(hypotheses: Texts, expected: References, setting: Setting) -> dict[str, Metric]:
    return diversity.diversity(hypotheses, item_ids([list(texts) for texts in expected]), setting.tokenize)


_OTHERS: dict[str, Callable[[Texts, References, Setting], dict[str, Metric]]] = {
    "f1": _f1,
    "exact_match": _exact_match,
    "exact_answer": _exact_answer,
    "diversity": _diversity,
}
TASKS = (*("bleu", "bleu_lowercase", "chrf", "ter", "rouge"), *_OTHERS, "variants")
OF_OUTPUTS = ("bleu",)  # BLEU and chrF


def count(
    tasks: Sequence[str],
    systems: Sequence[Texts],
    expected: References,
    setting: Setting,
    progress: Progress | None = None,
) -> list[dict[Counter, Sums]]:
    """The sums of the items of each system for these tasks; much faster than one system at a time."""
    for texts in systems:
        references.check(texts, expected)
    wanted = {counter for task in tasks if task in _COUNTED for counter in _COUNTED[task](setting).values()}
    return item_sums.compute(sorted(wanted, key=repr), systems, expected, progress=progress)


def score_texts(
    task: str,
    prompts: Texts,
    hypotheses: Texts,
    expected: References,
    *,
    identity: str = "",
    setting: Setting | None = None,
    counted: Mapping[Counter, Sums] | None = None,
) -> Outcome:
    """The metrics of a task. Words are those of sacrebleu's 13a, or characters where scripts have no spaces.

    An empty hypothesis is scored as it is, with 0 by most metrics, and counted in the signature.

    Args:
      prompts: shown beside the texts; may be empty.
      identity: of prompts and decoding, added to the signatures.
      setting: default: what the references suggest.
      counted: from `count`, if already computed.
    """
    references.check(hypotheses, expected)
    setting = setting or Setting.of(expected)
    if task in _COUNTED:
        if counted is None:
            (counted,) = count([task], [hypotheses], expected, setting)
        metrics: dict[str, Metric] = {}
        for name, counter in _COUNTED[task](setting).items():
            if isinstance(counter, RougeCounts):
                found = overlap.rouge_metrics(counter, counted[counter], expected)
                metrics |= {name.format(own): metric for own, metric in found.items()}
            else:
                metrics[name] = references.corpus_metric(counter, counted[counter], expected)
    else:
        metrics = _OTHERS[task](hypotheses, expected, setting)
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
    return Outcome(dict(metrics), shown, _wordless(task, hypotheses, expected, setting))


def _wordless(task: str, hypotheses: Texts, expected: References, setting: Setting) -> list[str]:
    """Warnings where a scorer finds no word in a text that is not empty: such a text always scores 0."""
    if task == "rouge":
        words = ROUGE_WORDS[setting.rouge]
    elif task == "variants":
        words = ROUGE_WORDS["default"]
    elif task in ("f1", "exact_match"):
        words = answers.choose_rule(setting.rules, expected, setting.tokenize).tokens
    else:
        return []
    kinds = {"hypotheses": hypotheses, "references": [text for texts in expected for text in texts]}
    found = {kind: sum(bool(text.strip()) and not words(text) for text in texts) for kind, texts in kinds.items()}
    return [
        f"{task} keeps no word of {number} of {len(kinds[kind])} {kind}, which consist of other characters"
        for kind, number in found.items()
        if number
    ]


@dataclasses.dataclass(frozen=True, eq=False)
class Outputs:
    """What one system wrote; `how` says how its references were read."""

    path: str | Path
    hypotheses: list[str]
    references: list[list[str]]
    how: str


def read_outputs(path: str | Path, reference_specs: Sequence[str]) -> list[Outputs]:
    """The outputs of a file, or of every file of a directory, each with the references. Raises UserError."""
    if not is_url(path) and (path := Path(path)).is_dir():
        taken = {Path(spec.rpartition("#")[0] or spec).resolve() for spec in reference_specs}
        there = [file for file in sorted(path.iterdir()) if file.resolve() not in taken]
        files = [file for file in there if file.is_file() and not file.name.startswith(".")]
        if not files:
            raise UserError(f"--hypotheses={path}: the directory has no files")
        if len(files) < len(there):
            names = ", ".join(file.name for file in there if file not in files)[:300]
            print(f"warning: --hypotheses={path}: not scored (hidden, or not a regular file): {names}", file=sys.stderr)
    else:
        files = [path]
    outputs = []
    for file in files:
        hypotheses, own = read_hypotheses(file)
        expected, how = read_references(reference_specs, len(hypotheses)) if reference_specs else (own, "its own")
        if expected is None:
            raise UserError(f"{file} has no references; name them: --references=FILE[,FILE...]")
        if len(expected) != len(hypotheses):
            raise UserError(
                f"{file} has {len(hypotheses)} hypotheses, {','.join(reference_specs)} has references for "
                f"{len(expected)} items ({how}); item k of one belongs to item k of the other"
            )
        outputs.append(Outputs(file, hypotheses, expected, how))
    return outputs


def by_references(outputs: Sequence[Outputs]) -> list[list[Outputs]]:
    """Outputs grouped by equal references."""
    groups: defaultdict[tuple[tuple[str, ...], ...], list[Outputs]] = defaultdict(list)
    for output in outputs:
        groups[tuple(map(tuple, output.references))].append(output)
    return list(groups.values())


def choose_tasks(text: str | None) -> list[str]:
    """The tasks of a comma-separated list; without one, BLEU and chrF. Raises UserError."""
    tasks = list(dict.fromkeys(task.strip() for task in (text or "").split(",") if task.strip())) or list(OF_OUTPUTS)
    for task in tasks:
        if task not in TASKS:
            raise UserError(f"unknown task {task[:60]!r}; choose from {', '.join(TASKS)}{suggestion(task, TASKS)}")
    return tasks
