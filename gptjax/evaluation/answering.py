"""Greedy answers to held-out questions during reinforcement learning."""

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np

from gptjax.data.opening import RunData
from gptjax.evaluation.diversity import diversity
from gptjax.evaluation.words import choose_tokenizer
from gptjax.model import gpt
from gptjax.training import metrics
from gptjax.training.program import Program
from gptjax.training.rollouts import Rollouts


class Answers:
    """The reward of greedy answers to the first `evaluation.max_prompts` questions of the validation split.

    The first `logging.samples` of them are written to WORKDIR/samples.jsonl.
    """

    def __init__(self, program: Program, data: RunData, workdir: Path, rollouts: Rollouts, *, start: int):
        """Drops the samples of steps after `start`. Raises UserError where no held-out question fits the context."""
        config = program.config
        most = config.evaluation.max_prompts or None
        self._rollouts, self._path, self._shown = rollouts, workdir / "samples.jsonl", config.logging.samples
        held_out = any("validation" in source.store.splits for source in data.stores)
        self._asked = data.questions(config, "validation").questions[:most] if held_out else []
        metrics.drop_after(self._path, start)

    def line(self, step: int, params: gpt.Params) -> dict[str, Any]:
        """Means over the answers: `reward`, `length` (tokens) and `truncated` (share cut off by the limit).

        Also how varied the texts of the last training step were: distinct1, distinct2, distinct3 (see
        `evaluation.diversity`). Empty if no question is held out.
        """
        if not self._asked:
            return {}
        completions = self._rollouts.answer(params, self._asked, temperature=0.0)
        scores = self._rollouts.rewarded(self._asked, completions)
        told = scores.values[np.isfinite(scores.values)]
        shown = zip(self._asked, completions, scores.values, strict=True)
        metrics.append(
            self._path,
            *(
                {"step": step, "prompt": question.prompt, "text": completion.text, "reference": question.reference}
                | {"reward": float(value) if math.isfinite(value) else None}
                for question, completion, value in itertools.islice(shown, self._shown)
            ),
        )
        return {
            "reward": float(told.mean()) if len(told) else math.nan,
            "length": float(np.mean([len(completion.tokens) for completion in completions])),
            "truncated": float(np.mean([completion.finish_reason == "length" for completion in completions])),
            **self._distinct(),
        }

    def _distinct(self) -> dict[str, float]:
        texts = self._rollouts.texts
        if not texts:
            return {}
        ids = [str(number) for number in range(len(texts))]
        found = diversity(texts, ids, choose_tokenizer(texts))
        return {name: metric.value for name, metric in found.items() if name.startswith("distinct")}
