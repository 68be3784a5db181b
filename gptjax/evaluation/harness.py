"""lm-eval's tasks on a checkpoint. Imported only where lm-eval is installed: `pip install lm-eval`.

lm-eval builds the prompts and computes the metrics; the three methods of its `LM` are answered by our scorer and
generator. A context longer than the model's loses its beginning, as with lm-eval's own models.
"""

import importlib.metadata
import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lm_eval
import numpy as np
from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager

from gptjax.data.tokenization.tokenizer import Tokenizer
from gptjax.errors import UserError
from gptjax.evaluation.confidence import Estimate
from gptjax.evaluation.continuations import ContinuationScorer, Pair, encode_pair
from gptjax.evaluation.metrics import Outcome, ratio_metric
from gptjax.evaluation.room import TooLong, fit

Generate = Callable[..., list[str]]

DEFAULT_NEW_TOKENS = 256  # lm-eval's own default


class CheckpointLM(LM):
    """A checkpoint as lm-eval sees a model."""

    def __init__(
        self,
        scorer: ContinuationScorer,
        tokenizer: Tokenizer,
        generate: Generate,
        begin: Sequence[int] = (),
        too_long: TooLong = "cut",
    ):
        """`generate(prompts, **sampling)` completes token ids, see `gptjax.generation.params.SamplingParams`.

        `begin`: token ids before each context; in lm-eval's own models, those that the tokenizer adds by itself.
        """
        super().__init__()
        self._scorer, self._tokenizer, self._generate = scorer, tokenizer, generate
        self._begin, self._too_long = tuple(begin), too_long

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        encoded = [encode_pair(self._tokenizer, *request.args, self._begin) for request in requests]
        scores = self._scorer.score([(one.context, one.continuation) for one in encoded])
        return list(zip(scores.log_likelihood.tolist(), scores.is_greedy.tolist(), strict=True))

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        pairs: list[Pair] = []
        owners: list[int] = []
        for owner, request in enumerate(requests):
            tokens = [*self._begin, *self._tokenizer.encode(request.args[0]).tolist()]
            windows = utils.get_rolling_token_windows(
                tokens,
                prefix_token=self._tokenizer.begin_ids[-1],
                max_seq_len=self._scorer.context_length,
                context_len=1,
            )
            for context, continuation in map(utils.make_disjoint_window, windows):
                pairs.append((np.array(context, np.int32), np.array(continuation, np.int32)))
                owners.append(owner)
        scores = self._scorer.score(pairs)
        return np.bincount(owners, scores.log_likelihood, minlength=len(requests)).tolist()

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(repr(sorted(request.args[1].items())), []).append(number)
        texts = [""] * len(requests)
        for members in groups.values():
            options = dict(requests[members[0]].args[1])
            sampling = _sampling(options)
            encoded = self._tokenizer.encode_batch([requests[member].args[0] for member in members])
            first = self._begin or self._tokenizer.begin_ids[-1:]  # for an empty prompt
            prompts = [np.concatenate([self._begin if len(ids) else first, ids]).astype(np.int32) for ids in encoded]
            limit = self._scorer.context_length
            room = max(limit - sampling["max_new_tokens"], limit // 2, 1)  # lm-eval cuts every prompt to this length
            if self._too_long == "fail":
                fit(prompts, limit, sampling["max_new_tokens"], "fail")
            prompts = [prompt[-room:] for prompt in prompts]
            for member, text in zip(members, self._generate(prompts, **sampling), strict=True):
                texts[member] = text
        return texts


def _sampling(options: dict[str, Any]) -> dict[str, Any]:
    """`SamplingParams` from the gen_kwargs of a task."""
    until = options.get("until") or []
    sampling = {
        "stop": tuple(stop for stop in ([until] if isinstance(until, str) else until) if stop),
        "max_new_tokens": int(options.get("max_gen_toks", options.get("max_new_tokens", DEFAULT_NEW_TOKENS))),
        "temperature": float(options.get("temperature", 1.0 if options.get("do_sample") else 0.0)),
    }
    if not options.get("do_sample", sampling["temperature"] > 0):
        sampling["temperature"] = 0.0
    return sampling | {name: options[name] for name in ("top_k", "top_p") if name in options}


def run(task: str, model: CheckpointLM) -> Outcome:
    """The metrics of one lm-eval task under lm-eval's names; for the parts of a group METRIC/PART.

    `task` is a name, or the path of a YAML file that describes a task.
    """
    logging.getLogger("lm_eval").setLevel(logging.WARNING)
    tasks: list[Any] = [task]
    manager = None
    if task.endswith((".yaml", ".yml")):
        if not Path(task).is_file():
            raise UserError(f"lm_eval:{task}: there is no such file")
        tasks, manager = [_task_of_file(Path(task))], TaskManager(include_path=str(Path(task).absolute().parent))
    try:
        answer = lm_eval.simple_evaluate(
            model,
            tasks=tasks,
            task_manager=manager,
            log_samples=True,
            bootstrap_iters=1000,
        )
    except (KeyError, ValueError, ConnectionError, FileNotFoundError) as error:
        raise UserError(f"lm_eval:{task}: {type(error).__name__}: {str(error).splitlines()[0][:300]}") from error
    metrics: dict[str, Estimate] = {}
    for part, results in answer["results"].items():
        for key, value in results.items():
            name, _, filtered_by = key.partition(",")
            if name.endswith("_stderr") or name == "sample_len" or not isinstance(value, int | float):
                continue
            label = name if filtered_by in ("none", "") else f"{name},{filtered_by}"
            label = label if part == tasks[0] else f"{label}/{part}"
            metrics[label] = _metric(answer, part, name, filtered_by, value)
    return Outcome(metrics)


def _metric(answer: Any, part: str, name: str, filtered_by: str, value: float) -> Estimate:
    """A metric with the score of each sample if it is their mean; otherwise one with lm-eval's standard error."""
    version, shots = answer["versions"].get(part), answer["n-shot"].get(part, 0)
    signature = f"lm_eval:{importlib.metadata.version('lm_eval')}|task:{part}|version:{version}|fewshot:{shots}"
    samples = [s for s in answer.get("samples", {}).get(part, []) if s.get("filter", "none") == filtered_by]
    scores = [sample.get(name) for sample in samples]
    if scores and all(isinstance(score, int | float) for score in scores) and math.isclose(np.mean(scores), value):
        ids = [f"{part}:{sample['doc_id']}:{sample.get('doc_hash', '')[:12]}" for sample in samples]
        return ratio_metric(ids, np.array(scores, np.float64), signature=f"{signature}|ci:bootstrap-1000", unit=name)
    error = answer["results"][part].get(f"{name}_stderr,{filtered_by}")
    margin = 1.96 * error if isinstance(error, int | float) else math.nan
    return Estimate(value, [value - margin, value + margin], len(samples), f"{signature}|ci:normal")


def _task_of_file(path: Path) -> str:
    import yaml

    task = yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.BaseLoader)
    if not isinstance(task, dict) or "task" not in task:
        raise UserError(f"lm_eval:{path}: no `task: NAME` in the file")
    return task["task"]
