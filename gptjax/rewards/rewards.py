"""Rewards: one number for a prompt, a completion and a reference, which are all texts.

`objective.reward` names a reward, or several with weights: "exact_match", "number + 0.2*format",
"rewards.py:mine - 0.1*length". FILE.py:function is a function (prompt, completion, reference) -> float of the user,
model:WORKDIR a reward model.
"""

import math
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import regex
from jaxtyping import Float64

from gptjax.config import Config
from gptjax.data.tokenization.tokenizer import Tokenizer
from gptjax.errors import RunError, UserError
from gptjax.rewards import arithmetic, model
from gptjax.rewards.answers import final_number, reference_number
from gptjax.rewards.processes import Item, UserFunction, Verdict

_TERM = re.compile(r"(?P<sign>[+-])(?:(?P<weight>\d+(?:\.\d*)?(?:e-?\d+)?|\.\d+)\*)?(?P<name>.+)", re.DOTALL)


class Failure(NamedTuple):
    """A reward that could not be computed: the index of the item, and what the function did."""

    place: int
    what: str


class Scores(NamedTuple):
    """Rewards of some items; NaN for the items of `failures`."""

    values: Float64[np.ndarray, " items"]
    failures: list[Failure]


class Reward:
    """The weighted sum of `objective.reward`."""

    def __init__(self, config: Config, tokenizer: Tokenizer, option: str = "objective.reward"):
        """`tokenizer`: of the model that writes the completions. `option` names the reward in messages.

        Raises UserError for an unknown reward, an invalid pattern, or a file or model that cannot be loaded.
        """
        objective = config.objective
        self._terms: list[tuple[float, str, Callable[[Sequence[Item]], list[Verdict]]]] = []
        self._users: list[UserFunction] = []
        self._seconds, self._fatal = objective.reward_seconds, objective.reward_errors == "raise"
        for weight, name in parse(objective.reward, option):
            if name in BUILT_IN:
                function = BUILT_IN[name](config)
            elif name.startswith(model.PREFIX):
                function = model.ModelReward(name, tokenizer, option)
            else:
                seconds, workers = objective.reward_seconds, objective.reward_workers
                user = UserFunction(name, seconds=seconds, workers=workers, option=option)
                self._users.append(user)
                function = user
            self._terms.append((weight, name, function))

    def __call__(self, items: Sequence[Item], ids: Sequence[str]) -> Scores:
        """The reward of each item; `ids` name them in messages.

        Raises RunError for a reward that fails, unless objective.reward_errors is skip.
        """
        values, failures = np.zeros(len(items)), {}
        for weight, name, function in self._terms:
            for place, verdict in enumerate(function(items)):
                if verdict.error:
                    what = f"the reward {name} {verdict.error} for the question {ids[place]}"
                    if self._fatal:
                        raise RunError(
                            f"{what}; correct the reward, or skip such questions with "
                            "--config.objective.reward_errors=skip. The same command continues"
                        )
                    failures.setdefault(place, Failure(place, what))
                values[place] += weight * verdict.value
        values[list(failures)] = math.nan
        return Scores(values, list(failures.values()))

    @property
    def models(self) -> dict[str, Any]:
        """The parameters of the reward models, by the option that names them."""
        judges = {name: term for _, name, term in self._terms if isinstance(term, model.ModelReward)}
        return {f"objective.reward={name}": judge.params for name, judge in judges.items()}

    def close(self) -> None:
        """Ends the processes of the user's functions."""
        for user in self._users:
            user.close()


def parse(text: str, option: str = "objective.reward") -> list[tuple[float, str]]:
    """(weight, name) of each term of "exact_match + 0.2*format".

    Raises UserError for other texts; `option` names them in the message.
    """
    terms = []
    # A sign between spaces separates; within a path it is a part of the name.
    for piece in re.split(r"\s+(?=[+-]\s)", text.strip()):
        piece = re.sub(r"^([+-])\s+", r"\1", piece)
        match = _TERM.fullmatch(piece if piece[:1] in ("+", "-") else f"+{piece}")
        name = match["name"].strip() if match else ""
        is_other = re.fullmatch(rf".+\.py:[A-Za-z_]\w*|{model.PREFIX}.+", name)
        if name not in BUILT_IN and not is_other:
            raise UserError(
                f"{option}={text[:100]!r}: {piece[:60]!r} is not a reward; choose from {', '.join(BUILT_IN)}, "
                "FILE.py:function and model:WORKDIR, or a sum such as 'exact_match + 0.2*format'"
            )
        weight = float(match["weight"] or 1)
        terms.append((-weight if match["sign"] == "-" else weight, name))
    return terms


# ---- Built-in rewards: from a config to a function of items ----------------------------------------------------


def _each(score: Callable[[Item], float]) -> Callable[[Sequence[Item]], list[Verdict]]:
    return lambda items: [Verdict(float(score(item))) for item in items]


def _exact_match(config: Config):
    """1 if the completion is the reference, apart from white space at its ends."""
    return _each(lambda item: item.completion.strip() == item.reference.strip())


def _number(config: Config):
    """1 where the number after "####" is that of the reference (GSM8K)."""

    def score(item: Item) -> Verdict:
        right = reference_number(item.reference)
        if right is None:
            return Verdict(math.nan, f'found no "#### NUMBER" in the reference {item.reference[-60:]!r}')
        return Verdict(float(final_number(item.completion) == right))

    return lambda items: [score(item) for item in items]


def _format(config: Config):
    """1 where the whole completion matches `objective.reward_pattern`."""
    try:
        pattern = regex.compile(config.objective.reward_pattern, regex.DOTALL)
    except (regex.error, RecursionError, OverflowError) as error:
        raise UserError(
            f"objective.reward_pattern={config.objective.reward_pattern[:100]!r} is not a regular expression: {error}"
        ) from None
    seconds = config.objective.reward_seconds

    def score(item: Item) -> Verdict:
        try:
            return Verdict(float(pattern.fullmatch(item.completion.strip(), timeout=seconds) is not None))
        except TimeoutError:
            return Verdict(math.nan, f"took more than {seconds:g} s")

    return lambda items: [score(item) for item in items]


def _length(config: Config):
    """0 up to `objective.reward_length` characters, then falling linearly to -1 at twice as many, and -1 beyond.

    The soft punishment of overlong answers of Yu et al. 2025 (DAPO, arXiv:2503.14476), in characters.
    """
    limit = config.objective.reward_length
    return _each(lambda item: -min(max(len(item.completion) - limit, 0) / limit, 1.0))


def _expression(config: Config):
    """1 where the completion is an arithmetic expression whose value is that of the reference."""

    def score(item: Item) -> Verdict:
        right = arithmetic.value(item.reference)
        if right is None:
            return Verdict(math.nan, f"found no arithmetic in the reference {item.reference[:60]!r}")
        return Verdict(float(arithmetic.value(item.completion) == right))

    return lambda items: [score(item) for item in items]


BUILT_IN = {
    "exact_match": _exact_match,
    "number": _number,
    "format": _format,
    "length": _length,
    "expression": _expression,
}
REFERRING = ("exact_match", "number", "expression")  # those that compare with a reference
