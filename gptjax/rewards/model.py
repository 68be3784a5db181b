"""The reward of a reward model, a work directory that was trained with `objective.name=reward_model`."""

from collections.abc import Sequence
from functools import partial

import jax
import numpy as np

from gptjax.artifacts import models
from gptjax.data.tokenization.tokenizer import Tokenizer
from gptjax.errors import UserError
from gptjax.model import gpt, reward
from gptjax.rewards.processes import Item, Verdict

PREFIX = "model:"
_ROWS = 32  # texts that are scored at once
_STEP = 64  # lengths are multiples of it, each a compiled program


class ModelReward:
    """Scores the tokens of items directly: the model has the same tokenizer as the one that wrote them."""

    def __init__(self, spec: str, tokenizer: Tokenizer, option: str = "objective.reward"):
        """`spec` is model:WORKDIR; `option` names it in messages. The model is kept on one device.

        Raises UserError where there is no reward model, or one with another tokenizer.
        """
        place = models.find(spec.removeprefix(PREFIX))
        if place.is_published or place.config.objective.name != "reward_model":
            raise UserError(
                f"{option}={spec!r}: {place.path} is not a reward model; train one with "
                "--config.objective.name=reward_model on pairs of answers"
            )
        trained = place.load()
        if trained.tokenizer.sha256 != tokenizer.sha256:
            raise UserError(
                f"{option}={spec!r} has another tokenizer than the model that writes the answers; train both from the "
                "same model: --config.init_from=WORKDIR"
            )
        self.params, self._context = trained.params, trained.architecture.context_length

        @jax.jit
        def score(params: gpt.Params, tokens: jax.Array, last: jax.Array) -> jax.Array:
            return reward.rewards(gpt.bind(trained.architecture, params), tokens, last)[0]

        self._score = partial(score, self.params)

    def __call__(self, items: Sequence[Item]) -> list[Verdict]:
        """The reward of each item, at the last token of its completion, even if the completion was cut off."""
        lengths = np.array([len(item.tokens) for item in items])
        values = np.full(len(items), np.nan)
        short = np.flatnonzero(lengths <= self._context)
        short = short[np.argsort(lengths[short], kind="stable")]
        for first in range(0, len(short), _ROWS):
            places = short[first : first + _ROWS]
            width = min(-(-lengths[places[-1]] // _STEP) * _STEP, self._context)
            tokens, last = np.zeros((_ROWS, width), np.int32), np.zeros(_ROWS, np.int32)
            for row, place in enumerate(places):
                tokens[row, : lengths[place]] = items[place].tokens
                last[row] = lengths[place] - 1
            values[places] = np.asarray(self._score(tokens, last))[: len(places)]
        long = f"reads {self._context} tokens at most, and prompt and completion have more"
        return [
            Verdict(float(value), "" if length <= self._context else long)
            for value, length in zip(values, lengths, strict=True)
        ]
