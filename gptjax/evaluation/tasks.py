"""The tasks of `evaluate --tasks`. A task reads its files before the model is loaded, then scores the checkpoint."""

import dataclasses
import hashlib
import importlib.util
import json
import math
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int64

from gptjax.artifacts.loading import Trained
from gptjax.config import Config, suggestion
from gptjax.data import opening
from gptjax.data.pipeline.mixture import parse_mixture
from gptjax.data.store.shards import TokenSplit
from gptjax.data.store.store import Store
from gptjax.data.tokenization.tokenizer import Tokenizer
from gptjax.errors import UserError
from gptjax.evaluation import answers, benchmarks, multiple_choice, text_tasks
from gptjax.evaluation.confidence import Estimate
from gptjax.evaluation.continuations import ContinuationScorer
from gptjax.evaluation.likelihood import Likelihood, Scorer, unigram_nll
from gptjax.evaluation.metrics import Outcome, Progress
from gptjax.evaluation.prompts import read_prompts
from gptjax.evaluation.room import TooLong
from gptjax.evaluation.words import choose_tokenizer

_LOSSLESS = ("char", "byte", "bpe")  # kinds of tokenizers whose decoded text has the words of the original
_SAMPLE_CHARACTERS = 100_000


@dataclasses.dataclass(frozen=True)
class Options:
    """Settings of tasks that are not in the config.

    Attributes:
      split: train, validation or test of the run's data.
      data: source to score instead of the run's data, or "".
      examples: the file of tasks that were named without one, or "".
      delimiter: between a query and its choices.
      rules: of f1 and exact_match, see `answers.choose_rule`.
      begin: what comes before a question: "tokenizer", what the tokenizer puts before every text, as lm-eval does;
        "document", what begins a document in training; or "none".
      too_long: what is done with a question or prompt that does not fit in the context.
      best_of: number of completions sampled per prompt; 1: no sampling.
      reward: chooses the best of them.
    """

    split: str = "validation"
    data: str = ""
    examples: str = ""
    delimiter: str = " "
    rules: str = ""
    begin: str = "tokenizer"
    too_long: TooLong = "cut"
    best_of: int = 1
    reward: str = ""


@dataclasses.dataclass(frozen=True)
class Request:
    """One task of the list: its kind, the file after the colon, and the name of its results."""

    kind: str
    file: str = ""

    @property
    def name(self) -> str:
        return f"{self.kind}:{Path(self.file).name.partition('.')[0]}" if self.file else self.kind


class BestOf(NamedTuple):
    """Draws `count` completions of each prompt and keeps the best by `reward`; `requests`: prompts with references."""

    count: int
    reward: str
    requests: Sequence[dict[str, Any]]


@dataclasses.dataclass
class Context:
    """What tasks work with.

    Attributes:
      generate: completes prompts (texts or token ids) with the options of `SamplingParams`, or of `BeamParams` if
        `beams` is given. Returns completions, the places of their prompts, and a note on prompts that were too long.
      progress: makes a progress display with the given title, or None.
      completions: those already computed, by prompts.
    """

    config: Config
    options: Options
    trained: Trained
    mesh: Mesh
    generate: Callable[..., tuple[list[str], list[int], str]]
    progress: Callable[[str], Progress | None]
    completions: dict[tuple[str, ...], tuple[list[str], list[int], str]] = dataclasses.field(default_factory=dict)

    @cached_property
    def scorer(self) -> ContinuationScorer:
        batch_size = self.config.evaluation.batch_size
        return ContinuationScorer(self.trained.architecture, self.trained.params, self.mesh, batch_size=batch_size)

    @property
    def style(self) -> multiple_choice.Style:
        tokenizer, options = self.trained.tokenizer, self.options
        begin = {"tokenizer": tokenizer.prefix, "document": tokenizer.begin_ids, "none": ()}[options.begin]
        return multiple_choice.Style(options.delimiter, begin, options.too_long)

    @property
    def tokenizer_identity(self) -> str:
        return f"tokenizer:{self.trained.tokenizer.sha256[:12]}"

    def complete(self, prompts: Sequence[dict[str, Any]]) -> tuple[list[str], list[int], str]:
        """Completions, the places of their prompts, and a note on prompts that were too long.

        Decoding is greedy, beam search (evaluation.beams) or best of n (--best_of). Tasks on the same prompts share
        their completions.
        """
        texts = tuple(prompt["prompt"] for prompt in prompts)
        if texts not in self.completions:
            evaluation, options = self.config.evaluation, self.options
            sampling: dict[str, Any] = {"max_new_tokens": evaluation.max_new_tokens, "temperature": 0.0}
            if evaluation.beams > 1:
                sampling = {name: evaluation[name] for name in ("max_new_tokens", "beams", "length_penalty")}
            elif options.best_of > 1:
                sampling |= {"temperature": 1.0, "best": BestOf(options.best_of, options.reward, prompts)}
            completed, places, note = self.generate(texts, too_long=options.too_long, **sampling)
            self.completions[texts] = [text.strip() for text in completed], places, note
        return self.completions[texts]


class Task(NamedTuple):
    """A kind of task.

    Attributes:
      read: reads the files to score; raises UserError before anything expensive begins.
      run: the outcome, from what `read` returned.
      takes_file: whether it can be written KIND:FILE.
    """

    read: Callable[[Request, Config, Options], Any]
    run: Callable[[Context, Request, Any], Outcome]
    takes_file: bool = False


def parse(text: str) -> list[Request]:
    """The tasks of a comma-separated list. Raises UserError if one is unknown."""
    requests = []
    for entry in filter(None, (part.strip() for part in text.split(","))):
        kind, _, file = entry.partition(":")
        if kind not in TASKS:
            raise UserError(f"unknown task {kind[:60]!r}; choose from {', '.join(TASKS)}{suggestion(kind, TASKS)}")
        if file and not TASKS[kind].takes_file:
            raise UserError(f"the task {kind} takes no file: {entry!r}; prompts come from --prompts=FILE")
        requests.append(Request(kind, str(Path(file).expanduser()) if file.startswith("~") else file))
    if not requests:
        raise UserError(f"--tasks is empty; choose from {', '.join(TASKS)}")
    names = [request.name for request in requests]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"two tasks are named {name}; give their files different names, or run evaluate twice")
    return requests


# ---- perplexity ------------------------------------------------------------------------------------------


def _read_nothing(request: Request, config: Config, options: Options) -> None:
    return None


def _perplexity(context: Context, request: Request, _: None) -> Outcome:
    """Perplexity, nll, bits per byte, accuracy, perplexity per word, and the perplexity of a unigram model.

    For a mixture: of all sources together, and of each source as METRIC/SOURCE.
    """
    trained, options = context.trained, context.options
    stores, split_name = _open_data(context)
    splits = {name: store.split(split_name) for name, store in stores.items()}
    scorer = Scorer(trained.architecture, context.mesh, batch_size=context.config.evaluation.batch_size)
    likelihoods = {
        name: scorer.score(
            trained.params,
            split,
            eot_id=trained.tokenizer.eot_id,
            stride=context.config.evaluation.stride,
            progress=context.progress("scoring"),
        )
        for name, split in splits.items()
    }
    words = {name: count_words(split, trained.tokenizer) for name, split in splits.items()}
    fingerprints = [store.fingerprint for store in stores.values()]
    joined = fingerprints[0] if len(stores) == 1 else hashlib.sha256("".join(fingerprints).encode()).hexdigest()
    identity = f"data:{joined[:12]}|split:{'all' if options.data else split_name}"
    tokenizer = context.tokenizer_identity
    known = [counts for counts in words.values() if counts is not None]
    all_words = np.concatenate(known) if len(known) == len(words) else None
    metrics: dict[str, Estimate] = dict(
        Likelihood.joined(list(likelihoods.values())).estimates(identity, tokenizer=tokenizer, words=all_words)
    )
    if len(stores) > 1:
        for name, likelihood in likelihoods.items():
            own = likelihood.estimates(f"{identity}|source:{name}", tokenizer=tokenizer, words=words[name])
            metrics |= {f"{metric}/{name}": estimate for metric, estimate in own.items()}
    elif not options.data and not (split := next(iter(splits.values()))).has_mask:
        # Not for dialogues: there the frequencies would also count the prompts, which are not scored.
        train = next(iter(stores.values())).split("train")
        unigram = math.exp(unigram_nll(train, split, trained.tokenizer.vocab_size))
        signature = f"{tokenizer}|{identity}|model:unigram-add1"
        metrics["unigram_perplexity"] = Estimate(unigram, [math.nan, math.nan], split.num_tokens, signature)
    return Outcome(metrics)


def _open_data(context: Context) -> tuple[dict[str, Store], str]:
    """The stores by source, and the split of them to score: all of --data, or a split of the run's own data."""
    trained, options = context.trained, context.options
    config = context.config.copy_and_resolve_references().unlock()
    if not options.data:
        stores = {source.name: source.store for source in opening.RunData.open(config).stores}
        if next(iter(stores.values())).tokenizer().sha256 != trained.tokenizer.sha256:
            raise UserError(
                f"{config.data.source} is not the data that {trained.path} was trained on (its tokenizer differs); "
                "restore the data, or evaluate another source with --data=SPEC"
            )
        return stores, options.split
    stores = {}
    for name, spec, _ in parse_mixture(options.data):
        config.data.update(source=spec, cleaning="none", cleaned_splits="all", deduplicate="none", decontaminate="")
        config.data.update(validation_fraction=0.0, test_fraction=0.0)
        stores[name] = opening.open_store_of(config, tokenizer=trained.tokenizer)
        if stores[name].tokenizer().sha256 != trained.tokenizer.sha256:
            raise UserError(
                f"--data={spec}: its token store has another tokenizer than {trained.path}; give the text, not a store"
            )
    is_prepared = all(spec.startswith(("store:", "tokens:")) for _, spec, _ in parse_mixture(options.data))
    return stores, options.split if is_prepared else "train"


def count_words(split: TokenSplit, tokenizer: Tokenizer) -> Int64[np.ndarray, " documents"] | None:
    """Words between white space of each document; None if the text has none (Chinese) or decoding is not exact."""
    if split.has_mask or tokenizer.kind not in _LOSSLESS:
        return None
    ends = np.append(split.document_starts[1:], split.num_tokens)
    counts = np.zeros(len(ends), np.int64)
    sample = ""
    for number, (start, end) in enumerate(zip(split.document_starts.tolist(), ends.tolist(), strict=True)):
        text = tokenizer.decode(split.read(start, end - start))
        counts[number] = len(text.split())
        sample += text[: max(0, _SAMPLE_CHARACTERS - len(sample))]
    return None if choose_tokenizer([sample]) != "13a" or not counts.any() else counts


def _preference(context: Context, request: Request, _: None) -> Outcome:
    """How often the better answer of a pair is preferred."""
    from gptjax.evaluation import preferences

    stores, split_name = _open_data(context)
    splits = {name: store.split(split_name) for name, store in stores.items()}
    fingerprints = "".join(store.fingerprint[:12] for store in stores.values())
    identity = f"data:{fingerprints}|split:{'all' if context.options.data else split_name}"
    return preferences.score(context.trained, splits, context.mesh, f"{context.tokenizer_identity}|{identity}")


# ---- generated texts -------------------------------------------------------------------------------------


def _read_prompts(request: Request, config: Config, options: Options) -> list[dict[str, Any]]:
    if config.evaluation.prompts:
        prompts = read_prompts(config.evaluation.prompts)
    elif config.data.source.startswith("python_docs"):
        prompts = _held_out_questions(config, options.split)
    else:
        raise UserError(f"the task {request.kind} needs prompts with references: --prompts=FILE.jsonl")
    prompts = prompts[: config.evaluation.max_prompts or None]
    if request.kind == "exact_answer":
        answers.check_references([prompt["references"] for prompt in prompts])
    return prompts


def _held_out_questions(config: Config, split_name: str) -> list[dict[str, Any]]:
    """Questions on docstrings of the given split, spread over the library."""
    from gptjax.data.building.held_out import held_out_questions

    pairs = held_out_questions(config.data.to_dict(), split_name)
    wanted = config.evaluation.max_prompts or len(pairs)
    return pairs[:: max(len(pairs) // wanted, 1)]


def _generated(context: Context, request: Request, prompts: list[dict[str, Any]]) -> Outcome:
    texts = [prompt["prompt"] for prompt in prompts]
    digest = hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:12]
    evaluation, options = context.config.evaluation, context.options
    decoding = "greedy"
    if evaluation.beams > 1:
        decoding = f"beam-{evaluation.beams}|length_penalty:{evaluation.length_penalty:g}"
    elif options.best_of > 1:
        decoding = f"best-of-{options.best_of}|reward:{options.reward}"
    completions, places, note = context.complete(prompts)
    expected = [prompts[place]["references"] for place in places]
    return text_tasks.score_texts(
        request.kind,
        [texts[place] for place in places],
        completions,
        expected,
        setting=text_tasks.Setting.of(expected, context.options.rules),
        identity=f"prompts:{digest}|decoding:{decoding}|max_new_tokens:{evaluation.max_new_tokens}|{note}",
    )


# ---- likelihood of choices -------------------------------------------------------------------------------


def _file(request: Request, options: Options) -> str:
    file = request.file or options.examples
    if not file:
        raise UserError(f"the task {request.kind} needs a file: --tasks={request.kind}:FILE.jsonl or --examples=FILE")
    return file


def _read_questions(request: Request, config: Config, options: Options) -> list[multiple_choice.Question]:
    return benchmarks.read_questions(_file(request, options), request.kind)


def _choices(context: Context, request: Request, questions: list[multiple_choice.Question]) -> Outcome:
    tokenizer, progress = context.trained.tokenizer, context.progress(request.name)
    return multiple_choice.choose(context.scorer, tokenizer, questions, context.style, progress=progress)


def _last_words(context: Context, request: Request, passages: list[multiple_choice.Question]) -> Outcome:
    return multiple_choice.predict_last_words(
        context.scorer,
        context.trained.tokenizer,
        passages,
        context.style,
        identity=context.tokenizer_identity,
        progress=context.progress(request.name),
    )


# ---- lm-eval ---------------------------------------------------------------------------------------------


def _find_harness(request: Request, config: Config, options: Options) -> None:
    if not request.file:
        raise UserError("the task lm_eval needs a name: --tasks=lm_eval:arc_easy, or lm_eval:FILE.yaml")
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("lm_eval is not installed; pip install lm-eval in the environment of gptjax")


def _harness(context: Context, request: Request, _: None) -> Outcome:
    from gptjax.evaluation import harness

    tokenizer, style = context.trained.tokenizer, context.style

    def generate(prompts: Sequence[np.ndarray], **sampling) -> list[str]:
        return context.generate(prompts, **sampling)[0]

    model = harness.CheckpointLM(context.scorer, tokenizer, generate, style.begin, style.too_long)
    return harness.run(request.file, model)


TASKS: dict[str, Task] = {
    "perplexity": Task(_read_nothing, _perplexity),
    "preference": Task(_read_nothing, _preference),
    **{kind: Task(_read_prompts, _generated) for kind in text_tasks.TASKS},
    **{kind: Task(_read_questions, _choices, takes_file=True) for kind in benchmarks.FORMS if kind != "lambada"},
    "lambada": Task(_read_questions, _last_words, takes_file=True),
    "lm_eval": Task(_find_harness, _harness, takes_file=True),
}


def need_prompts(request: Request) -> bool:
    return TASKS[request.kind].read is _read_prompts


def check(config: Config) -> None:
    """Reads the files of the tasks in `evaluation.tasks`, before the training run that ends with these tasks.

    Raises UserError.
    """
    has_prompts = bool(config.evaluation.prompts)
    for request in parse(config.evaluation.tasks):
        if not need_prompts(request) or has_prompts:
            TASKS[request.kind].read(request, config, Options())
    if has_prompts:
        read_prompts(config.evaluation.prompts)
